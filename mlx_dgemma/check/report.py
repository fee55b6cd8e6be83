"""What was found: facts of the machine and sections of measured rows, as far as they got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .paths import scrubbed

SCHEMA = 1
NAMED = 6  # missing pieces, in a text; JSON has all
PARITY, MEMORY = "parity", "memory"  # the section that compares with the reference; the one that runs nothing
COMPLETE, CUT, INTERRUPTED, FAILED, NOT_RUN = "complete", "cut short", "interrupted", "failed", "not run"


@dataclass(frozen=True)
class Column:
    """`form` is a format specification of its numbers."""

    key: str
    title: str
    form: str = ""

    def show(self, value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        return scrubbed(value) if isinstance(value, str) else format(value, self.form)


@dataclass
class Section:
    """A table that fills up row by row.

    Attributes:
        missing: what there was no time for.
        faults: what is wrong; the check fails for any.
        notes: how to read the rows.
    """

    name: str
    title: str
    columns: Sequence[Column] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    state: str = NOT_RUN
    seconds: float = 0.0

    def add(self, *values: Any) -> None:
        """A row, in the order of the columns."""
        self.rows.append(dict(zip((column.key for column in self.columns), values, strict=True)))

    def heading(self) -> str:
        """The title and, unless everything in it was done, what became of it."""
        where = " at its time budget" if self.state == CUT else ""
        return self.title if self.state == COMPLETE else f"{self.title} ({self.state}{where})"

    def remarks(self) -> list[str]:
        """What is wrong, what is missing, how to read it."""
        wrong = [f"WRONG: {fault}" for fault in self.faults]
        return [scrubbed(remark) for remark in (*wrong, *self._left_out(), *self.notes)]

    def _left_out(self) -> list[str]:
        named, more = self.missing[:NAMED], len(self.missing) - NAMED
        rest = f", and {more} more" if more > 0 else ""
        return [f"No time for: {', '.join(named)}{rest}."] if named else []

    def filled(self) -> list[Column]:
        """The columns that have anything in them."""
        return [column for column in self.columns if any(row[column.key] is not None for row in self.rows)]

    def as_dict(self) -> dict[str, Any]:
        columns = [{"key": column.key, "title": column.title} for column in self.columns]
        kept = {name: getattr(self, name) for name in ("name", "title", "state", "missing", "faults", "notes")}
        return kept | {"seconds": round(self.seconds, 3), "columns": columns, "rows": self.rows}


@dataclass
class Report:
    """Attributes:
    facts: of the machine, the versions and the model, in the order they are shown.
    seconds: that it was allowed.
    was_interrupted: also while loading, before any section.
    """

    facts: dict[str, Any]
    sections: list[Section]
    seconds: float
    was_interrupted: bool = False

    @property
    def faults(self) -> list[str]:
        return [f"{section.name}: {scrubbed(fault)}" for section in self.sections for fault in section.faults]

    @property
    def passed(self) -> bool | None:
        """None: nothing is known to be wrong, but no bundle was replayed either."""
        is_compared = any(section.name == PARITY and section.rows for section in self.sections)
        return False if self.faults else True if is_compared else None

    def lines(self) -> dict[str, str]:
        """The facts, as they are shown."""
        return {name: scrubbed(str(value)) for name, value in self.facts.items()}

    @property
    def is_whole(self) -> bool:
        return all(section.state == COMPLETE for section in self.sections)

    def verdict(self) -> str:
        """One line: what is wrong, and whether all of it was run."""
        ran = [section for section in self.sections if section.rows and section.name != MEMORY]
        found = f"FAILED: {'; '.join(self.faults)}" if self.faults else "nothing wrong" if ran else "nothing measured"
        found += f" ({sum(section.seconds for section in self.sections):.0f} s)"
        if self.is_whole:
            return found
        unfinished = [f"{section.name} {section.state}" for section in self.sections if section.state != COMPLETE]
        return f"PARTIAL REPORT ({', '.join(unfinished)}); {found}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers as they were measured, null where there is none."""
        state = INTERRUPTED if self.was_interrupted else COMPLETE if self.is_whole else "partial"
        head = {"schema": SCHEMA, "state": state, "passed": self.passed, "seconds_allowed": self.seconds}
        return _clean(head | {"facts": self.facts, "sections": [section.as_dict() for section in self.sections]})


def _clean(value: Any) -> Any:
    """No number that JSON lacks, no path that others should not see."""
    if isinstance(value, dict):
        return {key: _clean(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    if isinstance(value, str):
        return scrubbed(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

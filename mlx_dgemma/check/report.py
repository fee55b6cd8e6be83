"""What was found: facts of the machine and sections of measured rows, as far as they got."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
NAMED = 6  # missing pieces, in a text; JSON has all
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
        return str(value) if isinstance(value, str) else format(value, self.form)


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
        return [*(f"WRONG: {fault}" for fault in self.faults), *self._left_out(), *self.notes]

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
        return kept | {"seconds": round(self.seconds, 3), "columns": columns, "rows": _without_nan(self.rows)}


@dataclass
class Report:
    """Attributes:
    facts: of the machine, the versions and the model, in the order they are shown.
    seconds: that it was allowed.
    """

    facts: dict[str, Any]
    sections: list[Section]
    seconds: float

    @property
    def faults(self) -> list[str]:
        return [f"{section.name}: {fault}" for section in self.sections for fault in section.faults]

    @property
    def is_interrupted(self) -> bool:
        return any(section.state == INTERRUPTED for section in self.sections)

    @property
    def is_whole(self) -> bool:
        return all(section.state == COMPLETE for section in self.sections)

    def verdict(self) -> str:
        """One line: what is wrong, and whether all of it was run."""
        ran = [section for section in self.sections if section.rows]
        found = f"FAILED: {'; '.join(self.faults)}" if self.faults else "nothing wrong" if ran else "nothing measured"
        found += f" ({sum(section.seconds for section in self.sections):.0f} s)"
        if self.is_whole:
            return found
        unfinished = [f"{section.name} {section.state}" for section in self.sections if section.state != COMPLETE]
        return f"PARTIAL REPORT ({', '.join(unfinished)}); {found}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers as they were measured, null where there is none."""
        state = INTERRUPTED if self.is_interrupted else COMPLETE if self.is_whole else "partial"
        head = {"schema": SCHEMA, "state": state, "passed": not self.faults, "seconds_allowed": self.seconds}
        return head | {"facts": self.facts, "sections": [section.as_dict() for section in self.sections]}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

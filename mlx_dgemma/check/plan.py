"""The sections, in the order they are run, and each one's share of the time."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from .report import COMPLETE, CUT, FAILED, INTERRUPTED, Section

if TYPE_CHECKING:
    from .budget import Budget
    from .subject import Subject


@dataclass(frozen=True)
class Entry:
    """Where a section is made.

    Attributes:
        module: has `TITLE`, `COLUMNS` and `measure(subject, section, budget)`, which fills the section, asks the
            budget before every piece of work and names in `section.missing` what it left out.
        share: of the time, relative to the others; what one leaves is for those after it.
    """

    module: str
    share: float
    does: str


PLAN = {
    "parity": Entry(".bundles", 45, "replay recorded runs of the reference"),
    "flips": Entry(".flips", 25, "does verifying many positions at once choose other tokens?"),
    "costs": Entry(".passes", 30, "time a pass of every kind and size"),
    "speed": Entry(".speed", 60, "tokens per second of every mode and drafter"),
    "experts": Entry(".experts", 15, "time the expert matmuls alone"),
    "memory": Entry(".peaks", 5, "what the sections before took at most"),
}


def sections(names: Sequence[str]) -> list[Section]:
    """Empty ones, in the order they are run."""
    return [_empty(name) for name in PLAN if name in names]


def _empty(name: str) -> Section:
    module = import_module(PLAN[name].module, __package__)
    return Section(name, module.TITLE, module.COLUMNS)


def fill(
    subject: Subject, todo: Sequence[Section], budget: Budget, done: Callable[[Section], None], debug: bool = False
) -> None:
    """Run sections one after the other; `done` is called with each as it ends.

    A section that raises has failed, and the next one is run. Ctrl-C ends them all, and is raised on.
    """
    for number, section in enumerate(todo):
        to_come = sum(PLAN[other.name].share for other in todo[number:])
        part = budget.part(PLAN[section.name].share / to_come)
        started = budget.clock()
        try:
            import_module(PLAN[section.name].module, __package__).measure(subject, section, part)
            section.state = CUT if section.missing else COMPLETE
        except KeyboardInterrupt:
            section.state = INTERRUPTED
            raise
        except Exception as error:  # a kernel that this device lacks, memory: the rest may still be worth having
            section.state = FAILED
            section.faults.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            if debug:
                traceback.print_exc(file=sys.stderr)
        finally:
            section.seconds = budget.clock() - started
            done(section)

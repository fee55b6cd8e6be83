"""Flips: how often verifying many positions at once chooses another token than one at a time."""

from __future__ import annotations

from ..parity import widths
from .budget import Budget, Limited, OutOfTime
from .report import Column, Section
from .subject import SEED, Subject

TITLE = "Flips: tokens that change with the width of the verify pass"
COLUMNS = (
    Column("temperature", "temp", "g"),
    Column("drafts", "drafts a pass", "d"),
    Column("tokens", "tokens", "d"),
    Column("flips", "flips", "d"),
    Column("rate", "% flipped", ".2f"),
    Column("first", "first at", "d"),
    Column("margin", "margin", ".1e"),
    Column("verdict", "verdict"),
)
TEMPERATURES, WIDTHS = (0.0, 1.0), (1, 2, 4, 8, 16)
LONGEST, SHORTEST = 128, 16  # tokens an answer
# plain steps per token that a comparison takes: once token by token, and once a width; CPUs pay most for wide passes
WORK = 5.0


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """A row per temperature and width."""
    section.notes.append(
        "A tie: two tokens all but equally likely, which kernels round differently. "
        "Margin: of the first flip, in logits; more than rounding explains is a FAULT."
    )
    for number, temperature in enumerate(TEMPERATURES):
        part = budget.part(1 / (len(TEMPERATURES) - number))
        length = LONGEST if not part.has() else _affordable(subject, part)
        if not part.has() or length < SHORTEST:
            section.missing.append(f"temperature {temperature:g}")
            continue
        _compare(subject, section, part, temperature, length)


def _affordable(subject: Subject, budget: Budget) -> int:
    """How long an answer there is time for, in tokens."""
    pace = subject.pace(budget.clock)
    return LONGEST if pace * WORK * LONGEST <= budget.left else int(budget.left / (pace * WORK))


def _compare(subject: Subject, section: Section, budget: Budget, temperature: float, length: int) -> None:
    prompt = next(iter(subject.prompts.values()))
    config = widths.plain_options(subject.model.generation_config, temperature, length)
    subject.tell(f"flips: {length} tokens at temperature {temperature:g}")
    results = widths.compare(Limited(subject.model, budget), prompt, config, SEED, WIDTHS)
    done = 0
    try:
        for result in results:
            _add(section, temperature, result)
            done += result.is_whole
    except OutOfTime:
        section.missing += [f"{width} drafts a pass at temperature {temperature:g}" for width in WIDTHS[done:]]


def _add(section: Section, temperature: float, result: widths.Comparison) -> None:
    count, first = len(result.flips), result.flips[0] if result.flips else None
    verdict = "same" if not count else "ties alone" if result.passed else "FAULT"
    where = (first.number, first.margin) if first else (None, None)
    section.add(temperature, result.width, result.tokens, count, 100 * count / max(1, result.tokens), *where, verdict)
    if not result.passed:
        section.faults.append(f"{result.width} drafts a pass at temperature {temperature:g} change tokens")

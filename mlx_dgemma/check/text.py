"""A report as text: for a terminal, and as Markdown to paste into an issue."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from .report import Report, Section

WIDTH = 100  # of remarks in a terminal


def facts(report: Report) -> str:
    """A line a fact."""
    wide = max(map(len, report.facts), default=0)
    return "\n".join(f"{name:{wide}}  {value}" for name, value in report.lines().items())


def table(section: Section) -> str:
    """A section for a terminal: words to the left, numbers to the right."""
    lines = [section.heading(), "-" * len(section.heading())]
    if section.rows:
        cells = _cells(section)
        wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
        words = _are_words(section)
        for row in cells:
            aligned = zip(row, wide, words, strict=True)
            lines.append("  ".join(cell.ljust(w) if word else cell.rjust(w) for cell, w, word in aligned).rstrip())
    for remark in section.remarks():
        lines += textwrap.wrap(remark, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """GitHub's dialect, narrow enough to be read unrendered too."""
    lines = ["### mlx_dgemma.check", "", f"**{_escaped(report.verdict())}**", ""]
    lines += [f"- {name}: {_escaped(value)}" for name, value in report.lines().items()]
    for section in report.sections:
        lines += ["", f"#### {_escaped(section.heading())}", ""]
        if section.rows:
            bars = [":--" if word else "--:" for word in _are_words(section)]
            head, *rows = map(_row, _cells(section))
            lines += [head, _row(bars), *rows, ""]
        lines += [f"- {_escaped(remark)}" for remark in section.remarks()]
    return "\n".join(lines).rstrip() + "\n"


def _cells(section: Section) -> list[list[str]]:
    """Titles, then rows; columns that stayed empty are left out."""
    columns = section.filled()
    rows = [[column.show(row[column.key]) for column in columns] for row in section.rows]
    return [[column.title for column in columns], *rows]


def _are_words(section: Section) -> list[bool]:
    """Per column, whether it holds words rather than numbers."""
    return [any(isinstance(row[column.key], str | bool) for row in section.rows) for column in section.filled()]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

"""Shares of right answers with their intervals as an SVG: a group of rows per task, a row in it per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor

from mlx_dgemma.drafter.training.curve import COLOURS

from .intervals import Interval

WIDTH, ROW, GAP = 820, 18, 12
LETTER = 7.2  # pixels, on average
RIGHT = 270  # of it two columns of numbers, which end at
PLACES = WIDTH - 140, WIDTH - 12
MOST_RUNS = len(COLOURS)
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #222 }
  .ground { fill: #fff } .grid { stroke: #ddd } .whisker { stroke-width: 2 }
  @media (prefers-color-scheme: dark) { text { fill: #ddd } .ground { fill: #161b22 } .grid { stroke: #444 } }
"""


@dataclass(frozen=True)
class Mark:
    """What one run did in one task; `beside` is printed at the right, a text per column."""

    share: Interval
    beside: tuple[str, str]


def svg(title: str, runs: Sequence[str], columns: tuple[str, str], tasks: Sequence[tuple[str, Sequence[Mark]]]) -> str:
    """A picture of some runs, at most MOST_RUNS.

    Args:
        columns: titles of what stands beside the marks.
        tasks: what is written beside each, and a mark per run.
    """
    left = 24 + LETTER * max(len(task) for task, _ in tasks)
    scale = _Scale(min(mark.share.low for _, marks in tasks for mark in marks), left)
    heads, top = _heads(title, runs, columns, left)
    rows, y = [], top + GAP / 2
    for task, marks in tasks:
        rows.append(_text(left - 12, y + ROW * len(marks) / 2 + 4, task, "end"))
        for colour, mark in zip(COLOURS, marks, strict=False):
            rows += _row(y + ROW / 2, colour, mark, scale)
            y += ROW
        y += GAP
    bottom = y - GAP / 2
    caption = _text((left + WIDTH - RIGHT) / 2, bottom + 38, "right answers, 95 % interval", "middle")
    body = "\n".join(f"  {part}" for part in [*scale.grid(top, bottom), *heads, *rows, caption])
    height = round(bottom + 52)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"  <title>{escape(title)}</title>\n  <style>{STYLE}  </style>\n"
        f'  <rect class="ground" width="{WIDTH}" height="{height}"/>\n{body}\n</svg>\n'
    )


def _heads(title: str, runs: Sequence[str], columns: tuple[str, str], left: float) -> tuple[list[str], float]:
    """What stands above the rows, and where it ends."""
    parts, y = [_text(WIDTH / 2, 22, title, "middle")], 48.0
    for colour, run in zip(COLOURS, runs, strict=False) if len(runs) > 1 else ():
        parts += [_dot(left, y - 4, colour), _text(left + 12, y, run)]
        y += ROW
    parts += [_text(x, y, column, "end") for x, column in zip(PLACES, columns, strict=True)]
    return parts, y + 10


class _Scale:
    """Shares to pixels, from the ten below the least limit to 100 %."""

    def __init__(self, least: float, left: float):
        self._first, self._left = min(90, floor(10 * least) * 10), left

    def of(self, share: float) -> float:
        whole = WIDTH - RIGHT - self._left
        return self._left + (100 * share - self._first) / (100 - self._first) * whole

    def grid(self, top: float, bottom: float) -> list[str]:
        step = 2 if self._first == 90 else 10 if self._first >= 40 else 20
        parts = []
        for percent in range(100, self._first - 1, -step):
            x = self.of(percent / 100)
            parts.append(f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>')
            parts.append(_text(x, bottom + 18, f"{percent} %", "middle"))
        return parts


def _row(y: float, colour: str, mark: Mark, scale: _Scale) -> list[str]:
    low, high = scale.of(mark.share.low), scale.of(mark.share.high)
    line = f'<line x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}" class="whisker" stroke="{colour}"/>'
    texts = [_text(x, y + 4, text, "end") for x, text in zip(PLACES, mark.beside, strict=True)]
    return [line, _dot(scale.of(mark.share.value), y, colour), *texts]


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

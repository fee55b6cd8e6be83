"""Curves as an SVG, readable on light and on dark ground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 56
COLOURS = ("#2f7ed8", "#d8662f", "#3d9a50", "#9457c7", "#8a8a8a")
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #222 }
  .axis { stroke: #444 } .grid { stroke: #ddd } .curve { fill: none; stroke-width: 2 }
  @media (prefers-color-scheme: dark) { text { fill: #ddd } .axis { stroke: #aaa } .grid { stroke: #444 } }
"""


def svg(title: str, x_label: str, y_label: str, curves: Mapping[str, Sequence[float]], first: int = 1) -> str:
    """Curves by name, each a y for x = first, first + 1, ..."""
    longest = max(len(curve) for curve in curves.values())
    top = nice(max((y for curve in curves.values() for y in curve), default=1))
    last = max(first + longest - 1, first + 1)

    def x_of(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{WIDTH / 2}" y="22" text-anchor="middle">{escape(title)}</text>']
    for number in range(6):
        y = top * number / 5
        parts.append(_line(LEFT, y_of(y), WIDTH - RIGHT, y_of(y), "grid"))
        parts.append(f'<text x="{LEFT - 8}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in range(first, last + 1, max(1, -(-(last - first) // 16))):
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{x}</text>')
    parts += [
        _line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "axis"),
        _line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "axis"),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x_of(first + i):.1f},{y_of(y):.1f}" for i, y in enumerate(curve))
        legend = TOP + 14 + 18 * number
        parts += [
            f'<polyline class="curve" stroke="{colour}" points="{points}"/>',
            f'<line x1="{LEFT + 12}" y1="{legend - 4}" x2="{LEFT + 36}" y2="{legend - 4}" class="curve" '
            f'stroke="{colour}"/>',
            f'<text x="{LEFT + 42}" y="{legend}">{escape(name)}</text>',
        ]
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"  <title>{escape(title)}</title>\n  <style>{STYLE}  </style>\n{body}\n</svg>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def nice(value: float) -> float:
    """The least of some round numbers times a power of ten that is not below a value."""
    power = 1.0
    while power * 10 <= max(value, 1e-9):
        power *= 10
    while power > max(value, 1e-9):
        power /= 10
    return next(step * power for step in (1, 1.5, 2, 2.5, 4, 5, 7.5, 10) if step * power >= value)

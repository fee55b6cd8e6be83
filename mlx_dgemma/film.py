"""A canvas settling as an animated picture: an SVG without scripts, which plays wherever images are shown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from .cells import cells, columns_of, runs, wrapped
from .errors import InputError
from .files import write_whole
from .prompt import asked
from .response import GenerationResponse, heading

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .prompt import Prompt

MOST_COLUMNS, LEAST_COLUMNS, PROMPT_LINES = 80, 46, 6
STEP, HOLD, LONGEST = 0.6, 4.0, 20.0  # seconds: a frame, the answer, the loop
MOST_FRAMES = 160  # a tenth of a second each; of more steps, every second or third is drawn
LETTER, LINE, MARGIN, BAR = 8.43, 20, 20, 36  # pixels; fonts are up to 0.602 em wide
LIGHTS = "#f85149", "#d29922", "#3fb950"

# marks of cells, which are classes in the picture
SETTLED, FRESH, NOISE, SPECIAL, THOUGHT, ASKED = "", "f", "n", "s", "t", "q"
STYLE = """
  text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #e6edf3 }
  .window { fill: #0d1117; stroke: #30363d } .bar { fill: #161b22 } .head { font-size: 12px; fill: #8b949e }
  .track { fill: #21262d } .share { fill: #3fb950 }
  .f { fill: #7ee787 } .n { fill: #6e7681 } .s { fill: #484f58 } .t { fill: #8b949e; font-style: italic }
  .q { fill: #79c0ff }
"""
# Still pictures, and readers who want no motion, have the last frame: it alone is visible of its own accord.
MOTION = """
  .step { visibility: hidden; animation: step %(loop).3fs step-end infinite }
  .last { animation: last %(loop).3fs step-end infinite }
  @keyframes step { 0%% { visibility: visible } %(step).4f%% { visibility: hidden } }
  @keyframes last { 0%% { visibility: hidden } %(last).4f%% { visibility: visible } }
  @media (prefers-reduced-motion: reduce) { .step, .last { animation: none } }
"""

Line = list[tuple[str, str]]


@dataclass(frozen=True)
class Frame:
    """What is seen at once."""

    head: str
    share: float  # accepted, of the canvas
    lines: list[Line]


class Film:
    """Collects what `stream_generate` yields with drafts=True, a frame per denoising step.

        film = Film(tokenizer, prompt)
        for response in stream_generate(model, tokenizer, prompt, drafts=True):
            film.add(response)
        film.write("canvas.svg")

    Args:
        prompt: stands on top; of chat messages, the last of the user.
    """

    def __init__(self, tokenizer: TokenizerWrapper, prompt: Prompt):
        self.frames: list[Frame] = []
        self._tokenizer, self._special = tokenizer, set(tokenizer.all_special_ids)
        self._question = _question(asked(tokenizer, prompt))
        self._said: Line = []
        self._last: GenerationResponse | None = None

    def watch(self, responses: Iterable[GenerationResponse]) -> Iterator[GenerationResponse]:
        """Add responses on their way to someone else."""
        for response in responses:
            self.add(response)
            yield response

    def add(self, response: GenerationResponse) -> None:
        """Take a draft as a frame, and what is final as text that stays."""
        if response.is_draft:
            share = sum(response.draft_accepted) / len(response.draft_accepted)
            lines = wrapped(self._said + self._canvas(response), MOST_COLUMNS)
            self.frames.append(Frame(heading(response), share, lines))
        else:
            self._say(response.reasoning, THOUGHT)
            if response.text and self._said and self._said[-1][1] == THOUGHT:
                self._say("\n---\n", THOUGHT)
            self._say(response.text, SETTLED)
        self._last = response

    def _say(self, text: str, mark: str) -> None:
        self._said += [(character, mark) for character in text]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the picture: whole, or not at all. Raises InputError if that cannot be."""
        try:
            write_whole(Path(path), self.svg())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}; name another place") from None

    def svg(self) -> str:
        """The picture: a frame per step, and the answer for some seconds."""
        if not self.frames:
            raise InputError("no denoising step to draw; give stream_generate drafts=True, in diffusion mode")
        every = -(-len(self.frames) // MOST_FRAMES)
        return _svg(self._question, self.frames[::every], self._closing())

    def _closing(self) -> Frame:
        """The answer; if it is not there yet, the canvas as it is."""
        if self._last.is_draft:
            return self.frames[-1]
        tokens, steps = self._last.generation_tokens, self._last.denoise_forwards
        return Frame(f"{tokens} tokens in {steps} denoising steps", 1.0, wrapped(self._said, MOST_COLUMNS))

    def _canvas(self, response: GenerationResponse) -> Line:
        tokens, accepted = response.draft_tokens, response.draft_accepted
        marked = cells(self._tokenizer, tokens, self._marks(response))
        plain = cells(self._tokenizer, tokens, accepted)
        if [character for character, _ in marked] == [character for character, _ in plain]:
            return marked
        # bytes of one character that were accepted at different steps can only be read together
        return [(character, SETTLED if sure else NOISE) for character, sure in plain]

    def _marks(self, response: GenerationResponse) -> list[str]:
        """Of each token of a canvas."""
        now = list(zip(response.draft_tokens, response.draft_accepted, strict=True))
        before = [(0, False)] * len(now)
        if self._last is not None and self._last.is_draft:  # of the same canvas, then
            before = list(zip(self._last.draft_tokens, self._last.draft_accepted, strict=True))
        return [self._mark(*pair, stays=pair == was) for pair, was in zip(now, before, strict=True)]

    def _mark(self, token: int, accepted: bool, stays: bool) -> str:
        if not accepted:
            return NOISE
        if token in self._special:
            return SPECIAL
        return SETTLED if stays else FRESH


def _svg(question: list[Line], frames: Sequence[Frame], closing: Frame) -> str:
    shown = [frame.lines for frame in (*frames, closing)]
    columns = max(columns_of(_text(line)) for lines in (question, *shown) for line in lines)
    page = _Page(max(columns, LEAST_COLUMNS), len(question) + 1 + max(map(len, shown)))
    pace = int(1000 * min(STEP, (LONGEST - HOLD) / len(frames))) / 1000
    loop = pace * len(frames) + HOLD
    motion = MOTION % {"loop": loop, "step": 100 * pace / loop, "last": 100 * (loop - HOLD) / loop}
    body = [*page.window(), *page.lines(question, 0)]
    for number, frame in enumerate(frames):
        opening = f'<g class="step" style="animation-delay:{number * pace:.3f}s">'
        body += [opening, *page.frame(frame, len(question) + 1), "</g>"]
    body += ['<g class="last">', *page.frame(closing, len(question) + 1), "</g>"]
    title = escape(f"A canvas being denoised: {_text(question[0][1:])}", quote=False)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page.width} {page.height}" width="{page.width}" '
        f'height="{page.height}" role="img" xml:space="preserve">\n'
        f"<title>{title}</title>\n<style>{STYLE}{motion}</style>\n" + "\n".join(body) + "\n</svg>\n"
    )


class _Page:
    """Where things stand; a line that has been drawn before in its place is referred to."""

    def __init__(self, columns: int, rows: int):
        self.width = round(columns * LETTER) + 2 * MARGIN
        self.height = self._y(rows) + 6
        self._drawn: dict[str, str] = {}

    def window(self) -> list[str]:
        lights = [f'<circle cx="{20 + 18 * i}" cy="{BAR // 2}" r="5.5" fill="{c}"/>' for i, c in enumerate(LIGHTS)]
        return [
            f'<rect class="window" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="9"/>',
            f'<path class="bar" d="M1 {BAR}V10a9 9 0 0 1 9-9H{self.width - 10}a9 9 0 0 1 9 9V{BAR}z"/>',
            *lights,
            f'<rect class="track" x="1" y="{BAR}" width="{self.width - 2}" height="2"/>',
        ]

    def frame(self, frame: Frame, row: int) -> list[str]:
        return [
            f'<text class="head" x="{self.width - MARGIN}" y="{BAR // 2 + 4}" text-anchor="end">{frame.head}</text>',
            f'<rect class="share" x="1" y="{BAR}" width="{frame.share * (self.width - 2):.1f}" height="2"/>',
            *self.lines(frame.lines, row),
        ]

    def lines(self, lines: Iterable[Line], row: int) -> list[str]:
        return [self._line(line, row + number) for number, line in enumerate(lines) if line]

    def _line(self, line: Line, row: int) -> str:
        pieces = [(escape(piece, quote=False), mark) for piece, mark in runs(line)]
        text = "".join(f'<tspan class="{mark}">{piece}</tspan>' if mark else piece for piece, mark in pieces)
        content = f'x="{MARGIN}" y="{self._y(row)}">{text}</text>'
        if content in self._drawn:
            return f'<use href="#{self._drawn[content]}"/>'
        name = self._drawn[content] = f"t{len(self._drawn)}"
        return f'<text id="{name}" {content}'

    def _y(self, row: int) -> int:
        """Of the foot of a row's letters."""
        return BAR + MARGIN + LINE * row + 14


def _question(prompt: str) -> list[Line]:
    """The prompt's first lines."""
    lines = wrapped([(character, ASKED) for character in prompt.strip()], MOST_COLUMNS - 2)
    if len(lines) > PROMPT_LINES:
        lines = [*lines[:PROMPT_LINES], [("…", ASKED)]]
    return [[("  " if number else "› ", SPECIAL), *line] for number, line in enumerate(lines)]


def _text(line: Line) -> str:
    return "".join(character for character, _ in line)

"""Responses in a terminal: the answer as it becomes final and, if asked for, the canvas settling."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from .cells import cells, runs, wrapped
from .response import GenerationResponse, heading, statistics

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

RULE = "=" * 10
LONG_PROMPT = 2048  # tokens from which the prompt's progress is worth showing
DIM, PLAIN, UP, CLEAR_BELOW = "\x1b[2m", "\x1b[0m", "\x1b[{}A", "\x1b[J"


def show(
    responses: Iterable[GenerationResponse],
    tokenizer: TokenizerWrapper,
    *,
    verbose: bool = True,
    denoising: bool = False,
) -> str:
    """Print responses as they come; returns the text. `verbose` adds rules and statistics, as mlx_lm does."""
    view = CanvasView(tokenizer) if denoising else None
    text, thinking, last = "", False, None
    if verbose:
        print(RULE)
    for last in responses:
        if last.is_draft:
            if view is not None:
                view.draw(last, text)
            continue
        if view is not None:
            view.erase()
        if last.reasoning:
            print(last.reasoning, end="", flush=True)
            thinking = True
        if last.text:
            print(("\n---\n" if thinking else "") + last.text, end="", flush=True)
            text, thinking = text + last.text, False
    print()
    if verbose and last is not None:
        print(RULE)
        print(statistics(last))
    return text


def is_terminal() -> bool:
    return sys.stdout.isatty()


def prefill_bar() -> Callable[[int, int], None]:
    """A progress callback: a bar on standard error while a long prompt is encoded."""
    from tqdm import tqdm

    bar: tqdm | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total > LONG_PROMPT:
            bar = tqdm(total=total, desc="prompt", unit="token", leave=False, file=sys.stderr)
        if bar is not None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

    return report


class CanvasView:
    """The canvas, redrawn at every step: what is accepted plainly, the rest dimmed.

    Where the output is not a terminal, a line per step.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        self._live = is_terminal()
        self._lines = 0
        self._behind = ""

    def draw(self, response: GenerationResponse, said: str = "") -> None:
        """Show a frame; it takes the place of the unfinished last line of what has been `said` so far."""
        head = f"[{heading(response)}]"
        if not self._live:
            print(head, repr(self._until_end(response.draft_text)))
            return
        self.erase()
        width = shutil.get_terminal_size().columns
        line = said.rpartition("\n")[2]
        self._behind = line[len(line) - len(line) % width :]
        lines = [head[: width - 1], *self._colored(response)]
        print("\r" + CLEAR_BELOW + "\n".join(lines), flush=True)
        self._lines = len(lines)

    def erase(self) -> None:
        if self._lines:
            print(UP.format(self._lines) + "\r" + CLEAR_BELOW + self._behind, end="", flush=True)
            self._lines = 0

    def _until_end(self, text: str) -> str:
        for marker in (self._tokenizer.eos_token, self._tokenizer.pad_token):
            if marker:
                text = text.partition(marker)[0]
        return text

    def _colored(self, response: GenerationResponse) -> list[str]:
        """Lines no wider than the terminal, unsettled characters dimmed."""
        width, height = shutil.get_terminal_size()
        canvas = cells(self._tokenizer, response.draft_tokens, response.draft_accepted)
        return [_styled(line) for line in wrapped(canvas, width - 1)[: max(1, height - 3)]]


def _styled(line: list[tuple[str, bool]]) -> str:
    return "".join(piece if sure else DIM + piece + PLAIN for piece, sure in runs(line))

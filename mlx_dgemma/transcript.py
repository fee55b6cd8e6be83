"""Ids into text as they become final: thinking apart, stop strings cut, no half characters, no markers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


CONTEXT = 8  # ids that are decoded again with the next one


@dataclass(frozen=True)
class Piece:
    """What became readable: of the answer, and of the thinking before it."""

    text: str = ""
    reasoning: str = ""


class Transcript:
    """Consumes ids in order, hands out pieces.

    Args:
        tokenizer: its thinking markers, if it has any, split thinking from answer.
        stop: strings that end the answer; neither they nor what follows is handed out.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: Sequence[str] = ()):
        self._stop = [string for string in stop if string]
        self._special = set(tokenizer.all_special_ids)
        self._opens = tokenizer.think_start_tokens[0] if tokenizer.has_thinking else None
        self._closes = tokenizer.think_end_tokens[-1] if tokenizer.has_thinking else None
        self._tokenizer = tokenizer
        self._answer = _Section(tokenizer)
        self._thoughts: list[_Section] = []
        self._thinking = False
        self._held = ""  # the end of the answer that may turn out to begin a stop string
        self.stopped = False

    def add(self, ids: Iterable[int]) -> Piece:
        """Read more ids; after a stop string has been met, nothing more is handed out."""
        for token in ids:
            if token == self._opens:
                self._thinking = True
                self._thoughts.append(_Section(self._tokenizer, titled=True))
            elif token == self._closes:
                self._thinking = False
            elif token not in self._special:
                (self._thoughts[-1] if self._thinking else self._answer).add(token)
        return self._hand_out(last=False)

    def finish(self) -> Piece:
        """What was still held back."""
        return self._hand_out(last=True)

    def _hand_out(self, last: bool) -> Piece:
        thought = "".join(section.take(last) for section in self._thoughts)
        text = self._answer.take(last)
        if self.stopped:
            return Piece()
        text = self._held + text
        self._held = ""
        cut = min((at for at in map(text.find, self._stop) if at >= 0), default=None)
        if cut is not None:
            self.stopped = True
            return Piece(text[:cut], thought)
        if not last:
            keep = max((_overlap(text, string) for string in self._stop), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        return Piece(text, thought)


class _Section:
    """A run of ids handed out in whole characters; `titled`: its first line is a name and is left out.

    Only the last ids are decoded at every `take`: what stands before a whole character has no say in
    what follows it, but for the space at the beginning, so a few ids stay as context.
    """

    def __init__(self, tokenizer: TokenizerWrapper, titled: bool = False):
        self._tokenizer, self._titled = tokenizer, titled
        self._ids: list[int] = []
        self._read = 0  # ids that have been handed out whole
        self._given = 0  # characters of `_ids` that have been handed out

    def add(self, token: int) -> None:
        self._ids.append(token)

    def take(self, last: bool = False) -> str:
        text = self._tokenizer.decode(self._ids) if self._ids else ""
        whole = text if last else text.rstrip("\ufffd")  # a character whose last bytes are still to come
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if whole == text:
            self._forget()
        return self._without_title(new)

    def _forget(self) -> None:
        """Drop ids that are read, once there are enough behind them."""
        if self._read >= CONTEXT and len(self._ids) > self._read:
            self._ids, self._read = self._ids[self._read :], 0
            self._given = len(self._tokenizer.decode(self._ids))
        if len(self._ids) >= CONTEXT:
            self._read = len(self._ids)

    def _without_title(self, text: str) -> str:
        if not self._titled:
            return text
        _, newline, rest = text.partition("\n")
        self._titled = not newline
        return rest


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that begins `string`."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if string.startswith(text[-n:])), 0)

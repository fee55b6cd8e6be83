"""A canvas as characters in lines, each character with a mark of the token that it comes from."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Mark = TypeVar("Mark")


def cells(tokenizer: TokenizerWrapper, tokens: Sequence[int], marks: Sequence[Mark]) -> list[tuple[str, Mark]]:
    """(character, mark) of a canvas without its pads.

    Neighbours of one mark are decoded together: a character may take several tokens.
    """
    pairs = zip(tokens, marks, strict=True)
    kept = [(token, mark) for token, mark in pairs if token != tokenizer.pad_token_id]
    found: list[tuple[str, Mark]] = []
    for mark, run in groupby(kept, key=lambda pair: pair[1]):
        found += [(character, mark) for character in tokenizer.decode([token for token, _ in run])]
    return found


def wrapped(found: Iterable[tuple[str, Mark]], columns: int) -> list[list[tuple[str, Mark]]]:
    """Lines no wider than so many columns; what cannot be printed is left out."""
    lines: list[list[tuple[str, Mark]]] = [[]]
    used = 0
    for character, mark in found:
        shown = _shown(character)
        wide = columns_of(shown)
        if character == "\n" or used + wide > columns:
            lines.append([])
            used = 0
        if shown:
            lines[-1].append((shown, mark))
            used += wide
    return lines


def runs(line: Iterable[tuple[str, Mark]]) -> list[tuple[str, Mark]]:
    """A line as pieces of one mark each."""
    groups = groupby(line, key=lambda cell: cell[1])
    return [("".join(character for character, _ in run), mark) for mark, run in groups]


def columns_of(text: str) -> int:
    """What a text takes of a grid: two columns a wide character, none an accent."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _shown(character: str) -> str:
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    return character if character.isprintable() else ""

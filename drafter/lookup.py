"""Lookup: what followed the same words before, in the prompt or in the answer, will follow them again.

Prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding), without weights, for whoever
edits, extracts or rewrites. Every pair of neighbouring tokens points to the pair's last occurrence,
and that one to the occurrence before: one dictionary write per token. From there matches are
extended backwards; the longest wins, then the latest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .protocol import NOTHING, Draft, DraftContext

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..model import DiffusionGemma

SHORTEST, LONGEST = 2, 16  # tokens of a match: fewer say nothing, more say nothing new
CANDIDATES = 32  # earlier occurrences that are looked at
PRIOR_WEIGHT = 4.0  # trials that the expectation below is worth


def expected(length: int) -> float:
    """The share of tokens that are right after a match of `length`, before there is experience."""
    return 1 - 0.7**length


class Lookup:
    """A drafter (see `protocol.Drafter`) that needs nothing but the tokens."""

    taps: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._last: dict[tuple[int, int], int] = {}  # a pair of tokens -> where the second last stood
        self._before: list[int] = []  # position -> the position before it of the pair that ends there, or -1
        self._proposed: tuple[int, int, Sequence[int]] | None = None  # (first position, match length, tokens)
        self._right = [0.0] * (LONGEST + 1)  # by match length
        self._tried = [0.0] * (LONGEST + 1)

    def fresh(self) -> Lookup:
        return Lookup()

    def propose(self, context: DraftContext, width: int) -> Draft:
        tokens = context.tokens
        self._learn(tokens)
        self._index(tokens)
        length, end = self._longest_match(tokens)
        if length < SHORTEST or width < 1:
            return NOTHING
        draft: list[int] = []
        for position in range(end + 1, end + 1 + width):  # past the end: the draft itself, a repetition
            draft.append(tokens[position] if position < len(tokens) else draft[position - len(tokens)])
        self._proposed = (len(tokens), length, draft)
        return Draft(draft, [self._confidence(length + i) for i in range(width)])

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in tokens that are new; the pair that ends at the last one is what is looked up, not found."""
        for position in range(len(self._before), len(tokens)):
            pair = (tokens[position - 1], tokens[position]) if position else (-1, tokens[0])
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = position

    def _longest_match(self, tokens: Sequence[int]) -> tuple[int, int]:
        """(length, last position) of the earlier occurrence that shares most with the end; (0, -1): none."""
        last = len(tokens) - 1
        best, best_end = 0, -1
        end = self._before[last]
        for _ in range(CANDIDATES):
            if end < 0 or best == LONGEST:
                break
            length = SHORTEST
            while length < LONGEST and length <= end and tokens[end - length] == tokens[last - length]:
                length += 1
            if length > best:
                best, best_end = length, end
            end = self._before[end]
        return best, best_end

    def _learn(self, tokens: Sequence[int]) -> None:
        """Compare what was proposed last with what came."""
        if self._proposed is None:
            return
        (first, length, draft), self._proposed = self._proposed, None
        for i, (guess, token) in enumerate(zip(draft, tokens[first:], strict=False)):
            kind = min(length + i, LONGEST)
            self._tried[kind] += 1
            self._right[kind] += guess == token
            if guess != token:
                return

    def _confidence(self, length: int) -> float:
        kind = min(length, LONGEST)
        return (PRIOR_WEIGHT * expected(kind) + self._right[kind]) / (PRIOR_WEIGHT + self._tried[kind])


def make(model: DiffusionGemma, argument: str | None) -> Lookup:
    return Lookup()

"""Lookup against a search by brute force, and what it costs."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from mlx_dgemma.drafter.lookup import CANDIDATES, LONGEST, Lookup
from mlx_dgemma.drafter.protocol import Draft, DraftContext


def context(tokens: Sequence[int]) -> DraftContext:
    return DraftContext(tokens, None, None, None)


def propose(tokens: Sequence[int], width: int = 4, lookup: Lookup | None = None) -> Draft:
    return (lookup or Lookup()).propose(context(tokens), width)


def drafted(tokens: Sequence[int], width: int = 4, lookup: Lookup | None = None) -> list[int]:
    return list(propose(tokens, width, lookup).tokens)


def search(tokens: list[int], width: int) -> tuple[int, list[int]]:
    """(match length, draft) by comparing the end with every earlier place, the latest first."""
    best, best_end, looked_at = 0, -1, 0
    for end in range(len(tokens) - 2, 0, -1):
        length = 0
        while length < min(LONGEST, end + 1) and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length < 2 or looked_at == CANDIDATES:
            continue
        looked_at += 1
        if length > best:
            best, best_end = length, end
    if best_end < 0:
        return 0, []
    text = list(tokens)
    for i in range(width):
        text.append(text[best_end + 1 + i])
    return best, text[len(tokens) :]


@pytest.mark.parametrize("letters", [1, 2, 3, 6, 10])
def test_proposals_are_those_of_a_search(letters):
    """Fed token by token, several at once, and all at once."""
    chance = random.Random(letters)
    found = 0
    for _ in range(20):
        tokens = [chance.randrange(letters) for _ in range(chance.randrange(1, 90))]
        lookup = Lookup()
        for end in range(1, len(tokens) + 1):
            if chance.random() < 0.3 and end < len(tokens):
                continue
            width = chance.randrange(1, 9)
            length, expected = search(tokens[:end], width)
            assert drafted(tokens[:end], width, lookup) == drafted(tokens[:end], width) == expected
            found += length > 2
    assert found > 5


def test_the_longest_match_wins_then_the_latest():
    assert drafted([1, 2, 3, 70, 9, 2, 3, 80, 1, 2, 3], 1) == [70]
    assert drafted([1, 2, 3, 70, 1, 2, 3, 80, 1, 2, 3], 1) == [80]
    assert drafted([4, 1, 2, 3, 70, 5, 1, 2, 3, 80, 4, 1, 2, 3], 1) == [70]


def test_a_match_of_more_than_the_longest_is_as_good_as_the_longest():
    run = list(range(100, 100 + LONGEST))
    assert drafted([1, 2, *run, 70, 3, 2, *run, 80, 1, 2, *run], 1) == [80]
    assert drafted([1, 2, *run[1:], 70, 3, 2, *run[1:], 80, 1, 2, *run[1:]], 1) == [80]
    assert drafted([2, *run[1:], 70, 3, *run[1:], 80, 2, *run[1:]], 1) == [70]


def test_only_the_latest_places_are_looked_at():
    near = [1, 2, 50] * CANDIDATES
    assert drafted([7, 1, 2, 60, *near[3:], 7, 1, 2], 1) == [60]
    assert drafted([7, 1, 2, 60, *near, 7, 1, 2], 1) == [50]


def test_one_token_is_no_match():
    for tokens in ([1], [1, 1], [1, 2, 3, 1], [5, 1, 2, 5, 3, 5], [0], [0, 0], [2, 0, 1, 0]):
        assert propose(tokens).tokens == ()


def test_a_draft_goes_on_past_the_end_as_a_repetition():
    assert drafted([1, 1, 1], 5) == [1] * 5
    assert drafted([9, 1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1]
    assert drafted([9, 4, 5, 6, 4, 5], 8) == [6, 4, 5, 6, 4, 5, 6, 4]


@pytest.mark.parametrize("width", [0, 1, 3, 16])
def test_the_width_is_kept(width):
    draft = propose([1, 2, 3, 1, 2], width)
    assert len(draft.tokens) == width
    assert width == 0 or len(draft.confidences) == width


def test_confidence_rises_with_the_length_of_the_match():
    run = list(range(10, 40))
    firsts = []
    for length in range(2, LONGEST + 1):
        confidences = propose([*run[:length], 70, *run[:length]]).confidences
        assert all(0 < a <= b < 1 for a, b in pairwise(confidences))
        firsts.append(confidences[0])
    assert all(a < b for a, b in pairwise(firsts))
    assert firsts[0] < 0.6 < firsts[5]


def experienced(right: bool, times: int = 6) -> Lookup:
    """A lookup whose matches of two tokens were followed by what it drafted, or never were."""
    lookup, tokens = Lookup(), []
    for i in range(times):
        tokens += [1000 + 3 * i, 1, 2, 3] if not tokens else [1000 + 3 * i, 1, 2]
        if i:
            guess = lookup.propose(context(tokens), 1).tokens
            assert len(guess) == 1
            tokens.append(guess[0] if right else 2000 + i)
    lookup.propose(context([*tokens, 5000]), 1)
    return lookup


def test_confidence_follows_experience():
    expected = propose([1, 2, 3, 1, 2]).confidences[0]
    after = [experienced(right)._confidence(2) for right in (False, True)]
    assert after[0] < 0.6 * expected < expected < after[1]
    assert experienced(False)._confidence(9) == Lookup()._confidence(9), "other lengths have not been tried"
    assert experienced(False, 3)._confidence(2) > after[0]


def test_a_wrong_draft_says_nothing_about_those_behind_it():
    lookup = Lookup()
    tokens = [1, 2, 3, 4, 5, 1, 2]
    assert drafted(tokens, 3, lookup) == [3, 4, 5]
    lookup.propose(context([*tokens, 99, 4, 5]), 3)
    assert lookup._confidence(2) < Lookup()._confidence(2)
    assert lookup._confidence(3) == Lookup()._confidence(3)


class Counted(Sequence):
    """Tokens that count how many of them are looked at."""

    def __init__(self, tokens):
        self._tokens, self.looked_at = tokens, 0

    def __len__(self):
        return len(self._tokens)

    def __getitem__(self, key):
        found = self._tokens[key]
        self.looked_at += len(found) if isinstance(key, slice) else 1
        return found


@pytest.mark.parametrize("letters", [1, 2, 50])
def test_a_token_is_indexed_once(letters):
    """Work grows as the text does; behind any text, another token costs the same few looks."""
    chance = random.Random(0)
    text = [chance.randrange(letters) for _ in range(4100)]
    per_search = CANDIDATES * 2 * LONGEST
    work = []
    for count in (1000, 2000, 4000):
        lookup, tokens = Lookup(), Counted(text[:count])
        lookup.propose(context(tokens), 4)
        work.append(tokens.looked_at)
        for end in range(count + 1, count + 101):
            tokens = Counted(text[:end])
            lookup.propose(context(tokens), 4)
            assert tokens.looked_at <= per_search + 20
        assert len(lookup._before) == count + 100
    assert work[1] <= 2 * work[0] + per_search
    assert work[2] <= 2 * work[1] + per_search
    assert work[2] <= 2 * 4000 + per_search


def test_reset_and_fresh_forget_everything():
    tokens = [1, 2, 3, 1, 2]
    used = experienced(False)
    fresh = used.fresh()
    assert fresh is not used
    assert propose(tokens, 4, fresh) == propose(tokens)
    used.reset()
    assert propose(tokens, 4, used) == propose(tokens)
    assert drafted([2, 1], 4, used.fresh()) == []
    fresh.propose(context([7, 8, 9, 7, 8]), 4)
    other = fresh.fresh()
    assert drafted([7, 8], 4, other) == [], "an object of another request knows nothing of this one"

"""Mistakes that the tests of losslessness must notice."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_dgemma.cache import PrefixCache
from mlx_dgemma.decoding import causal
from mlx_dgemma.draws import Draws
from mlx_dgemma.layers import Pass
from tests.decoding.runs import (
    GREEDY,
    LONG,
    WARM,
    Scripted,
    guess,
    plain,
    run,
)


def short_rollback(monkeypatch):
    own = PrefixCache.rollback
    monkeypatch.setattr(PrefixCache, "rollback", lambda self, count: own(self, max(0, count - 1)))


def long_rollback(monkeypatch):
    own = PrefixCache.rollback
    monkeypatch.setattr(PrefixCache, "rollback", lambda self, count: own(self, count + (count > 0)))


def wrong_positions(monkeypatch):
    """Blocks behind a prefix are rotated one position further."""
    own = Pass.__init__

    def init(self, cache, window, queries, causal):
        own(self, cache, window, queries, causal)
        self.offset += causal and queries > 1 and cache.length > 0

    monkeypatch.setattr(Pass, "__init__", init)


def wrong_mask(monkeypatch):
    """Each position of a block sees the one after it."""
    own = Pass.sliding_mask

    def mask(self, keys):
        if self.queries == 1 or self.offset == 0 or not self.causal:
            return own(self, keys)
        distance = mx.arange(keys - self.queries, keys)[:, None] - mx.arange(keys)[None]
        return (distance >= -1) & (distance < self.window)

    monkeypatch.setattr(Pass, "sliding_mask", mask)


def wide_window(monkeypatch):
    """Each position of a block sees one more position than the window holds."""
    own = Pass.sliding_mask

    def mask(self, keys):
        if self.queries == 1 or self.offset == 0 or not self.causal:
            return own(self, keys)
        distance = mx.arange(keys - self.queries, keys)[:, None] - mx.arange(keys)[None]
        return (distance >= 0) & (distance < self.window + 1)

    monkeypatch.setattr(Pass, "sliding_mask", mask)


def one_accepted_too_many(monkeypatch):
    own = causal.agreement
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: min(own(draft, samples) + 1, len(draft)))


def encoded_twice(monkeypatch):
    """The token that follows a block is encoded at once, and again with the next block."""
    own = causal.Verifier.launch

    def launch(self, block, *arguments):
        if block.size > 1:
            self._model.encode(block[None, :1], self._cache)
        return own(self, block, *arguments)

    monkeypatch.setattr(causal.Verifier, "launch", launch)


def draws_by_width(monkeypatch):
    own = Draws.next_token
    monkeypatch.setattr(Draws, "next_token", lambda self, first, length: own(self, first + length - 1, length))


def draws_by_step(monkeypatch):
    """All rows of a block draw as its first."""
    own = causal.Verifier.choose

    def choose(self, logits, first):
        return mx.concatenate([own(self, logits[i : i + 1], first) for i in range(len(logits))])

    monkeypatch.setattr(causal.Verifier, "choose", choose)


def penalty_without_drafts(monkeypatch):
    """Every row of a block looks at what the first one sees."""
    own = causal.recent

    def recent(known, block, config):
        seen = own(known, block, config)
        return None if seen is None else mx.broadcast_to(seen[:1], seen.shape)

    monkeypatch.setattr(causal, "recent", recent)


def penalty_with_later_drafts(monkeypatch):
    """Every row of a block looks at what the last one sees."""
    own = causal.recent

    def recent(known, block, config):
        seen = own(known, block, config)
        return None if seen is None else mx.broadcast_to(seen[-1:], seen.shape)

    monkeypatch.setattr(causal, "recent", recent)


PENALISED = GREEDY.replace(repetition_penalty=2.0, repetition_context_size=12)
MISTAKES = {  # mistake -> a case that it must break: configuration, drafts that are right, width
    short_rollback: (GREEDY, 0, 3),
    long_rollback: (GREEDY, 0, 3),
    wrong_positions: (GREEDY, None, 5),
    wrong_mask: (GREEDY, None, 5),
    wide_window: (GREEDY, None, 5),
    one_accepted_too_many: (GREEDY, 1, 3),
    encoded_twice: (GREEDY, 2, 3),
    draws_by_width: (WARM, 2, 3),
    draws_by_step: (WARM, None, 3),
    penalty_without_drafts: (PENALISED, None, 5),
    penalty_with_later_drafts: (PENALISED, None, 5),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(monkeypatch, model, mistake):
    config, right, width = MISTAKES[mistake]
    expected = plain(model, LONG, config)

    def check():
        drafter = Scripted(guess(expected.text, right))
        done = run(model, LONG, config, drafter=drafter, width=width)
        assert done.ids == expected.ids

    check()
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check()

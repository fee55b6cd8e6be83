"""What a drafter is told: every token once, its features, and how the loop draws."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import pytest

from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.model import Taps
from tests.decoding.runs import (
    GREEDY,
    LONG,
    SHORT,
    VOCAB,
    WARM,
    Hearing,
    Scripted,
    assert_lossless,
    cases,
    guess,
    plain,
    run,
)


class Scheduled(Widths):
    """Asks for widths[context % len(widths)], and verifies all, or `verified` of it."""

    def __init__(self, widths: Sequence[int], verified: int = 99):
        super().__init__(Costs())
        self._schedule, self._verified = widths, verified

    def ask(self, context, room):
        return min(room, self._schedule[context % len(self._schedule)])

    def verify(self, context, draft):
        return min(self._verified, len(draft.tokens))


@pytest.mark.parametrize("taps", [(), (1,), (1, 0)])
@pytest.mark.parametrize("schedule", [[3], [0, 0, 4], [0, 2, 0, 0, 1], [16], [5, 0]], ids=str)
def test_extend_hears_every_token_once_with_its_features(model, taps, schedule):
    for prompt, right, verified in [(SHORT, None, 99), (LONG, 2, 99), (LONG, 0, 99), (SHORT, None, 2), ([7], 1, 99)]:
        text = plain(model, prompt, WARM).text
        drafter = Hearing(guess(text, right), taps)
        done = run(model, prompt, WARM, drafter=drafter, widths=Scheduled(schedule, verified), prefill_step=4)
        assert done.text == text
        assert done.counts.drafter_failure is None, "what it had heard differed from what was encoded"
        assert drafter.known_when_asked
        assert drafter.heard == text[: len(drafter.heard)]
        if not taps:
            assert all(features is None for features in drafter.features)
            continue
        tapped = Taps(taps)
        model.encode(mx.array([drafter.heard]), model.make_cache(), tapped)
        heard = mx.concatenate(drafter.features, axis=1)
        assert heard.shape == (1, len(drafter.heard), len(taps) * model.config.hidden_size)
        assert mx.allclose(heard, tapped.features, rtol=1e-3, atol=1e-3)


def test_steps_launched_ahead_change_nothing(model):
    for prompt, config, seed in cases():
        text = plain(model, prompt, config, seed).text
        for schedule, right in [([0, 3], 1), ([0, 0, 0, 5], None), ([2, 0, 0], 0)]:
            assert_lossless(model, Scripted(guess(text, right)), prompt, config, seed, widths=Scheduled(schedule))


def test_context_is_what_the_protocol_says(model):
    seen = []

    def look(context, width):
        seen.append((list(context.tokens), context.tokens[-1], len(context.tokens), context.cache.length, width))
        assert context.model is model
        fresh = model.make_cache()
        prefill(model, context.tokens[:-1], fresh)
        canvas = mx.arange(5)[None]
        here, there = (model.denoise_hidden(canvas, cache) for cache in (context.cache, fresh))
        assert mx.allclose(here, there, rtol=1e-4, atol=1e-4)
        return guess(text, 1)(context, width)

    text = plain(model, SHORT).text
    done = assert_lossless(model, Scripted(look), SHORT, GREEDY, width=4)
    assert done.counts.drafter_failure is None
    for tokens, last, count, cached, width in seen:
        assert tokens == text[:count]
        assert (last, cached) == (text[count - 1], count - 1)
        assert width == min(4, len(text) - count - 1), "no more than could be kept"


class Twin(Scripted):
    """Drafts with the main model itself, behind a cache of its own, by the loop's own draws."""

    def __init__(self, model):
        super().__init__(self._think)
        self._model, self._cache, self._known = model, model.make_cache(), []

    def _think(self, context, width):
        new = list(context.tokens)
        shared = next((i for i, (a, b) in enumerate(zip(self._known, new, strict=False)) if a != b), len(self._known))
        shared = min(shared, len(new) - 1)
        self._cache.rollback(self._cache.length - shared)
        block, draft = new[shared:], []
        for _ in range(width):
            logits = self._model.logits(self._model.encode(mx.array([block]), self._cache))[0, -1:]
            draft.append(context.sample(logits, len(new) + len(draft)).item())
            block = draft[-1:]
        self._known = (new + draft)[: self._cache.length]
        return Draft(draft)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_a_drafter_that_shares_the_draws_is_always_right(model, width):
    for prompt, config, seed in cases():
        counts = assert_lossless(model, Twin(model), prompt, config, seed, width=width).counts
        assert counts.drafter_failure is None
        assert counts.accepted == counts.drafted > 0


def test_sample_takes_a_block_as_it_takes_its_rows(model):
    sampled = []

    def sample(context, width):
        z, first = mx.random.normal((6, VOCAB), key=mx.random.key(4)), len(context.tokens)
        sampled.append(context.sample(z, first).tolist())
        sampled.append([context.sample(z[i : i + 1], first + i).item() for i in range(6)])
        return Draft(())

    for config in (GREEDY, WARM):
        assert run(model, SHORT, config, drafter=Scripted(sample), width=2).counts.drafter_failure is None
    assert sampled[::2] == sampled[1::2]
    assert len({tuple(ids) for ids in sampled}) > 10

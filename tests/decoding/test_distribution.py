"""Sampled tokens follow the model's distribution, with and without drafts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.cache import PrefixCache
from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.draws import Draws
from mlx_dgemma.filters import shape
from tests.decoding.runs import (
    LAYERS,
    WARM,
    Scripted,
    lively_model,
    run,
)
from tests.helpers import with_text

VOWELS = 11  # a vocabulary small enough to count


def exact(logits: mx.array, config: GenerationConfig) -> np.ndarray:
    """Probabilities (..., V) by the definition of each filter, in float64."""
    z = np.array(logits, np.float64) / config.temperature
    shares = np.exp(z - z.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    order = np.argsort(-shares, axis=-1)
    ranks = np.argsort(order, axis=-1)
    if config.top_k:
        shares = np.where(ranks < config.top_k, shares, 0)
        shares /= shares.sum(-1, keepdims=True)
    ordered = np.take_along_axis(shares, order, -1)
    above = np.take_along_axis(np.cumsum(ordered, -1) - ordered, ranks, -1)
    shares = np.where(above < config.top_p, shares, 0)
    return shares / shares.sum(-1, keepdims=True)


def misfit(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Chi-square of counts (..., V) against probabilities, and its 99.9 % quantile (Wilson-Hilferty).

    Cells of fewer than five expected counts are taken together, row by row.
    """
    assert not observed[expected == 0].any(), "what a filter forbids was drawn"
    expected = expected * observed.sum(-1, keepdims=True)
    statistic, freedom = 0.0, 0
    for counts, wanted in zip(np.atleast_2d(observed), np.atleast_2d(expected), strict=True):
        rare = wanted < 5
        cells = [*zip(counts[~rare], wanted[~rare], strict=True), (counts[rare].sum(), wanted[rare].sum())]
        cells = [(count, want) for count, want in cells if want > 1]
        statistic += sum((count - want) ** 2 / want for count, want in cells)
        freedom += max(0, len(cells) - 1)
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.0902 * spread**0.5) ** 3


FILTERS = {
    "unfiltered": WARM.replace(top_k=0, top_p=1.0),
    "top-k": WARM.replace(top_k=5, top_p=1.0),
    "top-p": WARM.replace(top_k=0, top_p=0.7),
    "both": WARM.replace(top_k=6, top_p=0.8),
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name):
    config, count = FILTERS[name], 4000
    logits = mx.random.normal((1, VOWELS), key=mx.random.key(2)) * 1.5
    draw = Draws(range(count), VOWELS).next_token(7, 1)
    draw.add(mx.broadcast_to(shape(logits, config)[None], (count, 1, VOWELS)), 0)
    observed = np.bincount(np.array(draw.ids).ravel(), minlength=VOWELS)
    statistic, quantile = misfit(observed, exact(logits[0], config))
    assert statistic < quantile
    statistic, quantile = misfit(observed, exact(logits[0], FILTERS["unfiltered"].replace(temperature=0.9)))
    assert statistic > quantile, "a temperature that is a little off is noticed"


class Chain:
    """Stands in for the model: what follows depends on the last token alone, by a table of logits."""

    def __init__(self):
        self.config = ModelConfig.from_dict(with_text(vocab_size=VOWELS, max_position_embeddings=1 << 16))
        self.table = mx.random.normal((VOWELS, VOWELS), key=mx.random.key(6))
        self.layers = self.config.layers

    def make_cache(self):
        return PrefixCache(self.config.windows)

    def encode(self, ids, cache, taps=None):
        rows = mx.zeros((1, 1, ids.shape[1], 1))
        for layer in cache.layers:
            layer.extend(rows, rows)
        return ids[..., None]

    def logits(self, hidden):
        return self.table[hidden[..., 0]]


def likeliest(context, width):
    """The greedy continuation in a chain."""
    draft, table = [context.tokens[-1]], np.array(context.model.table)
    for _ in range(width):
        draft.append(int(table[draft[-1]].argmax()))
    return Draft(draft[1:])


@pytest.mark.parametrize(
    ("drafter", "name"),
    [*(("none", name) for name in FILTERS), ("likeliest", "unfiltered"), ("likeliest", "both"), ("lookup", "both")],
)
def test_a_long_text_follows_the_distribution(drafter, name):
    """2,000 tokens of a chain: from each token, the next ones as often as they should."""
    chain, config = Chain(), FILTERS[name].replace(max_new_tokens=2000)
    made = {"none": None, "likeliest": Scripted(likeliest), "lookup": Lookup()}[drafter]
    done = run(chain, [4], config, seed=11, drafter=made, width=3)
    assert done.counts.drafter_failure is None
    observed = np.zeros((VOWELS, VOWELS))
    np.add.at(observed, (done.text[:-1], done.text[1:]), 1)
    statistic, quantile = misfit(observed, exact(chain.table, config))
    assert statistic < quantile
    statistic, quantile = misfit(observed, exact(chain.table, FILTERS["unfiltered"].replace(temperature=1.0)))
    assert statistic > quantile
    if made is not None:
        assert done.counts.accepted > 300


def test_the_second_token_follows_the_distribution():
    """Of the real model, over seeds, where the first one is drafted, and right in about half of them."""
    model, count = lively_model(vocab_size=VOWELS, num_hidden_layers=1, layer_types=LAYERS[1:]), 2000
    config, prompt = FILTERS["top-k"].replace(max_new_tokens=2), [3, 9, 4]
    first = exact(model.logits(model.encode(mx.array([prompt]), model.make_cache())[:, -1])[0], config)
    behind = mx.array([[*prompt, token] for token in range(VOWELS)])
    second = exact(model.logits(model.encode(behind, model.make_cache())[:, -1]), config)
    cache, drafter = model.make_cache(), Scripted(lambda context, width: Draft([int(first.argmax())]))
    pairs, accepted = np.zeros((VOWELS, VOWELS)), 0
    for seed in range(count):
        cache.rollback(max(0, cache.length - 2))
        done = run(model, prompt, config, seed, cache=cache, drafter=drafter, width=1)
        pairs[tuple(done.ids)] += 1
        accepted += done.counts.accepted
    assert count / 5 < accepted < count * 4 / 5
    for observed, expected in [(pairs.sum(1), first), (pairs.sum(0), first @ second), (pairs, second)]:
        statistic, quantile = misfit(observed, expected)
        assert statistic < quantile
        assert misfit(np.roll(observed, 1, axis=-1) * (expected > 0), expected)[0] > quantile

"""What a block sees in training is what it sees when it drafts; the loss; where gradients go."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.drafter.network import Behind
from mlx_dgemma.drafter.training.anchors import Anchored, Blocks, loss, main_shares, observe, run, weights
from tests.drafter.training.small import FAMILIES, KINDS, random_network, random_text, small_config

PROMPT, ANSWER = random_text(9, 1), random_text(23, 2)
IDS = PROMPT + ANSWER


def as_drafted(network, model, text, anchor):
    """Logits (K, V) of a block at an anchor, in the way of `Block.propose`: chunks into a cache, then `Behind`."""
    config, cache = network.config, network.make_cache()
    for first in range(0, anchor, 4):
        network.extend(text.features[:, first : min(first + 4, anchor)], cache)
    block = mx.array([[IDS[anchor], *[config.mask_token_id] * (config.positions - 1)]])
    hidden = network.hidden(model.embed(block), anchor, Behind(cache, config))
    return model.logits(network.predicting(hidden))[0]


def in_training(network, model, text, anchors):
    blocks = Blocks.of(text.ids, np.array(anchors), network.config.drafts)
    logits, _ = run(network, model, text, blocks, network.context(text.features, 0))
    if network.config.markov_rank is not None:  # has its own test
        before = network.markov_head.before(mx.array(blocks.before))
        logits = logits - network.markov_head.correction(before)
    return logits


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_see_in_training_what_they_see_when_they_draft(family, kinds, tiny):
    config = small_config(kinds=KINDS[kinds], **FAMILIES[family])
    network, text = random_network(config), observe(tiny, PROMPT, ANSWER, config.taps)
    assert list(text.places) == list(range(len(PROMPT) - 1, len(IDS) - 1))
    together = in_training(network, tiny, text, text.places)
    for logits, anchor in zip(together, text.places, strict=True):
        assert mx.abs(logits - as_drafted(network, tiny, text, int(anchor))).max().item() < 1e-5
    few = in_training(network, tiny, text, text.places[3:17:4])
    assert mx.abs(few - together[3:17:4]).max().item() < 1e-5


@pytest.mark.parametrize("shift", [-1, 1])  # one row fewer; the anchor's own features
def test_a_context_that_is_off_by_one_is_seen(shift, tiny, monkeypatch):
    config = small_config()
    network, text = random_network(config), observe(tiny, PROMPT, ANSWER, config.taps)
    right = in_training(network, tiny, text, text.places[:8])
    seen = Anchored._seen

    def moved(self, window, length):
        anchors, self._anchors = self._anchors, self._anchors + shift
        try:
            return seen(self, window, length)
        finally:
            self._anchors = anchors

    monkeypatch.setattr(Anchored, "_seen", moved)
    wrong = in_training(network, tiny, text, text.places[:8])
    assert mx.abs(right - wrong).max(axis=(1, 2)).min().item() > 1e-2


def test_a_window_that_is_off_by_one_is_seen(tiny):
    network = random_network(small_config())
    text = observe(tiny, PROMPT, ANSWER, network.config.taps)
    right = in_training(network, tiny, text, text.places)
    network.config = dataclasses.replace(network.config, sliding_window=8)
    assert mx.abs(right - in_training(network, tiny, text, text.places)).max().item() > 1e-3


def test_each_draft_is_told_the_token_before_it(tiny):
    network = random_network(small_config(**FAMILIES["dspark"]))
    text = observe(tiny, PROMPT, ANSWER, network.config.taps)
    blocks, rows = Blocks.of(text.ids, text.places, network.config.drafts), network.context(text.features, 0)
    logits, confidence = run(network, tiny, text, blocks, rows)
    w1, w2 = network.markov_head.markov_w1.weight, network.markov_head.markov_w2.weight
    for row, draft in ((0, 0), (0, 3), (5, 1)):
        anchor = int(text.places[row])
        correction = w1[IDS[anchor + draft]] @ w2.T
        expected = as_drafted(network, tiny, text, anchor)[draft] + correction
        assert mx.abs(logits[row, draft] - expected).max().item() < 1e-5
    assert confidence.shape == (len(text.places), network.config.drafts)


def test_targets_and_weights():
    blocks = Blocks.of(np.array(IDS), np.array([8, len(IDS) - 3]), 4)
    assert blocks.targets[0].tolist() == IDS[9:13] and blocks.before[0].tolist() == IDS[8:12]
    assert blocks.targets[1, :2].tolist() == IDS[-2:]
    np.testing.assert_allclose(blocks.weights[0], np.exp(-np.arange(4) / 4), rtol=1e-6)
    np.testing.assert_allclose(blocks.weights[1], [1, np.exp(-0.25), 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(weights(len(IDS), blocks.anchors, 4), blocks.weights)


def test_the_main_models_distribution_is_that_of_ar_mode(tiny):
    text = observe(tiny, PROMPT, ANSWER, (0,))
    blocks = Blocks.of(text.ids, np.array([8, 12, 30]), 4)
    logits = tiny.logits(tiny.encode(mx.array([IDS]), tiny.make_cache()))[0]
    expected = mx.softmax(logits, axis=-1)
    shares = main_shares(tiny, text, blocks)
    for row, anchor in enumerate(blocks.anchors.tolist()):
        for draft in range(4):
            if anchor + draft + 1 < len(IDS):
                assert mx.abs(shares[row, draft] - expected[anchor + draft]).max().item() < 1e-6


@pytest.mark.parametrize("with_confidence", [False, True])
def test_loss_against_numpy(with_confidence):
    rng = np.random.default_rng(3)
    logits, main = rng.normal(size=(2, 2, 3, 7)).astype(np.float32)
    said = rng.normal(size=(2, 3)).astype(np.float32)
    targets, weights = rng.integers(0, 7, (2, 3)), np.array([[1, 0.7, 0.5], [1, 0.7, 0]], np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (main, logits))
    expected = 0.0
    for row in range(2):
        for k in range(3):
            tv = 0.5 * np.abs(p[row, k] - q[row, k]).sum()
            term = 0.1 * -np.log(q[row, k, targets[row, k]]) + 0.9 * tv
            if with_confidence:
                sure = 1 / (1 + np.exp(-said[row, k]))
                term += -((1 - tv) * np.log(sure) + tv * np.log(1 - sure))
            expected += weights[row, k] * term
    blocks = Blocks(np.zeros(2), targets, targets, weights)
    confidence = mx.array(said) if with_confidence else None
    value, accepted = loss(mx.array(logits), confidence, mx.array(p), blocks)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(accepted, (1 - 0.5 * np.abs(p - q).sum(-1)) * (weights > 0), rtol=1e-5)

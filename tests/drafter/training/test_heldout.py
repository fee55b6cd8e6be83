"""What is measured is what the drafter drafts."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.cache import CacheReader
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.drafter.training.anchors import observe
from mlx_dgemma.drafter.training.heldout import measure
from mlx_dgemma.errors import InputError
from tests.drafter.training.small import FAMILIES, random_network, random_text, small_config


def greedy(logits, first):
    return mx.argmax(logits, axis=-1).astype(mx.int32)


def drafted(network, model, ids, text, anchor):
    """What `Block` proposes behind tokens [0, anchor]."""
    drafter = Block(network, Head(model))
    drafter.extend(ids[:anchor], text.features[:, :anchor])
    context = DraftContext(ids[: anchor + 1], CacheReader(model.make_cache()), model, greedy)
    return list(drafter.propose(context, network.config.drafts).tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_accepted_length_is_that_of_the_drafter(family, tiny):
    network = random_network(small_config(**FAMILIES[family]))
    if network.config.markov_rank is not None:  # so that it reorders the best candidates, as a trained one does
        network.markov_head.markov_w2.weight = 0.1 * network.markov_head.markov_w2.weight
    prompt, ids = random_text(7), random_text(7)
    for _ in range(6):  # an answer of which about a half is what it drafts
        text = observe(tiny, prompt, [*ids[7:], 11, 11], network.config.taps)
        ids += [*drafted(network, tiny, ids, text, len(ids) - 1)[:2], 20 + len(ids)]
    text, drafts = observe(tiny, prompt, ids[7:], network.config.taps), network.config.drafts
    runs = []
    for anchor in text.places.tolist():
        pairs = zip(drafted(network, tiny, ids, text, anchor), ids[anchor + 1 :], strict=False)
        runs.append(int(np.cumprod([guess == token for guess, token in pairs]).sum()))
    assert sum(runs) > 5
    accepted = measure(network, tiny, [text], 1e9)
    assert accepted.places == len(runs) == len(ids) - 7
    expected = [np.mean(np.minimum(runs, width)) for width in range(1, drafts + 1)]
    np.testing.assert_allclose(accepted.lengths, expected, atol=1e-9)
    left = len(ids) - 1 - text.places
    np.testing.assert_allclose(accepted.most, [np.minimum(left, width).mean() for width in range(1, drafts + 1)])
    network.norm.weight = network.norm.weight * float("nan")
    with pytest.raises(InputError, match="logits are not finite; lower --lr"):
        measure(network, tiny, [text], 1e9)


def test_a_block_at_a_time(tiny):
    network = random_network(small_config())
    text = observe(tiny, random_text(7), random_text(9, 3), network.config.taps)
    accepted = measure(network, tiny, [text], 1e9)
    small = measure(network, tiny, [text], 1)  # a block at a time
    np.testing.assert_allclose(small.lengths, accepted.lengths)

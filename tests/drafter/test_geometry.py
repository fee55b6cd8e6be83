"""The geometry of a new drafter follows the published one, which drafts for thirty layers."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_dgemma.config import FULL, SLIDING, ModelConfig
from mlx_dgemma.drafter.block import make
from mlx_dgemma.drafter.format import parse
from mlx_dgemma.drafter.geometry import LARGEST, LIMITS, BlockConfig
from mlx_dgemma.errors import InputError
from tests.decoding.runs import GREEDY, assert_lossless
from tests.drafter.files import PUBLISHED, REDUCED, random_network, write
from tests.helpers import random_model, with_text


def test_the_default_geometry_is_the_published_one():
    raw = with_text(num_hidden_layers=30, layer_types=None, hidden_size=2816, vocab_size=262_144)
    raw["text_config"]["max_position_embeddings"] = 262_144
    config = ModelConfig.from_dict(raw)
    assert BlockConfig.for_model(config) == parse(PUBLISHED)


@pytest.mark.parametrize("layers", range(1, 12))
@pytest.mark.parametrize("taps", [1, 2, 6])
def test_default_taps_are_layers_in_order(layers, taps):
    model = ModelConfig.from_dict(with_text(num_hidden_layers=layers, layer_types=None))
    config = BlockConfig.for_model(model, num_taps=taps)  # or it would raise
    assert len(config.taps) == min(taps, layers)
    first, last = (1, layers - 3) if layers - 3 >= taps else (0, layers - 1)
    assert config.taps[0] == first
    assert config.taps[-1] == (last if len(config.taps) > 1 else first)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"positions": LIMITS["block_size"] + 1}, "block_size must be a whole number in 0-4096, not 4097"),
        ({"positions": 1}, "a block of 1 positions holds no draft"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number in 1-1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"intermediate_size": LARGEST + 1}, "intermediate_size must be"),
        ({"intermediate_size": 36.0}, "intermediate_size must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be"),
        ({"sliding_window": LARGEST + 1}, "sliding_window must be"),
        ({"draft_window": 0}, "draft_window_size must be"),
        ({"markov_rank": LARGEST + 1}, "markov_rank must be"),
    ],
)
def test_a_new_drafter_obeys_the_same_limits(tiny, sizes, said):
    with pytest.raises(InputError) as error:
        BlockConfig.for_model(tiny.config, **sizes)
    assert str(error.value).startswith("the drafter's sizes: ")
    assert said in str(error.value)


def test_the_published_geometry_drafts_for_thirty_layers(tmp_path):
    kinds = [FULL if index % 6 == 5 else SLIDING for index in range(30)]
    model = random_model(with_text(num_hidden_layers=30, layer_types=kinds), seed=1)
    network = random_network(REDUCED)
    write(network, tmp_path / "drafter", mx.float32)
    drafter = make(model, str(tmp_path / "drafter"))
    assert drafter.taps == (1, 6, 11, 17, 22, 27)
    assert drafter.network.config == network.config == parse(REDUCED)
    config = GREEDY.replace(max_new_tokens=16)
    done = assert_lossless(model, drafter, [2, 17, 40, 99, 3], config, width=15)
    assert done.counts.drafter_failure is None
    assert done.counts.drafted >= 15

"""What the tests of block drafters share: config.json files, networks of random weights, folders of both."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma.config import FULL, SLIDING
from mlx_dgemma.drafter.block import make
from mlx_dgemma.drafter.format import parse
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.weights import write_into
from mlx_dgemma.errors import InputError

# z-lab/gemma-4-26B-A4B-it-DFlash as it is published
PUBLISHED = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 16,
    "bos_token_id": 2,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 6, 11, 17, 22, 27]},
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2816,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": [*[SLIDING] * 4, FULL],
    "max_position_embeddings": 262144,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 30,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": 2048,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 262144,
}
REDUCED = {**PUBLISHED, "hidden_size": 24, "vocab_size": 131}  # heads, taps, window and layers as they are
# a DSpark drafter of the tests' main model, which has 3 layers
SMALL = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "block_size": 7,
    "dflash_config": {
        "projector_type": "dspark",
        "mask_token_id": 4,
        "target_layer_ids": [0, 2],
        "markov_rank": 5,
        "enable_confidence_head": True,
    },
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 36,
    "layer_types": [SLIDING, FULL],
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "sliding_window": 9,
    "vocab_size": 131,
}


class Value(Enum):
    """None of those that JSON has; an enum because names of tests tell of it."""

    MISSING = "missing"


MISSING = Value.MISSING


def changed(raw: dict, key: str, value) -> dict:
    """A copy with another value; "own.key" is one of its dflash_config."""
    own = key.removeprefix("own.")
    part = {**(raw["dflash_config"] if own != key else raw), own: value}
    part = {name: value for name, value in part.items() if value is not MISSING}
    return {**raw, "dflash_config": part} if own != key else part


def random_network(raw: dict, seed: int = 0) -> BlockNetwork:
    """Norms near 1, matrices of unit gain; layers weigh more than embeddings, so that drafts are not all alike."""
    network = BlockNetwork(parse(raw))
    mx.random.seed(seed)

    def fill(path: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        gain = 4 if "o_proj" in path or "down_proj" in path else 1
        return 1 + 0.2 * noise if array.ndim == 1 else gain * noise * array.shape[-1] ** -0.5

    network.update(tree_unflatten([(path, fill(path, array)) for path, array in tree_flatten(network.parameters())]))
    mx.eval(network.parameters())
    return network


def write_drafter(folder: Path, raw: dict = SMALL, tensors: dict | None = None) -> Path:
    """A folder with this config.json and random weights, some of them replaced; None removes one."""
    folder.mkdir(exist_ok=True)
    try:
        arrays = dict(tree_flatten(random_network(raw).parameters()))
    except InputError:
        arrays = dict(tree_flatten(random_network(SMALL).parameters()))
    arrays = {name: array for name, array in (arrays | (tensors or {})).items() if array is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def write(network: BlockNetwork, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """As a training leaves it, in a new folder."""
    folder.mkdir()
    write_into(network, folder, dtype)


def refused(model, folder, said: str, kind=InputError, **options) -> None:
    """One line that names the file, and what is said."""
    with pytest.raises(kind) as error:
        make(model, str(folder), **options)
    assert said in str(error.value)
    assert str(folder) in str(error.value) or options
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(folder))

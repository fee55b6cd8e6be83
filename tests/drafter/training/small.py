"""What the tests of training share: a small model, drafters for it, texts."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma.config import FULL, SLIDING, ModelConfig
from mlx_dgemma.drafter.geometry import BlockConfig
from mlx_dgemma.drafter.network import BlockNetwork
from tests.helpers import TINY

VOCAB = 131
KINDS = {"all sliding": (SLIDING, SLIDING), "all full": (FULL, FULL), "both": (SLIDING, FULL)}
DSPARK = {"markov_rank": 6, "confidence": "hidden and markov", "from_anchor": True}
FAMILIES = {
    "dflash": {},
    "causal dflash": {"causal": True},
    "draft window": {"draft_window": 5},
    "causal, draft window": {"draft_window": 3, "causal": True},
    "dspark": DSPARK,
    "dspark as dflash": DSPARK | {"from_anchor": False},
}
# as a command says it
FLAGS = "--layers 2 --taps 0,2 --heads 4 --kv-heads 2 --head-dim 8 --intermediate-size 32 --block 5 --window 7".split()


SIZES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 32,
    "kinds": KINDS["both"],
    "sliding_window": 7,
    "taps": (0, 2),
    "positions": 5,
}


def small_config(**changes) -> BlockConfig:
    return BlockConfig.for_model(ModelConfig.from_dict(TINY), **(SIZES | changes))


def random_network(config: BlockConfig, seed: int = 1) -> BlockNetwork:
    """A drafter whose every parameter matters."""
    network = BlockNetwork(config)
    mx.random.seed(seed)

    def fill(array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        return 1 + 0.2 * noise if array.ndim == 1 else noise * array.shape[-1] ** -0.5

    network.update(tree_unflatten([(path, fill(array)) for path, array in tree_flatten(network.parameters())]))
    mx.eval(network.parameters())
    return network


def random_text(length: int, seed: int = 2) -> list[int]:
    return np.random.default_rng(seed).integers(10, VOCAB, length).tolist()


def write_prompts(path: Path, count: int) -> Path:
    words = "apple river stone cloud tiger lemon piano chair".split()
    rng = np.random.default_rng(5)
    lines = [json.dumps({"prompt": "reverse " + " ".join(rng.choice(words, 3))}) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path

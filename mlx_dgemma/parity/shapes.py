"""Tiny random models whose odd sizes no assumption survives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import FULL, SLIDING
from ..errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One tiny model and the run that is recorded of it.

    Args:
        text: text_config as transformers' class takes it, `global_head_dim` and all.
        canvas_length: positions of a canvas.
        prefix: tokens of the prompt.
        canvases: how many are generated.
        batch: rows, all of the same length.
        spelled_out: write the heads of full layers as `global_*` keys and leave out whatever has a
            default, as older checkpoints do; otherwise config.json is what transformers writes.
        embedding: size of embedding entries; the larger, the more peaked the logits.
        scalar: mean of the layer_scalars.
        branch: size of what attention and experts add to a layer's input; the smaller, the calmer
            the canvas is from step to step, and the less an error of one step grows in the next.
        sampling: generation options that differ from `SAMPLING`.
        seed: of weights, prompt and draws; chosen so that the run shows what it is for.
    """

    text: dict[str, Any]
    canvas_length: int
    prefix: int
    canvases: int = 2
    batch: int = 1
    spelled_out: bool = False
    embedding: float = 0.7
    scalar: float = 0.8
    branch: float = 0.5
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


# confidence_threshold 0 is refused by transformers: 1e-9 never lets the stop rule fire.
SAMPLING = {
    "max_denoising_steps": 4,
    "entropy_bound": 1.0,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 1e-9,
    "eos_token_ids": (1,),
    "pad_token_id": 0,
}


def _text(kinds: str, **sizes: Any) -> dict[str, Any]:
    """A text_config; `kinds` has a letter per layer: s(liding) or f(ull)."""
    layers = {"s": SLIDING, "f": FULL}
    return {"num_hidden_layers": len(kinds), "layer_types": [layers[kind] for kind in kinds], **sizes}


SHAPES = {
    # the prefix is longer than the window, and so is what the second canvas adds to it
    "window": Shape(
        text=_text("ssf", hidden_size=36, intermediate_size=44, vocab_size=101, sliding_window=5)
        | {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}
        | {"global_head_dim": 10, "num_global_key_value_heads": 2}
        | {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 11},
        canvas_length=7,
        prefix=13,
        seed=6,
    ),
    # nothing slides, one head of keys and values serves all queries
    "full": Shape(
        text=_text("f", hidden_size=28, intermediate_size=26, vocab_size=109, sliding_window=3)
        | {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4}
        | {"global_head_dim": 18, "num_global_key_value_heads": 1}
        | {"num_experts": 3, "top_k_experts": 1, "moe_intermediate_size": 17},
        canvas_length=9,
        prefix=6,
        sampling={"entropy_bound": 0.05},
    ),
    # the other spelling of config.json: default layer kinds (the sixth is full, the last is made so) and RoPE
    "spelled": Shape(
        text={"num_hidden_layers": 7, "hidden_size": 24, "intermediate_size": 20, "vocab_size": 89}
        | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "sliding_window": 8}
        | {"global_head_dim": 8, "num_global_key_value_heads": 1}
        | {"num_experts": 4, "top_k_experts": 3, "moe_intermediate_size": 9},
        canvas_length=6,
        prefix=11,
        spelled_out=True,
        scalar=0.95,
        seed=4,
    ),
    # long enough for RoPE frequencies to drift; every token takes every expert, so that no flipped
    # near-tie of a router can hide it
    "long": Shape(
        text=_text("ssfsf", hidden_size=32, intermediate_size=36, vocab_size=67, sliding_window=1500)
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
        | {"global_head_dim": 64, "num_global_key_value_heads": 1}
        | {"num_experts": 2, "top_k_experts": 2, "moe_intermediate_size": 10},
        canvas_length=5,
        prefix=2101,
        sampling={"max_denoising_steps": 2},
        seed=1,
    ),
    # two rows that stop at different steps
    "batch": Shape(
        text=_text("sfsf", hidden_size=30, intermediate_size=32, vocab_size=103, sliding_window=6)
        | {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
        | {"global_head_dim": 12, "num_global_key_value_heads": 3}
        | {"num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 7},
        canvas_length=5,
        prefix=9,
        batch=2,
        embedding=1.6,
        sampling={"max_denoising_steps": 12, "confidence_threshold": 0.5, "entropy_bound": 1.0},
        seed=2,
    ),
    # a vocabulary of which only columns are kept; a prompt of so many windows that the cache drops rows, also
    # of the block that is verified
    "wide": Shape(
        text=_text("sssf", hidden_size=20, intermediate_size=24, vocab_size=5003, sliding_window=7)
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
        | {"global_head_dim": 16, "num_global_key_value_heads": 2}
        | {"num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 5},
        canvas_length=8,
        prefix=180,
        embedding=1.2,
        sampling={"entropy_bound": 3.0},
        seed=0,
    ),
    # one token before a canvas that is longer than the window; three canvases, an end in the last
    "short": Shape(
        text=_text("sf", hidden_size=26, intermediate_size=30, vocab_size=97, sliding_window=4)
        | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 4}
        | {"global_head_dim": 14, "num_global_key_value_heads": 1}
        | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 6},
        canvas_length=9,
        prefix=1,
        canvases=3,
        embedding=1.2,
        sampling={"max_denoising_steps": 8, "confidence_threshold": 0.5, "entropy_bound": 3.0}
        | {"eos_token_ids": (1, 86)},
        seed=7,
    ),
}


def shape(name: str) -> Shape:
    """A shape by its name. Raises UsageError naming those that exist."""
    if name not in SHAPES:
        raise UsageError(f"--model tiny:{name}: no such shape; there are {', '.join(SHAPES)}")
    return SHAPES[name]

"""config.json of what is written, in the spelling that every program reads.

Heads are said by the keys `head_dim`, `num_key_value_heads`, `global_head_dim` and `num_global_key_value_heads`:
transformers also reads `per_layer_config`, mlx-lm and mlx-vlm do not. What these keys cannot say is layers of
one kind with different heads. Keys whose defaults differ between the programs are written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import FULL, SLIDING, LayerConfig, ModelConfig
from ..errors import InputError

SHARED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads sliding_window num_experts "
    "top_k_experts moe_intermediate_size rms_norm_eps max_position_embeddings final_logit_softcapping"
).split()


def mlx_config(raw: Mapping[str, Any], config: ModelConfig, *, has_vision: bool) -> dict[str, Any]:
    """A DiffusionGemma's config.json for mlx-vlm as well.

    Args:
        raw, config: the source's, as it is and parsed.
        has_vision: mlx-vlm makes a vision tower for every config.json that does not say null, and wants its tensors.
    """
    text = dict(raw["text_config"]) | _shared(config) | {"layer_types": [layer.kind for layer in config.layers]}
    if _kinds(config) is not None:
        text.pop("per_layer_config", None)
        text |= _heads(config)
    result = {**raw, "text_config": dict(sorted(text.items())), "canvas_length": config.canvas_length}
    return result if has_vision else result | {"vision_config": None}


def gemma4_config(config: ModelConfig, eos_token_ids: Sequence[int], dtype: str) -> dict[str, Any]:
    """config.json of the causal pass as a plain Gemma 4 text model, for transformers' and mlx-lm's own code.

    Raises InputError if layers of one kind have different heads.
    """
    if (kinds := _kinds(config)) is None:
        raise InputError("layers of one kind have different heads, which a Gemma 4 config.json cannot say")
    sliding, full = kinds
    return {
        **_shared(config),
        **_heads(config),
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": dtype,
        "eos_token_id": list(eos_token_ids) or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_types": [layer.kind for layer in config.layers],
        "attention_k_eq_v": True,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": sliding.rope_theta},
            FULL: {"rope_type": "proportional", "rope_theta": full.rope_theta}
            | {"partial_rotary_factor": full.rotary_factor},
        },
        "enable_moe_block": True,
        # what smaller Gemma 4 models have, and where the two packages' defaults differ
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": config.vocab_size,
    }


def _shared(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED_KEYS}


def _kinds(config: ModelConfig) -> tuple[LayerConfig, LayerConfig] | None:
    """The sliding and the full layers, None if those of one kind differ; the last layer is always full."""
    full = {layer for layer in config.layers if not layer.is_sliding}
    sliding = {layer for layer in config.layers if layer.is_sliding} or full
    return (*sliding, *full) if len(sliding) == len(full) == 1 else None


def _heads(config: ModelConfig) -> dict[str, int]:
    sliding, full = _kinds(config)
    return {
        "head_dim": sliding.head_dim,
        "num_key_value_heads": sliding.num_key_value_heads,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads,
    }

"""config.json of the causal pass as a plain Gemma 4 text model, for transformers' and mlx-lm's own code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import FULL, SLIDING, LayerConfig, ModelConfig
from ..errors import InputError

SHARED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads sliding_window num_experts "
    "top_k_experts moe_intermediate_size rms_norm_eps max_position_embeddings final_logit_softcapping "
    "pad_token_id bos_token_id"
).split()


def gemma4_config(config: ModelConfig, eos_token_ids: Sequence[int], dtype: str) -> dict[str, Any]:
    """config.json with `global_*` keys: transformers also reads `per_layer_config`, mlx-lm does not.

    Raises InputError if layers of one kind differ, which these keys cannot say.
    """
    full = _only([layer for layer in config.layers if not layer.is_sliding])
    sliding = _only([layer for layer in config.layers if layer.is_sliding] or [full])
    return {name: getattr(config, name) for name in SHARED_KEYS} | {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": dtype,
        "eos_token_id": list(eos_token_ids) or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "layer_types": [layer.kind for layer in config.layers],
        "head_dim": sliding.head_dim,
        "num_key_value_heads": sliding.num_key_value_heads,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads,
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


def _only(layers: list[LayerConfig]) -> LayerConfig:
    if len(set(layers)) > 1:
        raise InputError(f"{layers[0].kind} layers have different heads, which a Gemma 4 config.json cannot say")
    return layers[0]

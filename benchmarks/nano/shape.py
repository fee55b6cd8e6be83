"""nano's architecture: small, with every feature of the 26B."""

from __future__ import annotations

from transformers import DiffusionGemmaConfig
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

PAD, EOS, BOS, TURN_END = 0, 1, 2, 6
CANVAS = 96
LAYERS = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention")


def nano_config(vocab_size: int) -> DiffusionGemmaConfig:
    """Two kinds of layers with their own heads, a dense MLP beside the experts, keys as values, a vision tower."""
    text = dict(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=len(LAYERS),
        layer_types=list(LAYERS),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        sliding_window=64,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=128,
        max_position_embeddings=8192,
        use_bidirectional_attention="vision",
        eos_token_id=[EOS, TURN_END],
    )
    vision = dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        patch_size=4,
        position_embedding_size=16,
    )
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS,
        boi_token_id=10,
        image_token_id=11,
        eoi_token_id=12,
    )


def generation_config() -> DiffusionGemmaGenerationConfig:
    """The sampler's settings of the released checkpoint."""
    return DiffusionGemmaGenerationConfig(
        max_new_tokens=3 * CANVAS,  # its longest answers
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, TURN_END],
    )

"""A checkpoint's causal pass as a plain Gemma 4 text checkpoint, which transformers and mlx-lm run with their own code.

    python -m benchmarks.gemma4 [--model nano] --out FOLDER

What runs causally over a prefix is Gemma 4 with experts, its `layer_scalar`s those of the encoder
and all else the decoder's. Tensors are copied as they are; only their names change.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint import INDEX, Checkpoint
from mlx_dgemma.command import run_command
from mlx_dgemma.config import FULL, SLIDING, LayerConfig, ModelConfig, read_json
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import read_generation_config, resolve
from mlx_dgemma.parity.bundle import new_folder

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
SHARED_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads sliding_window num_experts "
    "top_k_experts moe_intermediate_size rms_norm_eps max_position_embeddings final_logit_softcapping "
    "pad_token_id bos_token_id"
).split()
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "*.model", "special_tokens_map.json", "added_tokens.json")


def gemma4_name(name: str) -> str | None:
    """A tensor's name in our checkpoint -> in Gemma 4's; None for what the causal pass does not use."""
    if name.startswith(ENCODER):  # nothing but layer_scalars
        return "model." + name.removeprefix(ENCODER)
    is_causal = name.startswith(DECODER) and "self_conditioning" not in name and not name.endswith("layer_scalar")
    return "model." + name.removeprefix(DECODER) if is_causal else None


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


def write_gemma4(source: Path, out: Path) -> None:
    """Write the folder `out`, shard by shard.

    Raises UsageError if `out` exists, InputError if `source` cannot be said as Gemma 4.
    """
    config = ModelConfig.from_dict(read_json(source / "config.json"), str(source / "config.json"))
    if config.quantization is not None:
        raise InputError(f"{source}: is quantised; give the checkpoint it was made from")
    generation = read_generation_config(source, config)
    infos = Checkpoint(source).text_tensors().values()
    kept = {info.name: info for info in infos if gemma4_name(info.name) is not None}
    stored = next(info.dtype for info in kept.values())
    with new_folder(out) as work:
        _write_json(work / "config.json", gemma4_config(config, generation.eos_token_ids, DTYPES[stored]))
        ids = {"eos_token_id": list(generation.eos_token_ids) or None, "pad_token_id": generation.pad_token_id}
        _write_json(work / "generation_config.json", ids | {"bos_token_id": config.bos_token_id})
        for shard in sorted({info.shard for info in kept.values()}):
            arrays = {gemma4_name(name): array for name, array in mx.load(str(shard)).items() if name in kept}
            mx.save_safetensors(str(work / shard.name), arrays, {"format": "pt"})
        index = {gemma4_name(name): info.shard.name for name, info in kept.items()}
        size = sum(info.nbytes for info in kept.values())
        _write_json(work / INDEX, {"metadata": {"total_size": size}, "weight_map": index})
        for file in {file for pattern in TOKENIZER_FILES for file in source.glob(pattern)}:
            shutil.copy(file, work / file.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _command(args: argparse.Namespace) -> None:
    write_gemma4(resolve(args.model), args.out)
    print(args.out)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gemma4", description="Write the causal pass as a plain Gemma 4 text checkpoint."
    )
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    add("--out", type=Path, required=True, metavar="FOLDER", help="where to; must not exist")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

"""Small random models and checkpoints that tests build on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma.checkpoint import tensor_name
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.loading import EMBEDDED
from mlx_dgemma.model import DiffusionGemma

NANO_TEXT = json.loads((EMBEDDED / "config.json").read_text())["text_config"]
NANO_VOCAB = NANO_TEXT["vocab_size"]  # its tokenizer's too
PROMPTS = [  # nano's kinds of requests, and one that it knows nothing of
    "json name=Ann age=31 city=Oslo",
    'set age=44 in {"name": "Bob", "age": 31}',
    "python total(values): sum the values above 7",
    "sudoku 4... 31.2 2.31 1.24",
    "reverse needle eagle window",
    "47 - 23",
    "nothing that was ever trained on",
]
TINY = {
    "model_type": "diffusion_gemma",
    "canvas_length": 12,
    "text_config": {
        "vocab_size": 131,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 12,
        "max_position_embeddings": 512,
        "eos_token_id": [1, 5],
    },
}


def with_text(**changes) -> dict:
    """TINY with other values in text_config; None removes a key."""
    text = {**TINY["text_config"], **changes}
    return {**TINY, "text_config": {key: value for key, value in text.items() if value is not None}}


def random_model(raw: dict = TINY, seed: int = 0) -> DiffusionGemma:
    """A model whose every parameter matters: norms and scalars near 1, matrices of unit gain."""
    model = DiffusionGemma(ModelConfig.from_dict(raw))
    mx.random.seed(seed)

    def fill(array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        return 1 + 0.2 * noise if array.ndim == 1 else noise * array.shape[-1] ** -0.5

    model.update(tree_unflatten([(path, fill(array)) for path, array in tree_flatten(model.parameters())]))
    mx.eval(model.parameters())
    return model


def write_checkpoint(folder: Path, raw: dict = TINY, model: DiffusionGemma | None = None) -> Path:
    """A checkpoint in the HF layout, with nano's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(raw) if model is None else model
    arrays = dict(tree_flatten(model.parameters()))
    # stacks of experts lose their `.weight` as floats alone, as mlx-community has it
    quantised = {path.removesuffix(".scales") for path in arrays if path.endswith(".scales")}
    tensors = {p if p.removesuffix(".weight") in quantised else tensor_name(p): array for p, array in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / name, folder / name)
    return folder


def screen(output: str) -> str:
    """What a terminal shows after `output`, by the few control sequences that are used here."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[\d*[A-Za-z]|[^\x1b]", output):
        if piece.endswith("A") and len(piece) > 1:
            row -= int(piece[2:-1])
        elif piece == "\x1b[J":
            lines = [*lines[:row], lines[row][:column]]
        elif piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif len(piece) == 1:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return "\n".join(lines).rstrip("\n")

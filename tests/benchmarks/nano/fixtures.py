"""Rows of random ids, and tensors of checkpoints."""

import random


def rows_of(tokenizer, *lengths):
    """Rows of random ids: (prompt, answer) lengths."""
    from benchmarks.nano.rows import Row  # torch

    rng = random.Random(3)
    return [Row(*([rng.randrange(20, len(tokenizer)) for _ in range(n)] for n in pair)) for pair in lengths]


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")

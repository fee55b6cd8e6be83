"""All ways to quantise, the command that does it, and checkpoints to do it to."""

from pathlib import Path

import mlx.core as mx

from mlx_dgemma.convert.command import main
from mlx_dgemma.convert.recipes import RECIPES
from tests.convert.fixtures import WIDE, hf_tensors, write

MODES = {  # of -q
    "-q": [],
    "-q 6 bits": ["--q-bits", "6", "--q-group-size", "32"],
    "-q 3 bits": ["--q-bits", "3", "--q-group-size", "32"],
    **{f"-q {mode}": ["--q-mode", mode] for mode in ("mxfp4", "nvfp4", "mxfp8")},
}
WAYS = {name: ["--quant-recipe", name] for name in RECIPES} | {name: ["-q", *rest] for name, rest in MODES.items()}
VISION_CONFIG = {"hidden_size": 16, "model_type": "diffusion_gemma_vision"}


def command(capsys, *argv: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of mlx_dgemma.convert, in this process."""
    status = 0
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def same(got: mx.array, expected: mx.array) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    bits = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[got.itemsize]
    return bool(mx.array_equal(got.view(bits), expected.view(bits))) if got.shape else got.item() == expected.item()


def with_vision(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A checkpoint whose widths every group divides, with a vision tower."""
    return write(folder, WIDE | {"vision_config": VISION_CONFIG}, hf_tensors(WIDE, dtype))

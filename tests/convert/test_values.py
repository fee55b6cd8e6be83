"""--verify: what was written is compared with the source, value by value."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.convert.conversion import Conversion, Options, convert
from mlx_dgemma.convert.shards import Reader
from mlx_dgemma.convert.values import check_values
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import EMBEDDED
from tests.convert.fixtures import WIDE, hf_tensors, write

CASES = [
    Options(),
    Options(dtype="float16"),
    Options(export="hf"),
    Options(quant_recipe="default"),
    Options(quant_recipe="default", export="gemma4"),
    *(Options(quantize=True, q_mode=mode) for mode in ("mxfp4", "nvfp4", "mxfp8")),
    Options(quantize=True, q_bits=2, dtype="float32"),
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_what_is_written_is_what_the_source_says(tmp_path, options):
    out = convert(EMBEDDED, tmp_path / "out", **vars(options), verify_output=True, progress=False)
    conversion, shard = Conversion(EMBEDDED, options), out / "model.safetensors"
    check_values(conversion, Reader(Checkpoint(out).tensors))
    arrays = mx.load(str(shard))
    name = next(name for name in sorted(arrays) if "self_attn.o_proj.weight" in name)
    damaged = arrays[name]
    arrays[name] = damaged + 1 if damaged.dtype == mx.uint32 else damaged * 1.01
    mx.save_safetensors(str(shard), arrays)
    with pytest.raises(InputError, match=r"o_proj\.weight: what was written is not"):
        check_values(conversion, Reader(Checkpoint(out).tensors))


@pytest.mark.parametrize("spread", [1.0, 0.1, 0.02, 0.005, 0.002])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_weights_of_every_size_pass(mode, spread, tmp_path):
    """Trained weights are around 0.02; below, nvfp4's scales lose digits, and at last groups become 0."""
    tensors = {name: (array * spread).astype(mx.bfloat16) for name, array in hf_tensors(WIDE, mx.float32).items()}
    source = write(tmp_path / "in", WIDE, tensors)
    convert(source, tmp_path / "out", quantize=True, q_mode=mode, verify_output=True, progress=False)


def test_what_is_not_finite_is_said_to_be_the_sources(tmp_path):
    tensors = hf_tensors(WIDE, mx.float32)
    name = "model.decoder.layers.0.mlp.up_proj.weight"
    tensors[name] = mx.array(np.where(np.arange(64) == 3, np.nan, np.array(tensors[name])))
    source = write(tmp_path / "in", WIDE, tensors)
    with pytest.raises(InputError, match=rf"{name}: holds numbers that are not finite"):
        convert(source, tmp_path / "out", quantize=True, verify_output=True, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

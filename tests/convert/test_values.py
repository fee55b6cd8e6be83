"""--verify: what was written is compared with the source, value by value."""

import mlx.core as mx
import pytest

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.convert.conversion import Conversion, Options, convert
from mlx_dgemma.convert.shards import Reader
from mlx_dgemma.convert.values import check_values
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import EMBEDDED

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

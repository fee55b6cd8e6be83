"""Whether a conversion wrote what its source says: floats bit for bit, quantised ones within their mode's bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
from tqdm import tqdm

from ..errors import InputError
from .recipes import Scheme
from .shards import MLX, Reader
from .sources import spans

if TYPE_CHECKING:
    from .conversion import Conversion
    from .engine import Job

# The largest error, in units of the group's largest absolute value. e2m1's widest gap is 2 of 6; a scale that is a
# power of two may cut off what lies above it (MLX rounds it to the nearest), one in e4m3 is off by a sixteenth.
LARGEST_ERROR = {"mxfp4": 0.34, "nvfp4": 0.25, "mxfp8": 0.13}
# MLX's nvfp4 has no global scale: scales of small groups are subnormal, off by half of 2^-9, and codes go to 6.
LEAST_ERROR = {"nvfp4": 6 * 2.0**-10}
ROUNDING = {"F32": 2.0**-22, "F16": 2.0**-9, "BF16": 2.0**-6}  # of scales and biases, in the same units


def check_values(conversion: Conversion, reader: Reader, *, progress: bool = False) -> None:
    """Raise InputError naming the first tensor of `reader` that is not what the source has."""
    jobs = list(zip(conversion.tensors.items(), conversion.jobs(), strict=True))
    for (name, tensor), job in tqdm(jobs, desc="Comparing with the source", unit="tensor", disable=not progress):
        dtype, scheme = conversion.dtype_of(tensor), conversion.scheme_of(name)
        for first, last in spans(tensor):
            expected = tensor.read(first, last).astype(MLX[dtype])
            if scheme is None:
                is_right = mx.array_equal(reader.array(job.outputs[0].name, first, last), expected, equal_nan=True)
            else:
                got = _dequantised(job, reader, first, last, scheme)
                kept = conversion.keeps
                is_right = mx.array_equal(got, expected) if kept else _is_near(got, expected, scheme, dtype)
            if not is_right and scheme is not None and not mx.isfinite(expected).all():
                raise InputError(
                    f"{name}: holds numbers that are not finite, which cannot be quantised; see the source"
                )
            if not is_right:
                raise InputError(f"{name}: what was written is not what the source has; convert it again")


def _dequantised(job: Job, reader: Reader, first: int, last: int, scheme: Scheme) -> mx.array:
    parts = [reader.array(output.name, first, last) for output in job.outputs]
    kinds = 3 if scheme.mode == "affine" else 2
    halves = len(parts) // kinds  # gate and up may be stored apart
    whole = [mx.concatenate(parts[i : i + halves], axis=-2) for i in range(0, len(parts), halves)]
    return mx.dequantize(*whole, **scheme.settings())


def _is_near(got: mx.array, expected: mx.array, scheme: Scheme, dtype: str) -> mx.array:
    """Whether every group is within a step, or the mode's bound."""
    groups = expected.astype(mx.float32).reshape(-1, scheme.group_size)
    error = mx.abs(got.astype(mx.float32).reshape(groups.shape) - groups).max(axis=-1)
    largest = mx.abs(groups).max(axis=-1)
    if scheme.mode == "affine":
        # half a step, and up to one at the far end of a group, whose step MLX fits so that zero is exact
        bound = (groups.max(axis=-1) - groups.min(axis=-1)) / (2**scheme.bits - 1) + ROUNDING[dtype] * largest
    else:
        bound = LARGEST_ERROR[scheme.mode] * largest + LEAST_ERROR.get(scheme.mode, 0.0)
    return mx.all(error <= bound)

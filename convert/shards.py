"""Tensors in safetensors files: read as views of the mapped file, planned into shards, written chunk by chunk.

Nothing here holds a whole tensor: pages of a source belong to the system's file cache, and
what is written comes in pieces.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..checkpoint import ITEM_BYTES, TensorInfo

CHUNK = 16 << 20  # bytes of a source tensor that are worked on at a time; more is slower, as buffers are not reused
SHARD = 5 << 30  # bytes of tensors in a shard, as in mlx_lm
FORMAT = {"format": "mlx"}
PART = ".part"  # a shard that is not whole yet does not end in .safetensors
_PARTS_OF_A_MODULE = ("weight", "scales", "biases", "bias")

# what NumPy and MLX do not know is seen as unsigned integers of the same size
MLX = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8}
_NUMPY |= {"BOOL": np.bool_, "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}
_NUMPY |= {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}


def to_mlx(view: np.ndarray, dtype: str) -> mx.array:
    """A copy of a view as MLX sees a tensor of `dtype`; F8 stays uint8, for `mx.from_fp8`."""
    array = mx.array(view)
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def to_bytes(data: Any) -> memoryview:
    """The bytes that a file holds of an array, NumPy's or MLX's, or of any buffer; copied only if not contiguous."""
    if isinstance(data, mx.array):
        data = np.asarray(data.view(mx.uint16) if data.dtype == mx.bfloat16 else data)
    if isinstance(data, np.ndarray):
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return memoryview(data)


class Reader:
    """Tensors of mapped files by name. Their pages are read when touched and belong to the file cache."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A tensor or a slice of its first axis, read-only; BF16 as uint16 and F8 as uint8. Raises KeyError."""
        info = self.tensors[name]
        whole = np.ndarray(info.shape, _NUMPY[info.dtype], buffer=self._map(info.shard), offset=info.offset)
        return whole if start == 0 and stop is None else whole[start:stop]

    def array(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        """The same as an array of MLX's own."""
        return to_mlx(self.view(name, start, stop), self.tensors[name].dtype)

    def chunks(self, name: str, limit: int = CHUNK) -> Iterator[np.ndarray]:
        """A tensor in order, in views (rows, width) of at most `limit` bytes, but of one row at least."""
        info = self.tensors[name]
        lead = max(1, len(info.shape) - 1)
        count, item = prod(info.shape[:lead]), info.shape[lead:]
        items = self.view(name).reshape(count, *item)
        size = prod(item) * ITEM_BYTES[info.dtype]
        step = max(1, limit // max(1, size))
        for start in range(0, count, step):
            here = info.offset + start * size
            self._advise(info.shard, mmap.MADV_WILLNEED, here + step * size, step * size)  # read while this is used
            yield items[start : start + step]
            self._advise(info.shard, mmap.MADV_DONTNEED, here, step * size)

    def _map(self, shard: Path) -> mmap.mmap:
        if shard not in self._maps:
            with shard.open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[shard]

    def _advise(self, shard: Path, advice: int, start: int, length: int) -> None:
        mapped = self._map(shard)
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if first < min(start + length, len(mapped)):
            mapped.madvise(advice, first, min(start + length, len(mapped)) - first)


@dataclass(frozen=True)
class Output:
    """A tensor that is to be written; dtype as safetensors names it ("BF16", "U32", ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A safetensors file before it exists: its header, and the place of each tensor in it."""

    name: str
    header: bytes
    tensors: tuple[TensorInfo, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(info.nbytes for info in self.tensors)

    def prepare(self, path: Path) -> None:
        """Create the file with its header and with room for its tensors; what is there already stays."""
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as file:
            write_all(file, self.header)
            file.truncate(self.size)


def plan(outputs: Iterable[Output], limit: int = SHARD, metadata: Mapping[str, str] | None = None) -> list[Shard]:
    """Shards of at most `limit` bytes of tensors each, or of one module; the tensors of a module are kept together.

    Raises ValueError if two outputs have one name.
    """
    modules: dict[str, list[Output]] = {}
    for output in outputs:
        modules.setdefault(_module(output.name), []).append(output)
    parts: list[list[Output]] = []
    size = 0
    for members in modules.values():
        nbytes = sum(output.nbytes for output in members)
        if not parts or size + nbytes > limit:
            parts.append([])
            size = 0
        parts[-1] += members
        size += nbytes
    many = "model-{:05}-of-{:05}.safetensors" if len(parts) > 1 else "model.safetensors"
    metadata = FORMAT if metadata is None else metadata
    return [_shard(many.format(i + 1, len(parts)), part, metadata) for i, part in enumerate(parts)]


def _module(name: str) -> str:
    stem, _, part = name.rpartition(".")
    return stem if part in _PARTS_OF_A_MODULE else name


def _shard(name: str, outputs: list[Output], metadata: Mapping[str, str]) -> Shard:
    outputs = sorted(outputs, key=lambda output: -ITEM_BYTES[output.dtype])  # so that every tensor is aligned
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts = []
    end = 0
    for output in outputs:
        if output.name in entries:
            raise ValueError(f"{output.name}: is to be written twice")
        starts.append(end)
        end += output.nbytes
        entries[output.name] = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [starts[-1], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = zip(outputs, starts, strict=True)
    return Shard(
        name, header, tuple(TensorInfo(o.name, o.dtype, o.shape, Path(name), len(header) + at) for o, at in places)
    )


class TensorWriter:
    """Fills the place of a tensor in a prepared file, from its first byte to its last."""

    def __init__(self, path: Path, info: TensorInfo):
        self.info = info
        self._left = info.nbytes
        self._hash = hashlib.sha256()
        self._file = path.open("r+b", buffering=0)
        self._file.seek(info.offset)

    def write(self, data: memoryview) -> None:
        """Append bytes. Raises OSError, and ValueError if they are more than the tensor has room for."""
        if data.nbytes > self._left:
            raise ValueError(f"{self.info.name}: {data.nbytes - self._left} bytes too many")
        write_all(self._file, data)
        self._left -= data.nbytes
        self._hash.update(data)

    def finish(self) -> str:
        """Bring everything to disk; the sha256 of the tensor. Raises ValueError if bytes are missing, and OSError."""
        if self._left:
            raise ValueError(f"{self.info.name}: {self._left} bytes are missing")
        os.fsync(self._file.fileno())
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        self._file.close()


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]

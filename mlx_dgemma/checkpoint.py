"""The files of a checkpoint folder: which tensors there are, in which shard, and whether they are whole.

Only headers are read here. Tensors come as lazy arrays: MLX reads each from disk, whole, when it
is first used, into memory of this process.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import read_json
from .errors import InputError

INDEX = "model.safetensors.index.json"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
ITEM_BYTES = {"I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
ITEM_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library


def module_name(name: str) -> str:
    """HF's name of a tensor -> its path in `DiffusionGemma`: stacked experts are modules there."""
    return f"{name}.weight" if name.endswith(_EXPERTS) else name


def tensor_name(path: str) -> str:
    """The inverse of `module_name`."""
    stem = path.removesuffix(".weight")
    return stem if stem.endswith(_EXPERTS) else path


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk, by its header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    offset: int  # of its first byte in the shard

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]


class Checkpoint:
    """A folder in the HF layout, sharded or not.

    Raises InputError for a missing, truncated or unlisted shard, naming it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        index = folder / INDEX
        listed = _index(index) if index.exists() else None
        shards = sorted(set(listed.values())) if listed else sorted(p.name for p in folder.glob("model*.safetensors"))
        if not shards:
            raise InputError(f"{folder}: no model*.safetensors here; is this a checkpoint folder?")
        for shard in shards:
            for info in read_header(folder / shard, index if listed else None):
                self.tensors[info.name] = info
        for name, shard in (listed or {}).items():
            if name not in self.tensors or self.tensors[name].shard.name != shard:
                raise InputError(f"{index}: lists {name} in {shard}, which does not hold it")

    def text_tensors(self) -> dict[str, TensorInfo]:
        """All but the vision tower, which stays on disk."""
        return {name: info for name, info in self.tensors.items() if not name.startswith(VISION)}

    def arrays(self, names: Iterable[str]) -> Mapping[str, mx.array]:
        """Lazy arrays by name; nothing is read yet."""
        wanted = set(names)
        arrays: dict[str, mx.array] = {}
        for shard in sorted({self.tensors[name].shard for name in wanted}):
            arrays |= {name: array for name, array in mx.load(str(shard)).items() if name in wanted}
        return arrays


def _index(path: Path) -> dict[str, str]:
    listed = read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{path}: has no weight_map")
    for name, shard in listed.items():
        is_plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not is_plain or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise InputError(f"{path}: {name} points to {shard!r:.80}, which is not a file name in this folder")
    return listed


def read_header(path: Path, index: Path | None = None) -> list[TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes. Raises InputError if the file is not whole."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(total, MAX_HEADER):
                raise ValueError(f"its header of {length} bytes is longer than the file or the format allows")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = _in_order(path, header, 8 + length)
    except FileNotFoundError:
        named = f", which {index.name} names" if index else ""
        raise InputError(f"{path}: no such shard{named}; download the checkpoint again") from None
    except OSError as error:
        raise InputError(f"{path.with_name(path.name[:80])}: cannot be read ({error.strerror})") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); download it again") from None
    end = infos[-1].offset + infos[-1].nbytes if infos else 8 + length
    if end != total:
        raise InputError(f"{path}: {total} bytes long, its header says {end}; download it again")
    return infos


def _in_order(path: Path, header: dict[str, Any], start: int) -> list[TensorInfo]:
    """The entries of a header, which must fill the file from byte `start` on without a hole or an overlap."""
    infos = []
    end = start
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + first)
        if any(type(number) is not int or number < 0 for number in (first, last, *info.shape)):
            raise ValueError(f"{name}: shape {info.shape} at {first} to {last} are not whole numbers")
        if info.dtype not in ITEM_BYTES or last - first != info.nbytes:
            raise ValueError(f"{name}: {info.dtype} of shape {info.shape} is not what is stored")
        if info.offset != end:
            raise ValueError(f"{name}: starts at byte {info.offset}, the tensor before it ends at {end}")
        infos.append(info)
        end += info.nbytes
    return infos


def save(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Raises OSError, also where MLX calls a full disk a RuntimeError."""
    try:
        mx.save_safetensors(str(path), dict(arrays), dict(metadata))
    except RuntimeError as error:
        raise OSError(str(error)) from None

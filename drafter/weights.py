"""The files of a block drafter: config.json and model.safetensors, as z-lab publishes them and mlx-vlm reads them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint import Checkpoint, TensorInfo
from ..config import read_json
from ..errors import InputError
from ..folders import new_folder
from ..model import DiffusionGemma
from .geometry import BlockConfig
from .network import BlockNetwork

PREFIX = "model."  # of some published files
FLOATS = ("F32", "F16", "BF16")
GROUPS = (64, 32)


def read(folder: Path, model: DiffusionGemma, bits: int | None = None) -> BlockNetwork:
    """The drafter of a folder, in the model's dtype, or quantised.

    Raises InputError: one line that names the file, the key or the tensor that is wrong, or does not fit the model.
    """
    where = str(folder / "config.json")
    config = BlockConfig.from_dict(read_json(folder / "config.json"), where)
    config.require_fit(model.config, where)
    network, checkpoint = BlockNetwork(config), Checkpoint(folder)
    names = _names(network, checkpoint, folder)
    arrays = checkpoint.arrays(names)
    network.load_weights([(path, arrays[name].astype(model.dtype)) for name, path in names.items()])
    network.eval()
    if bits is not None:
        quantise(network, bits, where)
    mx.eval(network.parameters())
    return network


def _names(network: BlockNetwork, checkpoint: Checkpoint, folder: Path) -> dict[str, str]:
    """The name of each tensor -> its path; every one of the network is there, with its shape, and no other."""
    expected = {path: tuple(array.shape) for path, array in tree_flatten(network.parameters())}
    names: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        path = name.removeprefix(PREFIX)
        if path not in expected or path in names.values():
            raise InputError(f"{info.shard}: tensor {name!r:.120} has no place in the drafter of config.json")
        _check(info, expected[path])
        names[name] = path
    for path in sorted(expected.keys() - set(names.values())):
        raise InputError(f"{folder}: tensor {path} is missing, which config.json calls for")
    return names


def _check(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise InputError(f"{info.shard}: tensor {info.name} has the shape {info.shape}, config.json calls for {shape}")
    if info.dtype not in FLOATS:
        raise InputError(f"{info.shard}: tensor {info.name} is {info.dtype}; weights must be F32, F16 or BF16")


def quantise(network: BlockNetwork, bits: int, where: str) -> None:
    """All matrices but those of the heads. Raises InputError if no group divides them."""
    layers = [(path, module) for path, module in network.named_modules() if _is_quantised(path, module)]
    widths = {module.weight.shape[-1] for _, module in layers}
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise InputError(f"{where}: matrices {sorted(widths)} wide cannot be quantised in groups of 64 or 32")
    nn.quantize(network, group_size=group, bits=bits, class_predicate=_is_quantised)


def _is_quantised(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "_head" not in path


def write(network: BlockNetwork, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """A new folder with a drafter in floats. Raises UsageError if there is one."""
    with new_folder(folder) as work:
        write_into(network, work, dtype)


def write_into(network: BlockNetwork, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """The same into an existing folder."""
    if any(isinstance(module, nn.QuantizedLinear) for module in network.modules()):
        raise ValueError("a quantised drafter cannot be written; its floats are gone")
    arrays = {path: array.astype(dtype) for path, array in tree_flatten(network.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    config = network.config.to_dict() | {"dtype": str(dtype).removeprefix("mlx.core.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

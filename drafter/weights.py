"""The files of a block drafter: config.json and model.safetensors, as z-lab publishes them and mlx-vlm reads them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint import Checkpoint, TensorInfo, save
from ..config import read_json
from ..errors import InputError
from ..loading import EMBEDDED, NANO, resolve
from ..model import DiffusionGemma
from .format import as_json, parse
from .geometry import BlockConfig
from .head import common_group
from .network import BlockNetwork

PREFIX = "model."  # of some published files
FLOATS = ("F32", "F16", "BF16")
EMBEDDED_DRAFTER = EMBEDDED / "drafter"
FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")

_downloaded: dict[str, Path] = {}  # of Hub ids that were asked for, so that a request does not ask the Hub again


def find(place: str | Path) -> Path:
    """The folder of a drafter: "nano" (shipped for the embedded checkpoint), an existing folder, or a Hub id."""
    if str(place) == NANO:
        return EMBEDDED_DRAFTER
    known = _downloaded.get(str(place))
    if known is not None and known.is_dir() and not Path(place).exists():
        return known
    folder = resolve(place)
    if not Path(place).expanduser().exists():
        _downloaded[str(place)] = folder
    return folder


def stamp(folder: Path) -> tuple:
    """What changes when a drafter is written anew: its files, their sizes and when they were written."""
    try:
        files = sorted(path for pattern in FILES for path in folder.glob(pattern))
        stats = [(path.name, path.stat()) for path in files]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def read_config(folder: Path) -> BlockConfig:
    """Raises InputError that names the key."""
    return parse(read_json(folder / "config.json"), str(folder / "config.json"))


def read(folder: Path, model: DiffusionGemma, bits: int | None = None, dtype: mx.Dtype | None = None) -> BlockNetwork:
    """The drafter of a folder, in the model's dtype or another one, or quantised.

    Raises InputError: one line that names the file, the key or the tensor that is wrong, or does not fit the model.
    """
    config, where = read_config(folder), str(folder / "config.json")
    config.require_fit(model.config, where)
    network, checkpoint = BlockNetwork(config), Checkpoint(folder)
    names = _names(network, checkpoint, folder)
    arrays = {name: array.astype(dtype or model.dtype) for name, array in checkpoint.arrays(names).items()}
    _require_finite(arrays, checkpoint)
    network.load_weights([(path, arrays[name]) for name, path in names.items()])
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


def _require_finite(arrays: dict[str, mx.array], checkpoint: Checkpoint) -> None:
    for name, array in arrays.items():
        if not mx.isfinite(array).all().item():
            dtype = str(array.dtype).removeprefix("mlx.core.")
            raise InputError(
                f"{checkpoint.tensors[name].shard}: tensor {name} holds numbers that are not finite in {dtype}"
            )


def quantise(network: BlockNetwork, bits: int, where: str) -> None:
    """All matrices but those of the heads. Raises InputError if no group divides them."""
    layers = [module for path, module in network.named_modules() if _is_quantised(path, module)]
    widths = {module.weight.shape[-1] for module in layers}
    try:
        group = common_group(widths)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    nn.quantize(network, group_size=group, bits=bits, class_predicate=_is_quantised)


def _is_quantised(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "_head" not in path


def write_into(network: BlockNetwork, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """A drafter in floats, as a training leaves it, into a folder that exists."""
    if any(isinstance(module, nn.QuantizedLinear) for module in network.modules()):
        raise ValueError("a quantised drafter cannot be written; its floats are gone")
    arrays = {path: array.astype(dtype) for path, array in tree_flatten(network.parameters())}
    save(folder / "model.safetensors", arrays, {"format": "pt"})
    config = as_json(network.config) | {"dtype": str(dtype).removeprefix("mlx.core.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

"""A checkpoint folder as float tensors of HF's tree, whatever it is stored as, slice by slice.

    config.json, headers --open--> Source --tensors--> {HF's name: FloatTensor} --read(first, last)--> floats

    kept as        by module                                                        values
    float          weight F32, F16, BF16                                            as stored
    MLX            weight U32, scales, biases; `quantization` in config.json        mx.dequantize
    FP8            weight F8_E4M3 (R,C), weight_scale (R,1) or of one number        weight * weight_scale
    NVFP4          weight_packed U8 (R,C/2), weight_scale F8_E4M3 (R,C/16),         e2m1 * (weight_scale / global)
                   weight_global_scale F32, one number

FP8 and NVFP4 are compressed-tensors' formats `float-quantized` and `nvfp4-pack-quantized`, in that
library's order of operations. Two e2m1 numbers lie in a byte, the first in its low half. What the
header says of a module decides, as `ignore` and `targets` in config.json speak of module classes.
Scales of activations and caches (`input_global_scale`, `k_scale`, ...) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint import Checkpoint, TensorInfo, tensor_name
from ..config import ModelConfig, read_json
from ..errors import InputError, UsageError
from ..model import DiffusionGemma
from .names import expert_of, expert_parts, is_vision
from .recipes import Scheme
from .shards import CHUNK, Reader, to_mlx

FLOATS = ("F32", "F16", "BF16")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
NORM = "model.decoder.norm.weight"  # no quantisation touches it: its dtype is the checkpoint's
_OF_ACTIVATIONS = ("input_scale", "input_global_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_PARTS = {
    "float": ("weight",),
    "mlx": ("weight", "scales", "biases"),
    "compressed-tensors": ("weight", "weight_scale", "weight_packed", "weight_global_scale"),
}
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])  # the sign comes first
E2M1_PAIRS = _E2M1[[[byte & 15, byte >> 4] for byte in range(256)]]  # what each byte holds: (256, 2)


class ReadRaw(Protocol):
    """Reads rows [start, stop) of a stored tensor, all of them by default; BF16 may be uint16, F8 must be uint8."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray | mx.array: ...


@dataclass(frozen=True)
class Packed:
    """A matrix or stack by mx.quantize; `read`: rows [first, last) of the first axis of words, scales and biases."""

    scheme: Scheme
    read: Callable[[int, int], list[mx.array]]

    def dequantised(self, first: int, last: int) -> mx.array:
        return mx.dequantize(*self.read(first, last), **self.scheme.settings())


@dataclass(frozen=True)
class FloatTensor:
    """A tensor of HF's tree.

    Args:
        shape: of its floats.
        dtype: "F32", "F16" or "BF16": what they were before quantisation, and are if they are stored as floats.
        stored: what is read of the disk.
        read: rows [first, last) of the first axis as floats: stored ones as they are, MLX's as mx.dequantize gives
            them, compressed-tensors' in float32.
        packed: the same as MLX has it quantised, None of what is not.
    """

    shape: tuple[int, ...]
    dtype: str
    stored: tuple[TensorInfo, ...]
    read: Callable[[int, int], mx.array]
    packed: Packed | None = None


Parts = dict[str, TensorInfo]  # the stored tensors of a module by the last part of their names, "" if that is none


class Source:
    """An open checkpoint folder.

    Attributes:
        raw, config: config.json, as it is and parsed.
        form: "float", "mlx" or "compressed-tensors".
        dtype: of what is not quantised.
    """

    def __init__(self, folder: Path, raw: Mapping[str, Any], read_raw: ReadRaw | None):
        self.folder, self.raw = folder, raw
        self.config = ModelConfig.from_dict(raw, str(folder / "config.json"))
        self.form = _form(raw, str(folder / "config.json"))
        self.checkpoint = Checkpoint(folder)
        self._read_raw = read_raw or Reader(self.checkpoint.tensors).view
        if NORM not in self.checkpoint.tensors:
            raise InputError(f"{folder}: tensor {NORM} is missing")
        self.dtype = self._plain(self.checkpoint.tensors[NORM]).dtype
        self._tensors = self._assemble()

    @classmethod
    def open(cls, folder: str | Path, read_raw: ReadRaw | None = None) -> Source:
        """Read config.json and the headers of the shards, and check that together they are a whole model.

        Args:
            read_raw: how tensors are read; by default from mapped files.

        Raises:
            InputError: one line that names the file and the tensor or the key. Pickles are never loaded.
        """
        folder = Path(folder)
        raw = read_json(folder / "config.json")
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles and not any(folder.glob("model*.safetensors")):
            raise InputError(f"{folder}: its weights are pickles ({pickles[0]}), which can run code and are not loaded")
        return cls(folder, raw, read_raw)

    def tensors(self) -> dict[str, FloatTensor]:
        """All tensors by HF's names: the text model's in its order, then the vision tower's."""
        return dict(self._tensors)

    # what there is

    def _assemble(self) -> dict[str, FloatTensor]:
        found: dict[str, FloatTensor] = {}
        experts: dict[str, dict[str, FloatTensor]] = {}  # of one module each: by stack, then by module
        for stem, parts in self._modules().items():
            tensor = self._decode(stem, parts)
            if place := expert_of(stem):
                experts.setdefault(place[0], {})[stem] = tensor
            else:
                found[stem if "" in parts else tensor_name(f"{stem}.weight")] = tensor
        expected = text_shapes(self.config, str(self.folder / "config.json"))
        for name, modules in experts.items():
            info = next(iter(modules.values())).stored[0]
            if name in found:
                raise InputError(f"{info.shard}: tensor {info.name} and {name} are there, which say the same")
            if name not in expected:
                raise _no_place(info)
            found[name] = self._stack(name, modules, expected[name])
        self._check(found, expected)
        return {name: found[name] for name in [*expected, *filter(is_vision, found)]}

    def _modules(self) -> dict[str, Parts]:
        """The stored tensors, those of a module together."""
        modules: dict[str, Parts] = {}
        for name, info in self.checkpoint.tensors.items():
            if not name.isprintable():
                raise InputError(f"{info.shard}: {name!r:.200} is no name of a tensor")
            stem, _, part = name.rpartition(".")
            if self.form == "compressed-tensors" and part in _OF_ACTIVATIONS:
                continue
            stem, part = (stem, part) if part in _PARTS[self.form] else (name, "")
            modules.setdefault(stem, {})[part] = info
        return modules

    def _check(self, found: Mapping[str, FloatTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor that config.json calls for is there, with its shape, and no other outside of vision."""
        for name in sorted(expected.keys() - found.keys()):
            raise InputError(f"{self.folder}: tensor {name} is missing, which config.json calls for")
        for name, tensor in sorted(found.items()):
            info = tensor.stored[0]
            if name not in expected and not is_vision(name):
                raise _no_place(info)
            if tensor.shape != expected.get(name, tensor.shape):
                raise InputError(
                    f"{info.shard}: tensor {info.name} has the shape {tensor.shape}, config.json calls for "
                    f"{expected[name]}"
                )

    def _stack(self, name: str, modules: Mapping[str, FloatTensor], shape: tuple[int, ...]) -> FloatTensor:
        """Experts of one module each as the stack (E, R, C) that HF's tree has."""
        parts = expert_parts(name, min(shape[0], len(modules) + 1))  # enough to find one that is missing
        for part in parts:
            if part.name not in modules:
                raise InputError(f"{self.folder}: tensor {part.name}.weight is missing, which config.json calls for")
            rows = shape[1] if part.half is None else shape[1] // 2
            if modules[part.name].shape != (rows, shape[2]):
                raise InputError(
                    f"{self.folder}: {part.name} has the shape {modules[part.name].shape}, config.json calls for "
                    f"{(rows, shape[2])}"
                )
        for stem in sorted(modules.keys() - {part.name for part in parts}):
            raise InputError(f"{self.folder}: {stem} is one expert too many: config.json has {shape[0]}")
        each = len(parts) // shape[0]  # modules of an expert

        def read(first: int, last: int) -> mx.array:
            chosen = [modules[part.name] for part in parts[first * each : last * each]]
            return mx.concatenate([one.read(0, one.shape[0]) for one in chosen]).reshape(-1, *shape[1:])

        stored = tuple(info for part in parts for info in modules[part.name].stored)
        return FloatTensor(shape, modules[parts[0].name].dtype, stored, read)

    # how its values are had

    def _decode(self, stem: str, parts: Parts) -> FloatTensor:
        if self.form == "mlx" and parts.keys() & {"scales", "biases"}:
            return self._mlx(stem, parts)
        if parts.keys() & {"weight_packed", "weight_global_scale"}:
            return self._nvfp4(stem, parts)
        is_f8 = "weight" in parts and parts["weight"].dtype.startswith("F8")
        if "weight_scale" in parts or (self.form == "compressed-tensors" and is_f8):
            return self._fp8(stem, parts)
        if len(parts) > 1:  # an expert stack, with and without .weight
            raise InputError(f"{self.folder}: tensors {stem} and {stem}.weight are there, which say the same")
        return self._plain(*parts.values())

    def _rows(self, info: TensorInfo, first: int = 0, last: int | None = None) -> mx.array:
        raw = self._read_raw(info.name, first, last)
        return raw if isinstance(raw, mx.array) else to_mlx(raw, info.dtype)

    def _plain(self, info: TensorInfo) -> FloatTensor:
        if info.dtype not in FLOATS:
            hint = "; config.json says nothing of quantisation" if self.form == "float" else ""
            raise InputError(f"{info.shard}: tensor {info.name} is {info.dtype}, not F32, F16 or BF16{hint}")

        def read(first: int, last: int) -> mx.array:
            return self._rows(info, first, last) if info.shape else self._rows(info)

        return FloatTensor(info.shape, info.dtype, (info,), read)

    def _mlx(self, stem: str, parts: Parts) -> FloatTensor:
        """By mx.quantize: words (..., C * bits / 32), scales and, in affine mode, biases (..., C / group size)."""
        scheme = self._scheme(stem)
        if scheme.mode == "affine":
            stored = self._need(stem, parts, weight=("U32",), scales=FLOATS, biases=FLOATS)
        else:
            stored = self._need(stem, parts, weight=("U32",), scales=("U8",))
        weight, *others = stored
        shape = (*weight.shape[:-1], weight.shape[-1] * 32 // scheme.bits) if len(weight.shape) > 1 else (0,)
        groups = (*shape[:-1], shape[-1] // scheme.group_size)
        is_cut = all(shape) and scheme.divides(shape)
        if not is_cut or any(info.shape != groups or info.dtype != others[0].dtype for info in others):
            found = ", ".join(f"{info.dtype} {info.shape}" for info in stored)
            raise InputError(
                f"{weight.shard}: {stem} ({found}) is not {scheme.bits} bits in groups of {scheme.group_size}, "
                "which config.json says it is"
            )

        packed = Packed(scheme, lambda first, last: [self._rows(info, first, last) for info in stored])
        dtype = others[0].dtype if scheme.mode == "affine" else self.dtype
        return FloatTensor(shape, dtype, stored, packed.dequantised, packed)

    def _scheme(self, stem: str) -> Scheme:
        """A module's own settings, where nn.quantize takes no mode for affine, or else those for all."""
        block, where = _settings(self.raw), self.folder / "config.json"
        own = block.get(stem, block)
        if not isinstance(own, dict):
            raise InputError(f"{where}: quantization of {stem} is {own!r}, but its tensors are quantised")
        try:
            return Scheme.of(own.get("mode"), own.get("bits"), own.get("group_size"))
        except UsageError as error:
            raise InputError(f"{where}: quantization{f' of {stem}' if own is not block else ''}: {error}") from None

    def _fp8(self, stem: str, parts: Parts) -> FloatTensor:
        weight, scale = stored = self._need(stem, parts, weight=("F8_E4M3",), weight_scale=FLOATS)
        is_shared = scale.size == 1
        if len(weight.shape) != 2 or not (is_shared or scale.shape == (weight.shape[0], 1)):
            raise InputError(
                f"{scale.shard}: tensor {scale.name} has the shape {scale.shape}; one scale per row of {weight.shape}, "
                "or one for all, can be read"
            )

        def read(first: int, last: int) -> mx.array:
            factor = self._rows(scale).reshape(()) if is_shared else self._rows(scale, first, last)
            return mx.from_fp8(self._rows(weight, first, last), mx.float32) * factor.astype(mx.float32)

        return FloatTensor(weight.shape, self.dtype, stored, read)

    def _nvfp4(self, stem: str, parts: Parts) -> FloatTensor:
        packed, scale, total = stored = self._need(
            stem, parts, weight_packed=("U8",), weight_scale=("F8_E4M3",), weight_global_scale=("F32",)
        )
        rows, groups = scale.shape if len(scale.shape) == 2 else (0, 0)
        if packed.shape != (rows, groups * 8) or total.size != 1:
            raise InputError(
                f"{packed.shard}: {stem}: weight_packed {packed.shape}, weight_scale {scale.shape} and "
                f"weight_global_scale {total.shape} do not belong together"
            )

        def read(first: int, last: int) -> mx.array:
            values = mx.array(E2M1_PAIRS)[self._rows(packed, first, last)]
            factors = mx.from_fp8(self._rows(scale, first, last), mx.float32) / self._rows(total).reshape(())
            return (values.reshape(-1, groups, 16) * factors[..., None]).reshape(-1, groups * 16)

        return FloatTensor((rows, groups * 16), self.dtype, stored, read)

    def _need(self, stem: str, parts: Parts, **dtypes: tuple[str, ...]) -> tuple[TensorInfo, ...]:
        """The stored tensors of a module in this order, which must be these and of these dtypes."""
        for part in [part for part in dtypes if part not in parts]:
            raise InputError(f"{self.folder}: tensor {stem}.{part} is missing beside {' and '.join(sorted(parts))}")
        for part, info in parts.items():
            if part not in dtypes:
                raise _no_place(info)
            if info.dtype not in dtypes[part]:
                raise InputError(f"{info.shard}: tensor {info.name} is {info.dtype}, not {' or '.join(dtypes[part])}")
        return tuple(parts[part] for part in dtypes)


def _no_place(info: TensorInfo) -> InputError:
    return InputError(f"{info.shard}: tensor {info.name} has no place in the model of config.json")


def text_shapes(config: ModelConfig, where: str = "config.json") -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors but vision's by HF's names, taken from the model, which is built but never evaluated."""
    try:
        parameters = tree_flatten(DiffusionGemma(config).parameters())
    except (ValueError, TypeError, OverflowError, RuntimeError, MemoryError) as error:
        raise InputError(f"{where}: there is no model of these sizes ({' '.join(str(error).split())[:120]})") from None
    return {tensor_name(path): tuple(array.shape) for path, array in parameters}


def _settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's block on quantisation, under either name."""
    return raw.get("quantization") or raw.get("quantization_config") or {}


def _form(raw: Mapping[str, Any], where: str) -> str:
    """What kind of quantisation config.json speaks of. Raises InputError for kinds that cannot be read."""
    settings = _settings(raw)
    if not settings:
        return "float"
    method = settings.get("quant_method")
    if method == "compressed-tensors":
        _check_compressed(settings, where)
        return method
    if method is not None or "group_size" not in settings:
        raise InputError(
            f"{where}: quantised by {method or 'an unknown method'}, which cannot be read; give the checkpoint it was "
            "made from"
        )
    return "mlx"


def _check_compressed(settings: Mapping[str, Any], where: str) -> None:
    """Raises InputError, naming the format, unless all groups are FP8 with a scale per row (or one), or NVFP4."""
    for key in ("sparsity_config", "transform_config"):
        config = settings.get(key) or {}
        if not isinstance(config, dict) or (config.get("format", "dense") != "dense" or config.get("config_groups")):
            raise InputError(f"{where}: quantization_config.{key} is not supported")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise InputError(f"{where}: quantization_config.config_groups must be an object of objects")
    for group in groups.values():
        weights = group.get("weights")
        if weights is None:  # activations only
            continue
        kind = tuple(weights.get(key) for key in ("type", "num_bits", "strategy")) if isinstance(weights, dict) else ()
        is_fp8 = kind in (("float", 8, "channel"), ("float", 8, "tensor"))
        is_nvfp4 = kind == ("float", 4, "tensor_group") and weights.get("group_size") == 16
        if not (is_fp8 or is_nvfp4) or weights.get("symmetric") is False:
            named = group.get("format") or settings.get("format")
            raise InputError(
                f"{where}: compressed-tensors format {named!r} ({', '.join(map(str, kind))}) is not supported; "
                "FP8 with a scale per row (float-quantized) and nvfp4-pack-quantized are"
            )


def spans(tensor: FloatTensor, limit: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of the first axis, at most `limit` bytes of float32 (or one row) at a time."""
    count = tensor.shape[0] if tensor.shape else 1
    step = max(1, limit // (4 * prod(tensor.shape[1:])))
    for first in range(0, count, step):
        yield first, min(first + step, count)

"""What a checkpoint says about itself: `ModelConfig` and `GenerationConfig`, parsed and validated.

Both spellings of config.json are read, and every key that transformers leaves out gets
the default of transformers' class (`DiffusionGemmaTextConfig`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any

from .errors import InputError, UsageError

SLIDING, FULL = "sliding_attention", "full_attention"
MODEL_TYPE = "diffusion_gemma"
LEAST_TEMPERATURE = 1e-6
LARGEST_BIAS = 1e30  # float32 holds the sum

DEFAULT_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The attention of one layer: its kind, its head sizes and its rotary embedding."""

    kind: str
    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rotary_factor: float  # the share of the frequencies that turn

    @property
    def is_sliding(self) -> bool:
        return self.kind == SLIDING


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a DiffusionGemma, with one `LayerConfig` per layer."""

    vocab_size: int = 262_144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_attention_heads: int = 8
    sliding_window: int = 512
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131_072
    final_logit_softcapping: float = 30.0
    canvas_length: int = 256
    layers: tuple[LayerConfig, ...]
    pad_token_id: int | None = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = ()
    image_token_ids: tuple[int, ...] = (255_999, 258_880, 258_882)
    quantization: Mapping[str, Any] | None = None

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> list[int | None]:
        """How many rows before a position each layer may see; None: all."""
        return [self.sliding_window - 1 if layer.is_sliding else None for layer in self.layers]

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Of a checkpoint's folder. Raises InputError naming its config.json and what is wrong in it."""
        path = folder / "config.json"
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Parse config.json. Raises InputError naming the key that is missing or unsupported."""
        if raw.get("model_type") != MODEL_TYPE:
            raise InputError(f"{where}: model_type is {raw.get('model_type')!r}, this package runs {MODEL_TYPE!r}")
        text = _object(raw, "text_config", where)
        _refuse_unsupported(raw, text, where)
        values: dict[str, Any] = {name: text[name] for name in _TEXT_KEYS if text.get(name) is not None}
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if name not in values:
                raise InputError(f"{where}: text_config.{name} is missing; it has no default")
        if raw.get("canvas_length") is not None:
            values["canvas_length"] = raw["canvas_length"]
        for name, value in values.items():
            _check_size(name, value, where)
        for name in ("pad_token_id", "bos_token_id"):
            if text.get(name) is not None:
                values[name] = as_ids(text[name], name, where)[0]
        if text.get("eos_token_id") is not None:
            values["eos_token_ids"] = as_ids(text["eos_token_id"], "eos_token_id", where)
        image = (raw.get("boi_token_id", 255_999), raw.get("image_token_id", 258_880), raw.get("eoi_token_id", 258_882))
        config = cls(
            **values,
            layers=_layers(text, where),
            image_token_ids=tuple(i for i in image if i is not None),
            quantization=_object(raw, "quantization", where) or _object(raw, "quantization_config", where) or None,
        )
        config._validate(where)
        return config

    def _validate(self, where: str) -> None:
        if self.top_k_experts > self.num_experts:
            raise InputError(f"{where}: top_k_experts {self.top_k_experts} exceeds num_experts {self.num_experts}")
        for index, layer in enumerate(self.layers):
            if self.num_attention_heads % layer.num_key_value_heads:
                raise InputError(
                    f"{where}: layer {index} has {layer.num_key_value_heads} key/value heads, "
                    f"which do not divide {self.num_attention_heads} query heads"
                )
            if layer.head_dim % 2:
                raise InputError(f"{where}: layer {index} has an odd head_dim {layer.head_dim}")


_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "sliding_window",
    "num_experts",
    "top_k_experts",
    "moe_intermediate_size",
    "rms_norm_eps",
    "max_position_embeddings",
    "final_logit_softcapping",
)


def _object(raw: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """A nested object of a configuration; absent or null: an empty one."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} must be an object, not {value!r}")
    return value


def _check_size(name: str, value: Any, where: str) -> None:
    is_real = name in ("rms_norm_eps", "final_logit_softcapping") and type(value) is float and math.isfinite(value)
    if not (type(value) is int or is_real) or value <= 0:
        raise InputError(f"{where}: {name} must be a positive {'' if is_real else 'whole '}number, not {value!r}")


def _refuse_unsupported(raw: Mapping[str, Any], text: Mapping[str, Any], where: str) -> None:
    supported = {
        "use_bidirectional_attention": (None, "vision", False),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
        "attention_bias": (None, False),
        "tie_word_embeddings": (None, True),
    }
    for key, values in supported.items():
        if text.get(key) not in values:
            raise InputError(f"{where}: text_config.{key} = {text[key]!r} is not supported")
    if raw.get("tie_word_embeddings") is False:
        raise InputError(f"{where}: tie_word_embeddings = false is not supported")


def _layers(text: Mapping[str, Any], where: str) -> tuple[LayerConfig, ...]:
    """Kinds, head sizes and rotary embedding of every layer, from either spelling."""
    count = text.get("num_hidden_layers", 30)
    _check_size("num_hidden_layers", count, where)
    kinds = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise InputError(f"{where}: layer_types must name {count} layers, each {SLIDING!r} or {FULL!r}")
    kinds = [*kinds[:-1], FULL]  # the reference forces the last layer to full attention
    heads = {"head_dim": text.get("head_dim", 256), "num_key_value_heads": text.get("num_key_value_heads", 4)}
    full = {"head_dim": text.get("global_head_dim") or 512}
    if text.get("num_global_key_value_heads"):
        full["num_key_value_heads"] = text["num_global_key_value_heads"]
    per_layer = _object(text, "per_layer_config", where) if text.get("per_layer_config") is not None else None
    rope = _object(text, "rope_parameters", where) or DEFAULT_ROPE
    layers = []
    for index, kind in enumerate(kinds):
        if per_layer is not None:
            overrides = _object(per_layer, str(index), f"{where}: per_layer_config")
        else:
            overrides = full if kind == FULL else {}
        sizes = heads | {key: overrides[key] for key in heads if overrides.get(key) is not None}
        for name, value in sizes.items():
            _check_size(name, value, f"{where}: layer {index}")
        layers.append(LayerConfig(kind=kind, **sizes, **_rotary(_object(rope, kind, where), kind, where)))
    return tuple(layers)


def _rotary(parameters: Mapping[str, Any], kind: str, where: str) -> dict[str, float]:
    parameters = parameters or DEFAULT_ROPE[kind]
    expected = DEFAULT_ROPE[kind]["rope_type"]
    if parameters.get("rope_type", expected) != expected:
        raise InputError(f"{where}: rope_type {parameters['rope_type']!r} for {kind} is not supported")
    if parameters.get("factor", 1.0) != 1.0:
        raise InputError(f"{where}: a rope factor of {parameters['factor']} for {kind} is not supported")
    factor = parameters.get("partial_rotary_factor", 1.0)
    if not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise InputError(f"{where}: partial_rotary_factor for {kind} must lie in 0-1, not {factor!r}")
    if kind == SLIDING and factor != 1.0:
        raise InputError(f"{where}: partial_rotary_factor {factor} for {kind} is not supported")
    theta = parameters.get("rope_theta")
    if not isinstance(theta, (int, float)) or theta <= 0:
        raise InputError(f"{where}: rope_theta for {kind} must be a positive number, not {theta!r}")
    return {"rope_theta": float(theta), "rotary_factor": float(factor)}


def as_ids(value: Any, name: str, where: str) -> tuple[int, ...]:
    """An id or a list of ids, as a tuple."""
    ids = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise InputError(f"{where}: {name} must be a token id or a list of them, not {value!r}")
    return ids


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampler options of both modes, with transformers' names and the reference's defaults."""

    max_new_tokens: int = 256
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    # diffusion mode
    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    # ar mode, with Gemma 4's defaults
    temperature: float = 1.0  # 0: greedy
    top_p: float = 0.95
    top_k: int = 64  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int = 20  # tokens that the penalty looks back, as in mlx_lm
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "generation_config.json") -> GenerationConfig:
        """Parse generation_config.json; nulls mean the defaults, the entropy bound is nested."""
        names = {field.name for field in fields(cls)} - {"eos_token_ids", "pad_token_id", "logit_bias"}
        values = {name: raw[name] for name in names & raw.keys() if raw[name] is not None}
        sampler = _object(raw, "sampler_config", where)
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            raise InputError(f"{where}: sampler {sampler['_cls_name']!r} is not supported")
        if sampler.get("entropy_bound") is not None:
            values["entropy_bound"] = sampler["entropy_bound"]
        if raw.get("do_sample") is False:
            values["temperature"] = 0.0
        if raw.get("eos_token_id") is not None:
            values["eos_token_ids"] = as_ids(raw["eos_token_id"], "eos_token_id", where)
        if raw.get("pad_token_id") is not None:
            values["pad_token_id"] = as_ids(raw["pad_token_id"], "pad_token_id", where)[0]
        try:
            return cls().replace(**values)
        except UsageError as error:
            raise InputError(f"{where}: {error}") from None

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with `options` (None: keep). Raises UsageError for a value out of range."""
        changed = replace(self, **{name: value for name, value in options.items() if value is not None})
        changed._validate()
        return changed

    def _validate(self) -> None:
        for name in _WHOLE:
            _require(self, name, type(getattr(self, name)) is int, "must be a whole number")
        for name in _REAL:
            value = getattr(self, name)
            is_number = isinstance(value, Real) and not isinstance(value, bool)
            _require(self, name, is_number and math.isfinite(value), "must be a finite number")
        for name in _POSITIVE:
            _require(self, name, getattr(self, name) > 0, "must be greater than 0")
        _require(self, "t_max", self.t_max >= LEAST_TEMPERATURE, f"must be at least {LEAST_TEMPERATURE}")
        for name in ("t_min", "stability_threshold", "temperature", "top_k", "min_p"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        _require(self, "t_min", self.t_min < self.t_max, f"must be below t_max, which is {self.t_max}")
        for name in ("top_p", "min_p"):
            _require(self, name, getattr(self, name) <= 1, "must be at most 1")
        _require(self, "temperature", self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE, _TOO_COLD)
        _check_bias(self.logit_bias)


_WHOLE = ("max_new_tokens", "max_denoising_steps", "stability_threshold", "top_k", "repetition_context_size")
_REAL = (
    *("entropy_bound", "t_min", "t_max", "confidence_threshold"),
    *("temperature", "top_p", "min_p", "repetition_penalty"),
)
_POSITIVE = (
    *("max_new_tokens", "max_denoising_steps", "entropy_bound", "confidence_threshold"),
    *("top_p", "repetition_penalty", "repetition_context_size"),
)
_TOO_COLD = f"must be 0 (greedy) or at least {LEAST_TEMPERATURE}"


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias must map token ids to numbers, not {bias!r:.80}")
    for token, value in bias.items():
        if type(token) is not int or token < 0:
            raise UsageError(f"logit_bias must have token ids as keys, not {token!r}")
        if not isinstance(value, Real) or isinstance(value, bool) or not abs(value) < LARGEST_BIAS:
            raise UsageError(f"logit_bias of id {token} must be a number of less than {LARGEST_BIAS:g}, not {value!r}")


def _require(config: GenerationConfig, name: str, holds: bool, otherwise: str) -> None:
    if not holds:
        raise UsageError(f"{name} {otherwise}, not {getattr(config, name)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a checkpoint folder needs it") from None
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, and numbers of too many digits
        raise InputError(f"{path}: not JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return value

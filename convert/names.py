"""Names of tensors in the trees between which a converter moves them. Pure: no file is read here.

    HF (google)                       MLX (ours, mlx-community)          per expert (compressed-tensors)
    L.experts.gate_up_proj  (E,2W,H)  L.experts.gate_up_proj.weight      L.experts.K.{gate_proj,up_proj}.weight  (W,H)
    L.experts.down_proj     (E,H,W)   L.experts.down_proj.weight         L.experts.K.down_proj.weight            (H,W)
    all others                        the same                           the same

L is `model.decoder.layers.N`. A *module* is an MLX path without its last part, which is `weight`
and, if the module is quantised, `scales` and `biases`. In the fused stack, the rows of gate come
first. The per-expert names are those of llm-compressor's export, as in
RedHatAI/diffusiongemma-26B-A4B-it-FP8-dynamic.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checkpoint import VISION, module_name, tensor_name
from ..errors import InputError

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
_TREE = re.compile(
    r"""
    model\.decoder\.(
        (embed_tokens | norm | self_conditioning\.(pre_norm | gate_proj | up_proj | down_proj))\.weight
      | layers\.\d+\.(
            layer_scalar | router\.(proj\.weight | scale | per_expert_scale) | experts\.(gate_up_proj | down_proj)
          | (self_attn\.([qkvo]_proj | [qk]_norm) | mlp\.(gate | up | down)_proj)\.weight
          | (input | post_attention | pre_feedforward | post_feedforward)_layernorm\.weight
          | (pre_feedforward_layernorm_2 | post_feedforward_layernorm_[12])\.weight
        )
    )
  | model\.encoder\.language_model\.layers\.\d+\.layer_scalar
  | model\.encoder\.(vision_tower | embed_vision)(\.\w+)+
    """,
    re.VERBOSE,
)
_EXPERT = re.compile(r"(.+\.experts)\.(0|[1-9]\d{0,5})\.(gate|up|down)_proj")
_QUANTISED = re.compile(r"(.+)\.(weight|scales|biases)")


@dataclass(frozen=True)
class Part:
    """A tensor that is one expert and/or one half of the rows of a stack (E, rows, columns); None: all of them."""

    name: str
    expert: int | None = None
    half: int | None = None  # 0: gate, 1: up

    def slices(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where it lies in a stack of this shape."""
        place = [slice(0, size) for size in shape]
        if self.expert is not None:
            place[0] = slice(self.expert, self.expert + 1)
        if self.half is not None:
            middle = shape[1] // 2
            place[1] = slice(self.half * middle, (self.half + 1) * middle)
        return tuple(place)


def mlx_name(name: str) -> str:
    """HF -> MLX. Raises InputError for a name that is not in HF's tree."""
    if not _TREE.fullmatch(name):
        raise InputError(f"tensor {name!r} has no place in DiffusionGemma")
    return module_name(name)


def hf_name(path: str) -> str:
    """MLX -> HF, the inverse of `mlx_name`, of unquantised tensors. Raises InputError as that does."""
    name = tensor_name(path)
    if mlx_name(name) != path:
        raise InputError(f"tensor {path!r} has no place in DiffusionGemma as MLX has it")
    return name


def module_of(name: str) -> str:
    """HF's name of a weight -> its module."""
    return mlx_name(name).removesuffix(".weight")


def weight_of(module: str) -> str:
    """A module -> HF's name of its weight, the inverse of `module_of`."""
    return hf_name(f"{module}.weight")


def is_vision(name: str) -> bool:
    return name.startswith(VISION)


def expert_parts(stack: str, experts: int) -> list[Part]:
    """The modules, one per expert and projection, that make up a stack (HF's name), in the order of its rows."""
    base, projection = mlx_name(stack).removesuffix("_proj.weight").rsplit(".", 1)
    halves = [("gate", 0), ("up", 1)] if projection == "gate_up" else [(projection, None)]
    return [Part(f"{base}.{k}.{kind}_proj", k, half) for k in range(experts) for kind, half in halves]


def expert_of(module: str) -> tuple[str, Part] | None:
    """The inverse of `expert_parts`: a module per expert -> HF's name of its stack and its place there, else None."""
    match = _EXPERT.fullmatch(module)
    if not match:
        return None
    base, expert, kind = match.groups()
    half = {"gate": 0, "up": 1, "down": None}[kind]
    return f"{base}.{'down' if kind == 'down' else 'gate_up'}_proj", Part(module, int(expert), half)


def gemma4_name(name: str) -> str | None:
    """HF -> the Gemma 4 text model of transformers and mlx_lm; None for what the causal pass does not use.

    What runs causally over a prefix is Gemma 4 with experts, its `layer_scalar`s those of the encoder
    and all else the decoder's. mlx_lm splits float stacks when it loads them.
    """
    mlx_name(name)
    if is_vision(name):
        return None
    if name.startswith(ENCODER):  # nothing but layer_scalars
        return "model." + name.removeprefix(ENCODER)
    is_causal = "self_conditioning" not in name and not name.endswith("layer_scalar")
    return "model." + name.removeprefix(DECODER) if is_causal else None


def gemma4_parts(path: str) -> list[Part]:
    """MLX -> mlx_lm's Gemma 4 text model, for quantised modules as well; none for what the causal pass does not use.

    mlx_lm has experts as `experts.switch_glu.{gate,up,down}_proj`, and its `sanitize` renames float
    stacks only: quantised ones must be stored under these names, `gate_up_proj` as two halves. Groups
    lie along the columns, so the same rows of weight, scales and biases make each half.
    """
    match = _QUANTISED.fullmatch(path)
    module, kind = match.groups() if match else (path, "")
    name = gemma4_name(weight_of(module) if match else hf_name(path))
    if name is None:
        return []
    base, _, projection = name.partition(".experts.")
    if projection == "gate_up_proj":
        return [Part(f"{base}.experts.switch_glu.{p}_proj.{kind}", half=half) for half, p in enumerate(("gate", "up"))]
    if projection:
        return [Part(f"{base}.experts.switch_glu.{projection}.{kind}")]
    return [Part(f"{name.removesuffix('.weight')}.{kind}" if kind else name)]


def gemma4_modules(module: str) -> list[str]:
    """A module -> those it becomes in mlx_lm's Gemma 4, for its `quantization` block."""
    return [part.name.removesuffix(".weight") for part in gemma4_parts(f"{module}.weight")]

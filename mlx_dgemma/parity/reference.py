"""transformers' DiffusionGemma as a reference: made, loaded, in float64, and listened to while it generates.

The only module here that imports torch and transformers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from ..config import GenerationConfig
from ..errors import InputError, UsageError
from ..options import sampler_options
from .bundle import blocks
from .shapes import Shape

try:
    import torch
    import transformers
    from torch.overrides import TorchFunctionMode
    from transformers import DynamicCache
    from transformers.models.diffusion_gemma import configuration_diffusion_gemma as configuration
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as modeling
except ImportError as error:
    raise InputError(
        f"recording needs torch and transformers >= 5.17 ({error}); pip install 'mlx-dgemma[reference]'"
    ) from None

Reference = modeling.DiffusionGemmaForBlockDiffusion
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
LEAST_VISION = {  # checkpoints have a vision tower; nothing here runs it
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "patch_size": 1,
    "position_embedding_size": 4,
}
NEIGHBOURS = 3  # further float32 runs that the noise floor is taken from
NUDGED_AT_ONCE = 1 << 24  # weights
DRAFTED, RIGHT = 6, 3  # tokens of the block that is verified, and how many of them are right
BRANCH_NORMS = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")


@dataclass(frozen=True)
class Run:
    """What is asked of the reference."""

    name: str  # of the model, as check can find it again
    prompt: np.ndarray  # (B, L) ids
    sampling: GenerationConfig
    seed: int


def device_memory(device: str) -> int | None:
    """Free bytes of a CUDA device, None of a CPU. Raises UsageError if there is no such device."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no CUDA device here; use --device cpu")
    return torch.cuda.mem_get_info()[0]


def load_reference(folder: Path, device: str, dtype: str = "float32") -> Reference:
    """The model in evaluation mode, nothing in it fused and nothing rounded to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    model = Reference.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
    )
    return model.to(device).eval()


@contextmanager
def with_sdpa(model: Reference) -> Iterator[Reference]:
    """The same model with torch's own attention kernels."""
    model.set_attn_implementation("sdpa")
    try:
        yield model
    finally:
        model.set_attn_implementation("eager")


def save_random(shape: Shape, random: torch.Generator, folder: Path) -> None:
    text = configuration.DiffusionGemmaTextConfig(**copy.deepcopy(shape.text))
    config = configuration.DiffusionGemmaConfig(
        text_config=text.to_dict(), vision_config=dict(LEAST_VISION), canvas_length=shape.canvas_length
    )
    model = Reference(config)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
            tensor.copy_(_spread(name, tensor, shape, random))
    model.to(torch.bfloat16).save_pretrained(folder)  # half the size; float32 holds the same values
    if shape.spelled_out:
        _respell(folder / "config.json", shape)


def _spread(name: str, tensor: torch.Tensor, shape: Shape, random: torch.Generator) -> torch.Tensor:
    """Random values of a size at which every parameter matters and nothing saturates."""
    uniform = 2 * torch.rand(tensor.shape, generator=random) - 1  # (-1, 1)
    if name.endswith("layer_scalar"):
        return shape.scalar * (1 + 0.2 * uniform)
    if name.endswith("embed_tokens.weight") or name == "lm_head.weight":
        return shape.embedding * 3**0.5 * uniform
    if tensor.ndim < 2:  # norms and the router's scales
        size = shape.branch if name.endswith(BRANCH_NORMS) else 1.0
        return size * (1 + 0.4 * uniform)
    size = 3.0 if name.endswith("router.proj.weight") else 1.0
    return size * 3**0.5 * uniform * (1 if "router" in name else tensor.shape[-1] ** -0.5)


def _respell(path: Path, shape: Shape) -> None:
    """Write config.json as it was before `per_layer_config`, without the keys that have defaults."""
    config = json.loads(path.read_text())
    text = config["text_config"]
    for key in ("per_layer_config", "layer_types", "rope_parameters"):
        text.pop(key, None)
    text |= {key: shape.text[key] for key in ("global_head_dim", "num_global_key_value_heads")}
    path.write_text(json.dumps(config, indent=2) + "\n")


# --- truth


NARROW = (torch.float32, torch.bfloat16, torch.float16)


class _KeepFloat64(TorchFunctionMode):
    """What begins in float64 stays there, whatever it meets and whatever is asked of it.

    Token embeddings are widened as they are looked up, weights each for the one product that needs
    it, and a request for a narrower dtype gets float64: the reference makes them in norms, softmax
    and logits. Cosines are taken in float64 too, but of float32 angles: those, as the product of
    position and inverse frequency, define the model.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.embedding:
            return function(*args, **kwargs).double()
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is not None and function in (torch.Tensor.cos, torch.Tensor.sin):
            return function(first.double())
        if first is not None and first.dtype == torch.float64:
            if function is torch.Tensor.float:
                return first
            args = [first, *map(_widened, args[1:])]
            kwargs = {key: _widened(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in NARROW else value
    return value.double() if isinstance(value, torch.Tensor) and value.dtype in NARROW else value


@contextmanager
def in_float64(model: Reference) -> Iterator[Reference]:
    """The same model, computing in float64 throughout: no more than one weight is held in it at a time."""
    scales = [module for module in model.modules() if hasattr(module, "scalar_embed_scale")]
    before = [module.embed_scale for module in scales]
    for module in scales:  # the factor as float32 has it, whatever the weights are in
        module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float32).double()
    try:
        with _KeepFloat64():
            yield model
    finally:
        for module, scale in zip(scales, before, strict=True):
            module.embed_scale = scale


def neighbours(model: Reference, seed: int) -> Iterator[Reference]:
    """The same model, in float32, with every weight moved to a neighbouring number, and moved back afterwards.

    One float32 run is one draw of its rounding errors, and where a canvas amplifies a single one of
    them, two equally good runs are often apart by more than the ratio that is allowed. Several runs
    show what float32 can do.
    """
    for number in range(NEIGHBOURS):
        _nudge(model, seed + number, 1)
        try:
            yield model
        finally:
            _nudge(model, seed + number, -1)


@torch.no_grad()
def _nudge(model: Reference, seed: int, sign: int) -> None:
    """Move every weight up or down by one, drawn from `seed`; the opposite sign undoes it."""
    random = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        for weights in parameter.data.view(-1).split(NUDGED_AT_ONCE):
            up = torch.rand(weights.shape, generator=random, device=weights.device) < 0.5
            weights.copy_(torch.nextafter(weights, torch.where(up, sign * torch.inf, -sign * torch.inf)))


# --- decisions


@dataclass
class Story:
    """What `generate` drew and decided: steps[canvas][step] has arrays by name, each (B, C) or (B,).

    And a block (K + 1,) to verify behind the first row but its last token: that token, drafts of
    which the first `accepted` are greedy, and, in their place, `answer` is what is right.
    """

    prompt: np.ndarray
    steps: list[list[dict[str, np.ndarray]]]
    sequences: np.ndarray
    block: np.ndarray
    accepted: int
    answer: int

    def blocks(self) -> Iterator[np.ndarray]:
        """Ids that are encoded before each canvas."""
        return blocks(self.prompt, self.sequences, self.steps[0][0]["canvas"].shape[1], len(self.steps))


def generate_reference(model: Reference, run: Run) -> Story:
    """Run transformers' own `generate`, listening to its draws and decisions."""
    steps: list[list[dict[str, np.ndarray]]] = []
    draws: dict[str, torch.Tensor] = {}
    take_step, multinomial, uniform = (
        model._denoising_step,
        torch.multinomial,
        generation.EntropyBoundSampler.initialize_canvas,
    )

    def listen_tokens(*args, **kwargs):
        draws["token"] = multinomial(*args, **kwargs)
        return draws["token"]

    def listen_uniform(*args, **kwargs):
        draws["renoise"] = uniform(*args, **kwargs)
        return draws["renoise"]

    def listen_step(**given):
        if given["self_conditioning_logits"] is None:
            steps.append([])
        canvas, ran = given["current_canvas"].clone(), ~given["finished_denoising"]
        result = take_step(**given)
        step = {
            "canvas": canvas,
            "token": draws["token"].view(canvas.shape),
            "renoise": draws["renoise"],
            "accepted": given["sampler"].accepted_token_mask,
            "best": result[1],
            "ran": ran,
            "done": result[3],
        }
        steps[-1].append({name: value.cpu().numpy().copy() for name, value in step.items()})
        return result

    options = {name: value for name, value in vars(run.sampling).items() if name not in sampler_options("ar")}
    options["sampler_config"] = generation.EntropyBoundSamplerConfig(float(options.pop("entropy_bound")))
    options["eos_token_id"] = list(options.pop("eos_token_ids"))
    torch.manual_seed(run.seed)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(model, "_denoising_step", listen_step))
        patches.enter_context(mock.patch.object(torch, "multinomial", listen_tokens))
        patches.enter_context(mock.patch.object(generation.EntropyBoundSampler, "initialize_canvas", listen_uniform))
        prompt = torch.tensor(run.prompt, device=model.device)
        output = model.generate(prompt, generation_config=generation.DiffusionGemmaGenerationConfig(**options))
    return Story(run.prompt, steps, output.sequences.cpu().numpy(), *_drafted(model, output.sequences[:1]))


@torch.no_grad()
def _drafted(model: Reference, text: torch.Tensor) -> tuple[np.ndarray, int, int]:
    """A block to verify behind `text` (1, L), how many of its drafts are right, and the token after those."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    model.model.encoder(input_ids=text[:, :-1], past_key_values=cache)
    last, greedy = text[:, -1:], []
    for _ in range(RIGHT + 1):
        hidden = model.model.encoder(input_ids=last, past_key_values=cache).last_hidden_state
        last = model.lm_head(hidden).argmax(dim=-1)  # the softcap keeps the order
        greedy.append(int(last))
    answer = greedy.pop()
    wrong = [(answer + 1 + number) % model.config.text_config.vocab_size for number in range(DRAFTED - RIGHT)]
    return np.array([int(text[0, -1]), *greedy, *wrong], np.int64), RIGHT, answer

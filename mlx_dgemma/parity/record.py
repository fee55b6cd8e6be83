"""Record a run of transformers' DiffusionGemma: what it computes, draws and decides, and its own error.

The truth is the same code in float64. The decisions are those of a real `generate` in float32; both
precisions are then walked through them, and their difference is the noise floor of every quantity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..config import GenerationConfig, ModelConfig, read_json
from ..errors import InputError
from ..folders import new_folder
from ..loading import NANO, read_generation_config, resolve
from ..options import sampler_options
from . import bundle
from .reference import (  # which says what to install where torch is missing
    VERSIONS,
    DynamicCache,
    Reference,
    Run,
    Story,
    generate_reference,
    generation,
    in_float64,
    load_reference,
    neighbours,
    save_random,
    torch,
    transformers,
)
from .shapes import SAMPLING, Shape


def record_tiny(shape: Shape, name: str, out: Path, device: str = "cpu", seed: int | None = None) -> dict[str, Any]:
    """Make the random model of `shape` and record it, its checkpoint inside the bundle; returns bundle.json.

    Raises InputError if the run shows too little (see `record_checkpoint`), UsageError if `out` exists.
    """
    seed = shape.seed if seed is None else seed
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, shape.text["vocab_size"], (shape.batch, shape.prefix), generator=random).numpy()
    sampling = GenerationConfig().replace(
        **SAMPLING | {"max_new_tokens": shape.canvases * shape.canvas_length} | shape.sampling
    )
    with new_folder(out) as work, _one_thread():
        save_random(shape, random, work / "model")
        return _record(work / "model", Run(name, prompt, sampling, seed), work, device)


def record_checkpoint(
    model: str,
    out: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    prompt: str | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int | None = None,
    max_denoising_steps: int | None = None,
) -> dict[str, Any]:
    """Record a run of a checkpoint ("nano", a folder or a Hub id); returns bundle.json.

    Args:
        prompt: text, encoded without a template; random ids if None.
        prompt_length: how many of those; by default one and a half windows.
        max_new_tokens: by default two canvases.

    Raises:
        InputError: the run has fewer than two canvases or the first fewer than two steps: nothing
            then shows a cache that grows, or self-conditioning.
        UsageError: `out` exists, or an option is out of range.
    """
    folder = resolve(model)
    config = ModelConfig.from_dict(read_json(folder / "config.json"), str(folder / "config.json"))
    # with eos and pad filled in: where generate would look for them differs by version
    sampling = read_generation_config(folder, config).replace(
        max_new_tokens=max_new_tokens or 2 * config.canvas_length, max_denoising_steps=max_denoising_steps
    )
    if prompt is not None:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    else:
        length = prompt_length or config.sliding_window * 3 // 2
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
    name = model if model == NANO else folder.name
    with new_folder(out) as work:
        return _record(folder, Run(name, np.array([ids], np.int64), sampling, seed), work, device)


def _record(folder: Path, run: Run, work: Path, device: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    sizes = ModelConfig.from_dict(config, str(folder / "config.json"))
    columns = bundle.column_step(sizes.vocab_size)
    model = load_reference(folder, device)
    story = generate_reference(model, run)
    _check_story(story)
    single, choices = _walk(model, story, run, columns)
    _check_walk(story, single)
    with in_float64(model) as exact:
        truth, exact_choices = _walk(exact, story, run, columns)
    singles = [single, *(_walk(other, story, run, columns)[0] for other in neighbours(model, run.seed))]
    facts = {
        "model": run.name,
        "checkpoint": bundle.checkpoint_hash(folder),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "dtype": "float32",
        "seed": run.seed,
        "versions": VERSIONS,
        "config": config,
        "sampling": {name: value for name, value in vars(run.sampling).items() if name not in sampler_options("ar")},
        "canvases": [len(steps) for steps in story.steps],
        "columns": columns,
        "flips": sum(int((a != b).any(-1).sum()) for a, b in zip(choices, exact_choices, strict=True)),
        "floors": {name: _floor(name, singles, truth, story) for name in truth if bundle.is_judged(name)},
    }
    bundle.write(work, facts, _stored(truth, story))
    return facts


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of a tiny model are not worth sharing out, and come out alike on any number of cores."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


# --- quantities


class _Listener:
    """Keeps what layers, routers and self-conditioning hand on in one pass, rows `kept_rows` alone."""

    def __init__(self, model: Reference, batch: int):
        self.batch = batch
        self.seen: dict[str, np.ndarray] = {}
        self.choices: list[np.ndarray] = []  # the experts of every token, pass after pass
        self._model = model
        self._hooks: list[Any] = []

    def __enter__(self) -> _Listener:
        inner = self._model.model
        for stack in (inner.encoder.language_model, inner.decoder):
            for index, layer in enumerate(stack.layers):
                self._hooks.append(layer.register_forward_hook(self._hidden(f"layer.{index}")))
                self._hooks.append(layer.router.register_forward_hook(self._choice(index)))
            self._hooks.append(stack.norm.register_forward_hook(self._hidden("norm")))
        self._hooks.append(inner.decoder.self_conditioning.register_forward_hook(self._soft))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def keep(self, name: str, value: torch.Tensor) -> None:
        """Keep rows of (B, L, ...)."""
        kept = value[:, bundle.kept_rows(value.shape[1])].detach().cpu()
        self.seen[name] = (kept.double() if kept.is_floating_point() else kept.int()).numpy().copy()

    def collect(self, prefix: str) -> dict[str, np.ndarray]:
        """What was kept since the last call, under names of the pass."""
        seen, self.seen = self.seen, {}
        return {f"{prefix}/{name}": value for name, value in seen.items()}

    def _hidden(self, name: str):
        return lambda module, given, out: self.keep(name, out)

    def _soft(self, module, given, out) -> None:
        if given[1].any():  # zeros mean that there is none yet
            self.keep("soft", given[1])

    def _choice(self, index: int):
        def hook(module, given, out) -> None:
            probabilities, _, ids = out
            count = ids.shape[-1]
            ids = ids.sort(dim=-1).values.view(self.batch, -1, count)
            self.choices.append(ids.cpu().numpy())
            self.keep(f"router.{index}", ids)
            self.keep(f"margin.{index}", _margin(probabilities, count).view(self.batch, -1))

        return hook


def _margin(probabilities: torch.Tensor, count: int) -> torch.Tensor:
    """By which share the first expert not taken is below the last one taken; 1 if all are taken."""
    ranked = probabilities.sort(dim=-1, descending=True).values
    if ranked.shape[-1] == count:
        return torch.ones_like(ranked[:, 0])
    return 1 - ranked[:, count] / ranked[:, count - 1]


@torch.no_grad()
def _walk(model: Reference, story: Story, run: Run, columns: int) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Every quantity of the recorded run as this model computes it, in float64, and all routers' choices."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    quantities: dict[str, np.ndarray] = {}
    per_step: dict[str, list[np.ndarray]] = {}
    with _Listener(model, len(story.prompt)) as listener:
        for index, (block, steps) in enumerate(zip(story.blocks(), story.steps, strict=True)):
            ids = torch.tensor(block, device=model.device)
            hidden = model.model.encoder(input_ids=ids, past_key_values=cache).last_hidden_state
            listener.keep("logits", _softcapped(model, hidden)[..., ::columns])
            quantities |= listener.collect(f"encode.{index}")
            z = None
            for number, step in enumerate(steps):
                canvas = torch.tensor(step["canvas"], device=model.device)
                logits = model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=z).logits
                listener.keep("logits", logits[..., ::columns])
                seen = listener.collect(f"denoise.{index}.{number}")
                quantities |= seen if (index, number) in bundle.DETAILED else {}
                z = _processed(logits, run.sampling, number)
                for name, value in _decisive(z, run.sampling).items():
                    per_step.setdefault(name, []).append(value.cpu().numpy())
        quantities |= {f"steps/{name}": np.stack(values) for name, values in per_step.items()}
        return quantities, listener.choices


def _softcapped(model: Reference, hidden: torch.Tensor) -> torch.Tensor:
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden) / cap) * cap


def _processed(logits: torch.Tensor, sampling: GenerationConfig, number: int) -> torch.Tensor:
    schedule = generation.LinearTemperatureScheduleLogitsProcessor(
        sampling.t_min, sampling.t_max, sampling.max_denoising_steps
    )
    remaining = torch.tensor(sampling.max_denoising_steps - number, dtype=torch.int32, device=logits.device)
    return schedule(None, logits, remaining)


def _decisive(z: torch.Tensor, sampling: GenerationConfig) -> dict[str, torch.Tensor]:
    """What decisions rest on, and how far each is from turning: all (B, C)."""
    entropy = torch.distributions.Categorical(logits=z).entropy()
    top = z.topk(2, dim=-1)
    ascending, order = entropy.sort(dim=-1)
    before = ascending.cumsum(dim=-1) - ascending
    return {
        "entropy": entropy.double(),
        "peak": top.values[..., 0].double(),
        "argmax": top.indices[..., 0],
        "gap": top.values[..., 0] - top.values[..., 1],
        "slack": torch.zeros_like(entropy).scatter(-1, order, (before - sampling.entropy_bound).abs()),
    }


def _check_story(story: Story) -> None:
    """One canvas shows no cache that grows, one step no self-conditioning."""
    steps = story.steps
    if len(steps) < 2 or len(steps[0]) < 2:
        raise InputError(
            f"the run has {len(steps)} canvases and {len(steps[0])} steps in the first; it takes two of each: "
            "try another --seed or --max-new-tokens"
        )


def _check_walk(story: Story, single: dict[str, np.ndarray]) -> None:
    """The walk must be what generate did, or it says nothing about it."""
    steps = [step for canvas in story.steps for step in canvas]
    for number, (step, argmax) in enumerate(zip(steps, single["steps/argmax"], strict=True)):
        if (step["best"] != argmax)[step["ran"]].any():
            raise RuntimeError(f"denoising step {number}: the walk and generate disagree")


def _floor(name: str, singles: list[dict[str, np.ndarray]], truth: dict[str, np.ndarray], story: Story) -> dict:
    """The reference's own float32 error, the largest of several runs, where rows have not stopped."""
    ran = slice(None)
    if name.startswith("steps/"):
        ran = np.stack([step["ran"] for canvas in story.steps for step in canvas])
    exact = truth[name][ran]
    errors = [bundle.Error.between(single[name][ran], exact) for single in singles]
    largest = {key: max(getattr(error, key) for error in errors) for key in ("max", "rms")}
    return largest | {"scale": float(np.abs(exact).max()), "one_run": vars(errors[0])}


def _stored(quantities: dict[str, np.ndarray], story: Story) -> dict[str, np.ndarray]:
    """What goes into the bundle: margins in float32, ids in 32 bits, the truth in float64."""
    steps = [step for canvas in story.steps for step in canvas]
    arrays = {f"steps/{name}": np.stack([step[name] for step in steps]) for name in steps[0]}
    arrays |= {"prompt": story.prompt, "sequences": story.sequences}
    for name, array in quantities.items():
        arrays[name] = array if bundle.is_judged(name) or array.dtype != np.float64 else array.astype(np.float32)
    arrays.pop("steps/argmax")
    return {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in arrays.items()}

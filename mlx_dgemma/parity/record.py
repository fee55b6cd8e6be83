"""Record a run of transformers' DiffusionGemma: what it computes, draws and decides, and its own error.

The truth is the same code in float64. The decisions are those of a real `generate`, in the dtype that
is asked for; both precisions are then walked through them, and their difference is the noise floor of
every quantity: in float32, or in bfloat16 if that is what was asked for.

The model is in memory once. It is moved to the host for the truth, which widens one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..config import GenerationConfig, ModelConfig, read_json
from ..errors import InputError
from ..folders import new_folder
from ..loading import NANO, read_generation_config, resolve
from ..options import sampler_options
from . import bundle
from .observe import Walk, walk
from .reference import (  # which says what to install where torch is missing
    VERSIONS,
    Reference,
    Run,
    Story,
    device_memory,
    generate_reference,
    in_float64,
    load_reference,
    neighbours,
    save_random,
    torch,
    transformers,
    with_sdpa,
)
from .room import require_room
from .shapes import SAMPLING, Shape


def record_tiny(
    shape: Shape, name: str, out: Path, device: str = "cpu", seed: int | None = None, dtype: str = "float32"
) -> dict[str, Any]:
    """Make the random model of `shape` and record it, its checkpoint inside the bundle; returns bundle.json.

    Raises InputError if the run shows too little (see `record_checkpoint`), UsageError if `out` exists.
    """
    seed = shape.seed if seed is None else seed
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, shape.text["vocab_size"], (shape.batch, shape.prefix), generator=random).numpy()
    sampling = GenerationConfig().replace(
        **SAMPLING | {"max_new_tokens": shape.canvases * shape.canvas_length} | shape.sampling
    )
    device_memory(device)  # before a model is made for a device that is not there
    with new_folder(out) as work, _one_thread():
        save_random(shape, random, work / "model")
        return _record(work / "model", Run(name, prompt, sampling, seed), work, device, dtype)


def record_checkpoint(
    model: str,
    out: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
    prompt: str | None = None,
    prompt_length: int | None = None,
    max_new_tokens: int | None = None,
    max_denoising_steps: int | None = None,
) -> dict[str, Any]:
    """Record a run of a checkpoint ("nano", a folder or a Hub id); returns bundle.json.

    Args:
        dtype: what the reference generates in, and what its own error is measured in: float32, bfloat16,
            or float64, of which the error is measured in float32.
        prompt: text, encoded without a template; random ids if None.
        prompt_length: how many of those; by default one and a half windows.
        max_new_tokens: by default two canvases.

    Raises:
        InputError: the run has fewer than two canvases or the first fewer than two steps: nothing
            then shows a cache that grows, or self-conditioning. Or memory does not suffice.
        UsageError: `out` exists, an option is out of range, or there is no such device.
    """
    folder = resolve(model)
    config = ModelConfig.read(folder)
    # with eos and pad filled in: where generate would look for them differs by version
    sampling = read_generation_config(folder, config).replace(
        max_new_tokens=max_new_tokens or 2 * config.canvas_length, max_denoising_steps=max_denoising_steps
    )
    if prompt is not None:
        ids = transformers.AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    else:
        length = prompt_length or config.sliding_window * 3 // 2
        # not of images: transformers 5.17 reads those as padding
        text = np.setdiff1d(np.arange(config.vocab_size), config.image_token_ids)
        ids = np.random.default_rng(seed).choice(text, length).tolist()
    name = model if model == NANO else folder.name
    with new_folder(out) as work:
        return _record(folder, Run(name, np.array([ids], np.int64), sampling, seed), work, device, dtype)


def _record(folder: Path, run: Run, work: Path, device: str, dtype: str) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    sizes = ModelConfig.from_dict(config, str(folder / "config.json"))
    require_room(folder, dtype, device_memory(device))
    in_float32 = dtype != "bfloat16"
    model = load_reference(folder, device, "float32" if in_float32 else dtype)
    peak = _DevicePeak(model)
    with in_float64(model) if dtype == "float64" else nullcontext():
        story = generate_reference(model, run)
    _check_story(story)
    generating = peak.beside_model()
    tops: dict[str, torch.Tensor] = {}  # the ids whose logits every walk keeps
    single = walk(model, story, run, tops)
    with with_sdpa(model) as other:
        others = {"sdpa": walk(other, story, run, tops).quantities}
    runs = [walk(other, story, run, tops).quantities for other in neighbours(model, run.seed)] if in_float32 else []
    walking = peak.beside_model()
    model.to("cpu")  # the truth is the host's work
    if device != "cpu":
        others["cpu"] = walk(model, story, run, tops).quantities
    runs = [single.quantities, *runs, *others.values()]
    with in_float64(model) as exact:
        truth = walk(exact, story, run, tops)
    _check_walk(story, (truth if dtype == "float64" else single).quantities)
    _check_draft(story, truth.quantities)
    facts = {
        "model": run.name,
        "checkpoint": bundle.checkpoint_hash(folder),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "device_bytes_beside_model": None if walking is None else {"generate": generating, "walks": walking},
        "dtype": dtype,
        "seed": run.seed,
        "versions": VERSIONS,
        "config": config,
        "sampling": {name: value for name, value in vars(run.sampling).items() if name not in sampler_options("ar")},
        "canvases": [len(steps) for steps in story.steps],
        "columns": bundle.column_count(sizes.vocab_size),
        "agreement": _agreement(single, truth, story),
        "floors": {
            name: _floor(name, runs, truth.quantities, story, others)
            for name in truth.quantities
            if bundle.is_judged(name)
        },
    }
    bundle.write(work, facts, _stored(truth.quantities, story))
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


class _DevicePeak:
    """How many bytes a CUDA device has to hold beside the model."""

    def __init__(self, model: Reference):
        self._is_cuda = model.device.type == "cuda"
        if self._is_cuda:
            self._model = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
            self._restart()

    def beside_model(self) -> int | None:
        """Since it was made, or last asked; None on a CPU."""
        if not self._is_cuda:
            return None
        most = torch.cuda.max_memory_allocated() - self._model
        self._restart()
        return most

    @staticmethod
    def _restart() -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- is it worth keeping?


def _check_story(story: Story) -> None:
    """One canvas shows no cache that grows, one step no self-conditioning."""
    steps = story.steps
    if len(steps) < 2 or len(steps[0]) < 2:
        raise InputError(
            f"the run has {len(steps)} canvases and {len(steps[0])} steps in the first; it takes two of each: "
            "try another --seed or --max-new-tokens"
        )


def _check_walk(story: Story, quantities: dict[str, np.ndarray]) -> None:
    """The walk must be what generate did, or it says nothing about it."""
    steps = [step for canvas in story.steps for step in canvas]
    for number, (step, argmax) in enumerate(zip(steps, quantities["steps/argmax"], strict=True)):
        if (step["best"] != argmax)[step["ran"]].any():
            raise RuntimeError(f"denoising step {number}: the walk and generate disagree")


def _check_draft(story: Story, truth: dict[str, np.ndarray]) -> None:
    """What is right of the drafted block must be so in float64 too, or no one can be held to it."""
    right = [*story.block[1 : 1 + story.accepted].tolist(), story.answer]
    if truth["verify/best"][0, : len(right)].tolist() != right:
        raise InputError("two next tokens are too near to call in the block to verify; try another --seed")


# --- what goes into the bundle


def _agreement(single: Walk, truth: Walk, story: Story) -> dict[str, list[int]]:
    """How many decisions the reference takes as float64 would, of how many."""
    ran = np.stack([step["ran"] for canvas in story.steps for step in canvas])
    pairs = {"experts": [(a == b).all(-1).ravel() for a, b in zip(single.choices, truth.choices, strict=True)]}
    names = {"best": "steps/argmax", "accepted": "steps/accepts", "next token": "ar/best", "drafts": "verify/best"}
    for name, array in names.items():
        same = single.quantities[array] == truth.quantities[array]
        pairs[name] = [same[ran].ravel() if array.startswith("steps/") else same.ravel()]
    return {name: [int(sum(s.sum() for s in same)), sum(s.size for s in same)] for name, same in pairs.items()}


def _floor(
    name: str,
    runs: list[dict[str, np.ndarray]],
    truth: dict[str, np.ndarray],
    story: Story | None,
    others: dict[str, dict[str, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """The reference's own error, the largest of several runs, where rows have not stopped.

    `others` are those of another kernel or device; by how much they differ from the first is its noise.
    """
    ran = slice(None)
    if name.startswith("steps/"):
        ran = np.stack([step["ran"] for canvas in story.steps for step in canvas])
    exact = truth[name][ran]
    errors = [bundle.Error.between(single[name][ran], exact) for single in runs]
    largest = bundle.Error(max(error.max for error in errors), max(error.rms for error in errors))
    differences = {
        kind: bundle.Error.between(other[name][ran], runs[0][name][ran]) for kind, other in (others or {}).items()
    }
    return {
        **_rounded(largest),
        "scale": _significant(np.abs(exact).max()),
        "one_run": _rounded(errors[0]),
        "noise": {kind: _rounded(difference) for kind, difference in differences.items()},
    }


def _rounded(error: bundle.Error) -> dict[str, float]:
    return {name: _significant(value) for name, value in vars(error).items()}


def _significant(value: float) -> float:
    return float(f"{value:.5g}")


def _stored(quantities: dict[str, np.ndarray], story: Story) -> dict[str, np.ndarray]:
    """Margins in float32, ids in 32 bits, the truth in float64."""
    steps = [step for canvas in story.steps for step in canvas]
    arrays = {f"steps/{name}": np.stack([step[name] for step in steps]) for name in steps[0]}
    arrays |= {"prompt": story.prompt, "sequences": story.sequences}
    for name, array in quantities.items():
        arrays[name] = array if bundle.is_judged(name) or array.dtype != np.float64 else array.astype(np.float32)
    arrays |= {"verify/block": story.block, "verify/accepted": np.array([story.accepted])}
    for name in ("steps/argmax", "steps/accepts"):  # the story has what was decided
        arrays.pop(name)
    return {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in arrays.items()}

"""Run this package through a recorded run: the same passes, the recorded draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import mlx.core as mx
import numpy as np

from .. import denoise as denoising
from .. import sampling
from ..config import GenerationConfig
from ..decoding import diffusion
from ..draws import RecordedDraws, RecordedToken
from ..layers import Layer, Router, SelfConditioning
from ..model import DiffusionGemma
from .bundle import DETAILED, Bundle, kept_rows


def walk(model: DiffusionGemma, bundle: Bundle) -> dict[str, np.ndarray]:
    """Every quantity and decision of a bundle, teacher-forced: each step starts from the recorded canvas.

    Named as in the bundle, rows and columns alike; beside them `steps/next`, the canvas that the
    recorded draws give with our acceptance.
    """
    config, columns = bundle.sampling, bundle.facts["columns"]
    cache, quantities = model.make_cache(), {}
    per_step: dict[str, list[mx.array]] = {}
    for index, (block, steps) in enumerate(zip(bundle.blocks(), bundle.steps(), strict=True)):
        with listening(model) as seen:
            hidden = model.encode(mx.array(block), cache)
            seen |= {"norm": hidden, "logits": model.logits(hidden)[..., ::columns]}
        quantities |= _kept(f"encode.{index}", seen)
        soft, stop = None, sampling.StopRule(config)
        for number, recorded in enumerate(steps):
            heat = sampling.temperature(config, config.max_denoising_steps - number)
            with listening(model) as seen:
                hidden = model.denoise_hidden(mx.array(recorded["canvas"]), cache, soft)
                logits = model.logits(hidden)
                seen |= {"norm": hidden, "logits": logits[..., ::columns]}
            if soft is None:
                del seen["soft"]
            quantities |= _kept(f"denoise.{index}.{number}", seen) if (index, number) in DETAILED else {}
            step = sampling.summarise(model, hidden, heat, RecordedToken(mx.array(recorded["token"])))
            soft = step.soft
            for name, value in _decisions(step, recorded, config, stop).items():
                per_step.setdefault(name, []).append(value)
            per_step.setdefault("peak", []).append((logits / heat).max(axis=-1))
    return quantities | {f"steps/{name}": np.stack([np.array(v) for v in values]) for name, values in per_step.items()}


def _decisions(
    step: sampling.Step, recorded: dict[str, np.ndarray], config: GenerationConfig, stop: sampling.StopRule
) -> dict[str, mx.array]:
    accepted = sampling.accept(step.entropy, config.entropy_bound)
    return {
        "entropy": step.entropy,
        "best": step.best,
        "accepted": accepted,
        "next": mx.where(accepted, step.draw, mx.array(recorded["renoise"])),
        "done": stop(mx.array(recorded["best"]), step.entropy),
    }


def _kept(prefix: str, seen: dict[str, mx.array]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in seen.items():
        arrays[f"{prefix}/{name}"] = np.array(value[:, mx.array(kept_rows(value.shape[1]))])
    return arrays


@contextmanager
def listening(model: DiffusionGemma) -> Iterator[dict[str, mx.array]]:
    """A dict that layers, routers and self-conditioning leave what they hand on in."""
    seen: dict[str, mx.array] = {}
    index = {id(part): i for i, layer in enumerate(model.layers) for part in (layer, layer.router)}
    by_layer = _listener(Layer.__call__, lambda layer, given, out: seen.update({f"layer.{index[id(layer)]}": out}))
    by_router = _listener(
        Router.__call__, lambda router, given, out: seen.update({f"router.{index[id(router)]}": mx.sort(out[1], -1)})
    )
    by_soft = _listener(SelfConditioning.__call__, lambda part, given, out: seen.update(soft=given[1]))
    with (
        mock.patch.object(Layer, "__call__", by_layer),
        mock.patch.object(Router, "__call__", by_router),
        mock.patch.object(SelfConditioning, "__call__", by_soft),
    ):
        yield seen


def _listener(call: Callable, tell: Callable) -> Callable:
    def listened(part, *given):
        out = call(part, *given)
        tell(part, given, out)
        return out

    return listened


def free_run(model: DiffusionGemma, bundle: Bundle, row: int) -> tuple[list[int], list[np.ndarray], list[int]]:
    """Decode one row on the recorded draws alone: (ids cut at the end, whole canvases, steps of each canvas)."""
    draws = RecordedDraws(
        [steps[0]["canvas"][row : row + 1] for steps in bundle.steps()],
        [[step["token"][row : row + 1] for step in steps] for steps in bundle.steps()],
        [[step["renoise"][row : row + 1] for step in steps] for steps in bundle.steps()],
    )
    tokens, canvases, counts, count = [], [], [], 0
    for event in diffusion.decode(model, bundle.arrays["prompt"][row].tolist(), bundle.sampling, draws):
        if isinstance(event, diffusion.Block):
            tokens, count = tokens + event.tokens, 0
            canvases.append(event.canvas)
        else:
            count += 1
            counts[event.canvas_index :] = [count]
    return tokens, canvases, counts


def free_run_together(model: DiffusionGemma, bundle: Bundle) -> tuple[list[np.ndarray], list[list[int]]]:
    """Denoise all rows in one batch on the recorded draws: (canvases, denoising passes of each row), per canvas."""
    steps = list(bundle.steps())
    draws = RecordedDraws(
        [canvas[0]["canvas"] for canvas in steps],
        [[step["token"] for step in canvas] for canvas in steps],
        [[step["renoise"] for step in canvas] for canvas in steps],
    )
    cache = model.make_cache()
    canvases, counts = [], []
    for index, block in enumerate(bundle.blocks()):
        model.encode(mx.array(block), cache)
        *_, last = denoising.denoise(model, cache, bundle.sampling, draws, index)
        canvases.append(last.best)
        counts.append(last.forwards.tolist())
    return canvases, counts

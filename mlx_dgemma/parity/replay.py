"""Run this package through a recorded run: the same passes, the recorded draws."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .. import denoise as denoising
from .. import sampling
from ..config import GenerationConfig
from ..decoding import diffusion
from ..draws import Draws, RecordedDraws, RecordedToken, TokenDraw
from ..model import DiffusionGemma
from .bundle import DETAILED, Bundle, kept_rows, spread_rows, tiles
from .listening import Heard, listening
from .verification import verify

Quantities = dict[str, np.ndarray]
Logits = Callable[[list[int]], mx.array]  # rows of a pass -> (B, rows, V)


def walk(model: DiffusionGemma, bundle: Bundle) -> Quantities:
    """Every quantity and decision of a bundle, teacher-forced: each step starts from the recorded canvas.

    Named as in the bundle, rows and columns alike; beside them `steps/next`, the canvas that the
    recorded draws give with our acceptance, and `verify/emitted`, what our loop made of the drafts.
    """
    return _canvases(model, bundle) | _text(model, bundle) | _verification(model, bundle)


def _canvases(model: DiffusionGemma, bundle: Bundle) -> Quantities:
    config, cache, quantities = bundle.sampling, model.make_cache(), {}
    per_step: dict[str, list[mx.array]] = {}
    for index, (block, steps) in enumerate(zip(bundle.blocks(), bundle.steps(), strict=True)):
        with listening(model) as heard:
            hidden = model.encode(mx.array(block), cache)
        quantities |= _kept(bundle, f"encode.{index}", heard, _logits(model, hidden))
        soft, stop = None, sampling.StopRule(config)
        for number, recorded in enumerate(steps):
            heat = sampling.temperature(config, config.max_denoising_steps - number)
            with listening(model) as heard:
                hidden = model.denoise_hidden(mx.array(recorded["canvas"]), cache, soft)
            if (index, number) in DETAILED:
                quantities |= _kept(bundle, f"denoise.{index}.{number}", heard, _logits(model, hidden))
            step = sampling.summarise(model, hidden, heat, RecordedToken(mx.array(recorded["token"])))
            soft = step.soft
            decided = _decisions(step, recorded, config, stop)
            for name, value in (decided | {"peak": _peak(_logits(model, hidden), hidden.shape[1], heat)}).items():
                per_step.setdefault(name, []).append(value)
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


def _peak(of: Logits, length: int, heat: float) -> mx.array:
    return mx.concatenate([(of(rows) / heat).max(axis=-1) for rows in tiles(length)], axis=1)


def _text(model: DiffusionGemma, bundle: Bundle) -> Quantities:
    text = bundle.arrays["sequences"]
    with listening(model) as heard:
        hidden = model.encode(mx.array(text), model.make_cache())
    of = _logits(model, hidden)
    best = [np.array(of(rows).argmax(axis=-1)) for rows in tiles(text.shape[1])]
    return _kept(bundle, "ar", heard, of) | {"ar/best": np.concatenate(best, axis=1)}


def _verification(model: DiffusionGemma, bundle: Bundle) -> Quantities:
    text, block = bundle.arrays["sequences"][0].tolist(), bundle.arrays["verify/block"]
    found = verify(model, text, block[1:].tolist())
    quantities = {"verify/best": np.array(found.verify.round.samples)[None], "verify/emitted": np.array(found.emitted)}
    for name, launched, count in (("verify", found.verify, len(block)), ("after", found.after, 1)):
        logits = launched.round.logits[None]
        rows = range(logits.shape[1] - count, logits.shape[1])  # the last `count`
        quantities |= _kept(bundle, name, launched.heard, lambda rows, logits=logits: logits[:, mx.array(rows)], rows)
    with listening(model) as heard:
        hidden = model.denoise_hidden(mx.array(next(bundle.steps())[0]["canvas"][:1]), found.cache)
    return quantities | _kept(bundle, "behind", heard, _logits(model, hidden))


def _logits(model: DiffusionGemma, hidden: mx.array) -> Logits:
    return lambda rows: model.logits(hidden[:, mx.array(rows)])


def _kept(bundle: Bundle, name: str, heard: Heard, of: Logits, rows: range | None = None) -> Quantities:
    """What a pass is judged by; `rows`: those that are kept, by default what the bundle's other passes keep."""
    length = heard["norm"].shape[1]
    few, many = (kept_rows(length), spread_rows(length)) if rows is None else (list(rows), list(rows))
    arrays = {what: value[:, mx.array(few)] for what, value in heard.items()}
    arrays["logits"] = of(few)[..., mx.array(bundle.columns)]
    logits = of(many)
    arrays["top"] = mx.take_along_axis(logits, mx.array(bundle.arrays[f"{name}/top_ids"]), axis=-1)
    kept = {f"{name}/{what}": _on_host(value) for what, value in arrays.items()}
    return kept | {f"{name}/logsumexp": _logsumexp(_on_host(logits))}


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    """In float64, so that it has the error of the logits and none of its own."""
    peak = logits.max(axis=-1)
    return np.log(np.exp(logits.astype(np.float64) - peak[..., None]).sum(axis=-1)) + peak


def _on_host(value: mx.array) -> np.ndarray:
    """numpy has no bfloat16."""
    return np.array(value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value)


class _RecordedFirst(RecordedDraws):
    """The recorded draws of some rows; where a run goes on behind them, our own."""

    def __init__(self, model: DiffusionGemma, bundle: Bundle, rows: slice):
        steps = list(bundle.steps())
        canvases = [canvas[0]["canvas"][rows] for canvas in steps]
        tokens, renoise = ([[step[name][rows] for step in canvas] for canvas in steps] for name in ("token", "renoise"))
        super().__init__(canvases, tokens, renoise)
        self._counts = [len(canvas) for canvas in steps]
        self._own = Draws(range(len(canvases[0])), model.config.vocab_size)

    def canvas(self, canvas: int, length: int) -> mx.array:
        return (super() if canvas < len(self._counts) else self._own).canvas(canvas, length)

    def token(self, canvas: int, step: int, length: int) -> TokenDraw:
        return (super() if self._has(canvas, step) else self._own).token(canvas, step, length)

    def renoise(self, canvas: int, step: int, length: int) -> mx.array:
        return (super() if self._has(canvas, step) else self._own).renoise(canvas, step, length)

    def _has(self, canvas: int, step: int) -> bool:
        return canvas < len(self._counts) and step < self._counts[canvas]


def free_run(model: DiffusionGemma, bundle: Bundle, row: int) -> tuple[list[int], list[np.ndarray], list[int]]:
    """Decode one row on the recorded draws alone: (ids cut at the end, whole canvases, steps of each canvas)."""
    draws = _RecordedFirst(model, bundle, slice(row, row + 1))
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
    draws = _RecordedFirst(model, bundle, slice(None))
    cache = model.make_cache()
    canvases, counts = [], []
    for index, block in enumerate(bundle.blocks()):
        model.encode(mx.array(block), cache)
        *_, last = denoising.denoise(model, cache, bundle.sampling, draws, index)
        canvases.append(last.best)
        counts.append(last.forwards.tolist())
    return canvases, counts

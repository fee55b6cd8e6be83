"""The parts of the reference sampler: summarise a step, accept by entropy, the schedule, the stop rule."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .config import GenerationConfig
from .draws import TILE, RunningMax, TokenDraw
from .model import DiffusionGemma

VOCAB_CHUNK = 8 * TILE  # ids whose logits are held at once: 32 MB in float32 at a canvas of 256


def temperature(config: GenerationConfig, remaining: int) -> float:
    """T(n) = t_min + (t_max - t_min) * n / N with n steps remaining, in float32 like the reference."""
    share = np.float32(remaining) / np.float32(config.max_denoising_steps)
    return float(np.float32(config.t_min) + np.float32(config.t_max - config.t_min) * share)


@dataclass(frozen=True)
class Step:
    """What one denoising pass says about every position, with z = logits / temperature."""

    best: mx.array  # (B, C) argmax of z
    draw: mx.array  # (B, C) a categorical draw from softmax(z)
    entropy: mx.array  # (B, C) of softmax(z), nats
    soft: mx.array  # (B, C, H) mean embedding under softmax(z), the next self-conditioning


class SoftmaxSums:
    """Maximum m, S = sum e^(z-m) and U = sum e^(z-m)(m-z) over slices of the vocabulary.

    The entropy is log S + U / S: both terms are >= 0, so nothing cancels, which keeps the error at
    1e-5 where `-sum p log p` loses ten times as much. Partial sums of slices merge.
    """

    def __init__(self) -> None:
        self.maximum: mx.array | None = None

    def add(self, z: mx.array) -> None:
        maximum = z.max(axis=-1, keepdims=True)
        below = maximum - z
        weights = mx.exp(-below)
        total = weights.sum(axis=-1, keepdims=True)
        spread = (weights * below).sum(axis=-1, keepdims=True)
        if self.maximum is None:
            self.maximum, self.total, self.spread = maximum, total, spread
            return
        both = mx.maximum(self.maximum, maximum)
        total_a, spread_a = _shifted(self.total, self.spread, both - self.maximum)
        total_b, spread_b = _shifted(total, spread, both - maximum)
        self.maximum, self.total, self.spread = both, total_a + total_b, spread_a + spread_b

    @property
    def entropy(self) -> mx.array:
        return (mx.log(self.total) + self.spread / self.total)[..., 0]

    def shares(self, z: mx.array) -> mx.array:
        """softmax over the whole vocabulary, of the slice z."""
        return mx.exp(z - self.maximum) / self.total


def _shifted(total: mx.array, spread: mx.array, by: mx.array) -> tuple[mx.array, mx.array]:
    """S and U for a maximum that is higher by `by`."""
    scale = mx.exp(-by)
    return scale * total, scale * (spread + by * total)


def summarise(
    model: DiffusionGemma, hidden: mx.array, temperature: float, draw: TokenDraw, chunk: int = VOCAB_CHUNK
) -> Step:
    """Everything the sampler needs of a pass, without ever holding the whole vocabulary in float32.

    Args:
        hidden: (B, C, H), what `denoise_hidden` returned.
        draw: receives the vocabulary slice by slice.
        chunk: ids per slice, a multiple of 4,096.
    """
    vocab, dtype = model.config.vocab_size, model.dtype
    slices = [slice(first, min(first + chunk, vocab)) for first in range(0, vocab, chunk)]
    # z in the embedding's dtype is what the reference conditions on. It is kept where that is half
    # of float32 or one slice; else it is computed twice.
    keeps = len(slices) == 1 or dtype.size < 4
    best, sums = RunningMax(), SoftmaxSums()
    rounded_sums = sums if dtype == mx.float32 else SoftmaxSums()
    kept: list[mx.array] = []

    def processed(ids: slice) -> mx.array:
        return model.logits(hidden, ids) / temperature

    for ids in slices:
        z = processed(ids)
        best.add(z, ids.start)
        draw.add(z, ids.start)
        sums.add(z)
        rounded = z.astype(dtype)
        if rounded_sums is not sums:
            rounded_sums.add(rounded.astype(mx.float32))
        if keeps:
            kept.append(rounded)
        if len(slices) > 1:  # in order, so that few slices are alive at once; this does not wait
            mx.async_eval(best.ids, draw.ids, sums.total, sums.spread, rounded_sums.total, rounded)

    if keeps:  # one product over the whole vocabulary, rounded once like the reference's
        shares = [rounded_sums.shares(z.astype(mx.float32)).astype(dtype) for z in kept]
        mixed = model.mix(mx.concatenate(shares, axis=-1), slice(None))
    else:
        mixed = sum(model.mix(sums.shares(processed(ids)), ids) for ids in slices)
    return Step(best=best.ids, draw=draw.ids, entropy=sums.entropy, soft=model.scale_soft(mixed))


def accept(entropy: mx.array, bound: float) -> mx.array:
    """Which positions to accept, (B, C) -> bool: from the lowest entropy up, while the sum of those
    before stays within `bound` nats (EB-sampler, arXiv 2505.24857)."""
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    kept = mx.cumsum(ascending, axis=-1) - ascending <= bound
    return mx.take_along_axis(kept, mx.argsort(order, axis=-1), axis=-1)


class StopRule:
    """Stop when `stability_threshold` + 1 argmax canvases in a row are equal and mean entropy is low."""

    def __init__(self, config: GenerationConfig):
        self._stability, self._confidence = config.stability_threshold, config.confidence_threshold
        self._history: list[mx.array] = []

    def __call__(self, best: mx.array, entropy: mx.array) -> mx.array:
        """Whether each row is done, (B, C), (B, C) -> (B,) bool."""
        confident = mx.mean(entropy, axis=-1) < self._confidence
        seen, self._history = self._history, [*self._history, best][-self._stability :] if self._stability else []
        if len(seen) < self._stability:
            return mx.zeros_like(confident)
        for earlier in seen:
            confident = confident & mx.all(earlier == best, axis=-1)
        return confident

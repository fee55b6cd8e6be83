"""A prompt into the cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..cache import PrefixCache
from ..model import DiffusionGemma

PREFILL_STEP = 2048

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)


def prefill(
    model: DiffusionGemma,
    ids: Sequence[int],
    cache: PrefixCache,
    step: int = PREFILL_STEP,
    progress: Progress | None = None,
) -> int:
    """Encode `ids` behind what `cache` holds; returns the number of forwards.

    Args:
        step: tokens per forward, at most 4,096; it changes the result by rounding at most.
        progress: called before the first chunk and after each.
    """
    total, forwards = len(ids), 0
    report = progress or (lambda done, total: None)
    report(0, total)
    for first in range(0, total, step):
        chunk = ids[first : first + step]
        model.encode(mx.array([chunk], dtype=mx.int32), cache)
        mx.eval(cache.arrays())  # not the hidden state: what the last layer does after its K/V is not run
        forwards += 1
        report(first + len(chunk), total)
    return forwards

"""From logits to the scores a token is chosen by, in ar mode: bias, penalty, temperature, top-k, top-p, min-p.

Pure functions of one row each, so a row scores the same whatever stands in the rows beside it. The
order is transformers': bias and penalty on the logits, then temperature, top-k, top-p, min-p, each
on what the one before left. Ids that tie with the last one kept are kept too: which of two equals
survives would otherwise depend on the order of a partial sort.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from .config import GenerationConfig


def process(logits: mx.array, seen: mx.array | None, config: GenerationConfig) -> mx.array:
    """Logits (L, V) with logit bias and repetition penalty; `seen` is what `recent` returned."""
    if config.logit_bias:
        ids = mx.array(list(config.logit_bias))[None]
        bias = mx.array([float(value) for value in config.logit_bias.values()])
        logits = mx.put_along_axis(logits, ids, mx.take_along_axis(logits, ids, axis=-1) + bias, axis=-1)
    if seen is not None:  # CTRL, arXiv 1909.05858
        values = mx.take_along_axis(logits, seen, axis=-1)
        penalty = config.repetition_penalty
        logits = mx.put_along_axis(logits, seen, mx.where(values < 0, values * penalty, values / penalty), axis=-1)
    return logits


def recent(known: Sequence[int], block: mx.array, config: GenerationConfig) -> mx.array | None:
    """The ids that the penalty of each row looks at, (L, at most repetition_context_size); None without a penalty.

    Args:
        known: all tokens before `block`.
        block: (L,) ids; row i sees the known ones and block[: i + 1].
    """
    if config.repetition_penalty == 1:
        return None
    size = min(config.repetition_context_size, len(known) + block.size)
    ids = mx.concatenate([mx.array(list(known[-size:]), dtype=mx.int32), block.astype(mx.int32)])
    ends = mx.arange(ids.size - block.size, ids.size)[:, None]
    return ids[mx.maximum(ends - mx.arange(size), 0)]  # the first id again where there are fewer


def shape(z: mx.array, config: GenerationConfig) -> mx.array:
    """Processed logits (L, V) -> scores to add Gumbel noise to: z / T, -inf where a filter forbids."""
    z = z / config.temperature
    kept = z
    thresholds = []
    if 0 < config.top_k < z.shape[-1]:
        kept = mx.topk(z, config.top_k, axis=-1)
        thresholds.append(kept.min(axis=-1, keepdims=True))
    if config.top_p < 1:
        thresholds.append(_nucleus(kept, config.top_p))
    if config.min_p > 0:
        thresholds.append(z.max(axis=-1, keepdims=True) + math.log(config.min_p))
    for threshold in thresholds:
        z = mx.where(z >= threshold, z, -mx.inf)
    return z


def _nucleus(z: mx.array, top_p: float) -> mx.array:
    """The least score, (L, 1), that is needed to reach a share of `top_p` from the top."""
    ordered = -mx.sort(-z, axis=-1)
    shares = mx.softmax(ordered, axis=-1)
    above = mx.cumsum(shares, axis=-1) - shares
    return mx.where(above < top_p, ordered, mx.inf).min(axis=-1, keepdims=True)

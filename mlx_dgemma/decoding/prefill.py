"""A prompt into the cache, in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from ..cache import PrefixCache
from ..errors import InputError
from ..model import DiffusionGemma, Taps
from .counts import Counts

PREFILL_STEP = 2048

Progress = Callable[[int, int], None]  # (tokens done, tokens in all)
Listener = Callable[[Sequence[int], Taps], None]  # (ids just encoded, what was tapped on the way)


def check_prompt(model: DiffusionGemma, ids: Sequence[int], room: int) -> None:
    """Raise InputError for a prompt that this model cannot continue by at least `room` tokens."""
    config = model.config
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    wrong = next((i for i in ids if not 0 <= i < config.vocab_size), None)
    if wrong is not None:
        raise InputError(f"the prompt holds the token id {wrong}; the vocabulary has ids 0-{config.vocab_size - 1}")
    if any(i in config.image_token_ids for i in ids):
        raise InputError("the prompt holds image tokens; images are not supported yet")
    if len(ids) > config.max_position_embeddings - room:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the context of {config.max_position_embeddings} "
            f"leaves room for {config.max_position_embeddings - room} before {room} of an answer"
        )


def prefill(
    model: DiffusionGemma,
    ids: Sequence[int],
    cache: PrefixCache,
    step: int = PREFILL_STEP,
    progress: Progress | None = None,
    *,
    counts: Counts | None = None,
    taps: Sequence[int] = (),
    listener: Listener | None = None,
) -> None:
    """Encode what `cache` does not hold yet of `ids`.

    Args:
        cache: holds the first `cache.length` of them.
        step: tokens per forward, at most 4,096; it changes the result by rounding at most.
        progress: called before the first chunk and after each.
        taps: layers whose outputs `listener` gets, chunk by chunk, so that they are never held whole.
    """
    total, counts = len(ids), counts or Counts()
    report = progress or (lambda done, total: None)
    report(cache.length, total)
    for first in range(cache.length, total, step):
        chunk, tapped = ids[first : first + step], Taps(taps)
        model.encode(mx.array([chunk], dtype=mx.int32), cache, tapped)
        mx.eval(cache.arrays())  # not the hidden state: what the last layer does after its K/V is not run
        counts.encode_forwards += 1
        counts.positions += len(chunk)
        if listener is not None:
            listener(chunk, tapped)
        report(first + len(chunk), total)

"""Diffusion mode: canvas after canvas, each denoised and then encoded, until an end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..cache import PrefixCache
from ..config import GenerationConfig
from ..denoise import Frame, denoise
from ..draws import Draws, RecordedDraws
from ..model import DiffusionGemma
from ..sampling import VOCAB_CHUNK
from .counts import Counts
from .prefill import PREFILL_STEP, Progress, prefill


@dataclass(frozen=True)
class Preview:
    """A canvas on its way."""

    canvas_index: int
    frame: Frame


@dataclass(frozen=True)
class Block:
    """A finished canvas, cut after eos or at the last token asked for."""

    canvas_index: int
    tokens: list[int]
    finish_reason: str | None  # "stop" (eos), "length" (max_new_tokens or the context), None: more follows
    canvas: np.ndarray  # (C,), uncut


def decode(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws | RecordedDraws,
    *,
    cache: PrefixCache | None = None,
    counts: Counts | None = None,
    prefill_step: int = PREFILL_STEP,
    progress: Progress | None = None,
    vocab_chunk: int = VOCAB_CHUNK,
) -> Iterator[Preview | Block]:
    """Continue `prompt`; yields a Preview per denoising step and a Block per canvas.

    Args:
        cache: may hold the first tokens of `prompt` already. Afterwards it holds the prompt and every
            canvas but the last.
        counts: incremented as work is done.
    """
    cache = model.make_cache() if cache is None else cache
    counts = Counts() if counts is None else counts
    length, remaining = model.config.canvas_length, config.max_new_tokens
    prefill(model, prompt, cache, prefill_step, progress, counts=counts)
    index = 0
    while True:
        for frame in denoise(model, cache, config, draws, index, vocab_chunk):
            counts.denoise_forwards += 1
            counts.positions += length
            yield Preview(index, frame)
        canvas = frame.best[0]
        tokens, reason = cut(canvas.tolist(), config.eos_token_ids, remaining)
        remaining -= len(tokens)
        if reason is None and cache.length + 2 * length > model.config.max_position_embeddings:
            reason = "length"
        yield Block(index, tokens, reason, canvas)
        if reason is not None:
            return
        model.encode(mx.array(canvas[None]), cache)
        mx.async_eval(cache.arrays())
        counts.encode_forwards += 1
        counts.positions += length
        index += 1


def cut(canvas: list[int], eos: Sequence[int], limit: int) -> tuple[list[int], str | None]:
    """The canvas up to its first eos (included) and at most `limit` ids, and why it was cut."""
    end = next((i + 1 for i, token in enumerate(canvas) if token in eos), None)
    if end is not None and end <= limit:
        return canvas[:end], "stop"
    return canvas[:limit], "length" if limit <= len(canvas) else None

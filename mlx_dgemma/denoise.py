"""One canvas, from noise to tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .cache import PrefixCache
from .config import GenerationConfig
from .draws import Draws, RecordedDraws
from .model import DiffusionGemma
from .sampling import VOCAB_CHUNK, StopRule, accept, summarise, temperature


@dataclass(frozen=True)
class Frame:
    """The canvas after a step. The last frame of a canvas is the one that counts."""

    step: int  # 1 is the first
    best: np.ndarray  # (B, C) the most likely id of every position
    accepted: np.ndarray  # (B, C) bool
    entropy: np.ndarray  # (B, C) nats
    done: np.ndarray  # (B,) bool: the stop rule holds
    forwards: np.ndarray  # (B,) denoising passes each row has used


def denoise(
    model: DiffusionGemma,
    cache: PrefixCache,
    config: GenerationConfig,
    draws: Draws | RecordedDraws,
    canvas_index: int = 0,
    chunk: int = VOCAB_CHUNK,
) -> Iterator[Frame]:
    """The reference sampler on one canvas behind the cached prefix; yields a frame per step.

    The cache must hold every token before the canvas, and is left as it is. The numbers are those
    of the reference's description: there is one host synchronisation a step, in 6.
    """
    length = model.config.canvas_length
    # 1. start from uniform noise over the whole vocabulary
    canvas = draws.canvas(canvas_index, length)
    soft, stop = None, StopRule(config)
    frame = None
    for number in range(config.max_denoising_steps):
        # 2. one pass over the canvas, at a temperature that falls with the steps remaining
        hidden = model.denoise_hidden(canvas, cache, soft)
        heat = temperature(config, config.max_denoising_steps - number)
        # 3. draw, argmax and entropy of every position
        step = summarise(model, hidden, heat, draws.token(canvas_index, number, length), chunk)
        # 4. accept the surest positions, anew each step
        accepted = accept(step.entropy, config.entropy_bound)
        # 5. renoise the others; what was believed goes into the next pass
        canvas_next = mx.where(accepted, step.draw, draws.renoise(canvas_index, number, length))
        best, soft_next = step.best, step.soft
        if frame is not None and frame.done.any():  # rows that are done stay as they were
            was_done = mx.array(frame.done)[:, None]
            best = mx.where(was_done, mx.array(frame.best), best)
            canvas_next = mx.where(was_done, canvas, canvas_next)
            soft_next = mx.where(was_done[..., None], soft, soft_next)
        canvas, soft = canvas_next, soft_next
        # 6. stop once the canvas is stable and sure
        done = stop(best, step.entropy)
        frame = _frame(frame, number + 1, best, accepted, step.entropy, done)
        # 7. what counts is the argmax of the last step run
        yield frame
        if frame.done.all():
            return


def _frame(previous: Frame | None, number: int, best, accepted, entropy, done) -> Frame:
    mx.eval(best, accepted, entropy, done)
    done = np.array(done)
    ran = np.ones(len(done), dtype=np.int64)
    if previous is not None:
        done, ran = done | previous.done, previous.forwards + ~previous.done
    return Frame(number, np.array(best), np.array(accepted), np.array(entropy), done, ran)

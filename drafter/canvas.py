"""Canvas: the model drafts for itself. Its denoising pass guesses a block at once, its causal pass checks it.

Behind the encoded prefix stands a short canvas. Slot j is the token at position len(tokens) - 1 + j:

    slot        0       1 .. width      width + 1 .. length - 1
    start       last    uniform noise   uniform noise
    in the end  -       the draft       room to think, thrown away

Slot 0 holds the last token, which is emitted and not encoded yet. It is known, so it is put back
before every pass, in the canvas and in the self-conditioning, and costs nothing of the entropy
bound. Between passes, if there are several, the reference sampler goes on as in `denoise`: draw,
accept the surest, renoise the others, condition on what was believed.

The noise is addressed by a seed of its own and the position, so a draft depends on the tokens, the
options and, above temperature 0, on the loop's draws, which the last pass shares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ..draws import Draws
from ..errors import UsageError
from ..options import WIDEST_DRAFT
from ..sampling import accept, summarise, temperature
from .head import probabilities
from .protocol import NOTHING, Draft, DraftContext

if TYPE_CHECKING:
    from ..cache import CacheReader
    from ..model import DiffusionGemma

# Drafts accepted a round, and passes of nano a token, greedy, at width 16 (`python -m benchmarks.causal --examples 4
# --drafter canvas:32x1 --drafter canvas:32x2 ... --domain edit ...`, nano's five tasks by their shares):
#     steps                 1            2             4
#     32 positions    6.5 / 0.32   8.5 / 0.37    8.2 / 0.61     what a second pass brings does not pay for it
#     64 positions    7.9 / 0.28   9.1 / 0.35   10.0 / 0.51     fewer passes, each twice as wide
# Of the first nano (2.2 M parameters), tokens a round: uniform noise 4.3, a constant id 4.3 (id 4) or 3.4 (pad); with 2
# steps, self-conditioning pinned at the known slot 4.1, left out 3.7.
LENGTH, STEPS = 32, 1
MOST_STEPS = 4
SEED = 0  # of the noise


class Canvas:
    """A drafter (see `protocol.Drafter`) that needs no weights but the model's.

    Args:
        length: positions of the canvas, the last token's among them: drafts are shorter by one.
        steps: denoising passes a draft.
    """

    taps: tuple[int, ...] = ()

    def __init__(self, length: int = LENGTH, steps: int = STEPS):
        _check("length", length, 2, WIDEST_DRAFT + 1)
        _check("steps", steps, 1, MOST_STEPS)
        self.length, self.steps = length, steps
        self.name = f"canvas-{length}x{steps}"  # each costs something else

    def reset(self) -> None:
        """Nothing is remembered."""

    def fresh(self) -> Canvas:
        return Canvas(self.length, self.steps)

    def propose(self, context: DraftContext, width: int) -> Draft:
        model, position = context.model, len(context.tokens)
        width = min(width, self.length - 1)
        if width < 1 or position - 1 + self.length > model.config.max_position_embeddings:
            return NOTHING
        last = mx.array([[context.tokens[-1]]])
        hidden = self._denoise(model, context.cache, last)
        logits = model.logits(hidden[:, 1 : 1 + width])[0]
        ids = context.sample(logits, position)
        # 0.97 on average where 0.90 are right (the first nano, temperatures 0 and 0.8), and rises with the share that
        # is: the loop learns the factor between them, and no power of it does better
        confidences = probabilities(logits, ids)
        mx.eval(ids, confidences)
        return Draft(ids.tolist(), confidences.tolist(), [self.length] * self.steps)

    def _denoise(self, model: DiffusionGemma, cache: CacheReader, last: mx.array) -> mx.array:
        """The last pass of a canvas behind `cache` that begins with `last` (1, 1): (1, C, H)."""
        draws, where, length = Draws([SEED], model.config.vocab_size), cache.length, self.length
        known = model.embed(last)
        canvas = _pinned(last, draws.canvas(where, length))
        hidden = model.denoise_hidden(canvas, cache)
        for number in range(self.steps - 1):
            config = model.generation_config.replace(max_denoising_steps=self.steps)  # its heat, over so few
            heat = temperature(config, self.steps - number)
            step = summarise(model, hidden, heat, draws.token(where, number, length))
            accepted = accept(_pinned(mx.zeros((1, 1)), step.entropy), config.entropy_bound)
            canvas = _pinned(last, mx.where(accepted, step.draw, draws.renoise(where, number, length)))
            hidden = model.denoise_hidden(canvas, cache, _pinned(known, step.soft))
        return hidden


def _pinned(first: mx.array, slots: mx.array) -> mx.array:
    """(1, C, ...) with slot 0 replaced by `first` (1, 1, ...)."""
    return mx.concatenate([first.astype(slots.dtype), slots[:, 1:]], axis=1)


def _check(name: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} of a canvas drafter must be a whole number in {least}-{most}, not {value!r}")


def check(argument: str | None) -> None:
    _of(argument)


def make(model: DiffusionGemma, argument: str | None) -> Canvas:
    return _of(argument)


def _of(argument: str | None) -> Canvas:
    """From "64x2": positions and steps, or nothing: the defaults. Raises UsageError."""
    if argument is None:
        return Canvas()
    length, _, steps = argument.partition("x")
    if not (length.isdecimal() and steps.isdecimal()) or len(argument) > 8:
        raise UsageError(f"drafter 'canvas:{argument:.40}': write canvas:POSITIONSxSTEPS, as canvas:64x2")
    return Canvas(int(length), int(steps))

"""One round of verification, run by the loop of ar mode itself: draft, verify, accept, roll back, go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import mlx.core as mx

from ..cache import PrefixCache
from ..config import GenerationConfig
from ..decoding.causal import Round, Verifier, decode
from ..decoding.width import Widths
from ..drafter.protocol import NOTHING, Draft, DraftContext
from ..draws import Draws
from ..model import DiffusionGemma
from .listening import Heard, listening


class Scripted:
    """A drafter that says one thing, once."""

    taps: tuple[int, ...] = ()

    def __init__(self, draft: Sequence[int]):
        self._draft = Draft(draft)

    def reset(self) -> None:
        pass

    def propose(self, context: DraftContext, width: int) -> Draft:
        draft, self._draft = self._draft, NOTHING
        return draft.first(width)


@dataclass(frozen=True)
class Launched:
    """A pass of the loop: what its layers handed on, its logits, and the tokens it chose."""

    heard: Heard
    round: Round


@dataclass(frozen=True)
class Verification:
    """What the loop made of a drafted block, and of the pass after it."""

    verify: Launched
    after: Launched
    emitted: list[int]  # by the pass over the block: the drafts it accepted, and a token of its own
    cache: PrefixCache  # of all tokens but the last, once the loop has ended


def verify(model: DiffusionGemma, text: Sequence[int], draft: Sequence[int]) -> Verification:
    """Continue `text` greedily, `draft` being guessed first, until the pass behind that guess is done."""
    config = GenerationConfig(max_new_tokens=len(draft) + 3, temperature=0.0)
    cache, emitted = model.make_cache(), []
    draws, widths = Draws([0], model.config.vocab_size), Widths(fixed=len(draft))
    with _launches(model) as passes:
        written = decode(model, text, config, draws, drafter=Scripted(draft), widths=widths, cache=cache)
        for token in written:
            if len(passes) > 1:
                break
            emitted.append(token.id)
        written.close()
    return Verification(passes[0], passes[1], emitted, cache)


@contextmanager
def _launches(model: DiffusionGemma) -> Iterator[list[Launched]]:
    """A list that every pass of the loop is put into as it is launched."""
    passes: list[Launched] = []
    launch = Verifier.launch

    def listened(self, block: mx.array, *given, **named) -> Round:
        with listening(model) as heard:
            current = launch(self, block, *given, **named)
        passes.append(Launched(heard, current))
        return current

    with mock.patch.object(Verifier, "launch", listened):
        yield passes

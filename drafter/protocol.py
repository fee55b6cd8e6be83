"""What the decoding loop and a drafter say to each other.

A drafter guesses the tokens that follow; the main model checks them all in one pass and keeps those
that it would have chosen itself. So a drafter changes how fast an answer comes, never what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import mlx.core as mx

    from ..cache import CacheReader
    from ..model import DiffusionGemma


@dataclass(frozen=True)
class Draft:
    """Ids that may follow the last token, and how likely each is to be right, given those before it (0-1).

    `passes`: of each denoising pass of the main model that went into it, how many positions it had.
    """

    tokens: Sequence[int]
    confidences: Sequence[float] | None = None
    passes: Sequence[int] = ()

    def first(self, count: int) -> Draft:
        confidences = None if self.confidences is None else self.confidences[:count]
        return Draft(self.tokens[:count], confidences, self.passes)


NOTHING = Draft(())


@dataclass(frozen=True)
class DraftContext:
    """What a drafter may look at.

    Args:
        tokens: all so far; the last one is not encoded yet. Not to be changed.
        cache: holds tokens[:-1]; can be denoised behind, not written to.
        model: the main model.
        sample: (logits (L, V), position of the first) -> ids (L,), chosen with the loop's own bias,
            temperature, filters and random draws: a drafter that knows the main model's distribution
            then draws what the main model will draw. The repetition penalty is left out.
    """

    tokens: Sequence[int]
    cache: CacheReader
    model: DiffusionGemma
    sample: Callable[[mx.array, int], mx.array]


class Drafter(Protocol):
    """One object serves one request at a time; `fresh()`, if there is one, gives another that shares the weights.

    What it costs is remembered under its `name`, if it has one, or that of its class.

    A drafter may also have `extend(tokens, features)`: told of every token once it is encoded, in
    order, in pieces, rejected drafts never; `features` (1, L, n * H) are the outputs of the `taps`
    layers there, None without taps. All calls before `propose`, and all calls of a request, cover tokens[:-1].

    One that listens may have `snapshot()` and `restore(snapshot)`, so that it can go on behind a cached
    prefix: what it gave when the cache held so many tokens brings it back to that state.

    One of a size that matters may have `memory(context)`: bytes that it needs behind so many tokens.
    """

    taps: tuple[int, ...]  # layers of the main model whose outputs it wants, () for none

    def reset(self) -> None:
        """Forget everything: a new request begins."""

    def propose(self, context: DraftContext, width: int) -> Draft:
        """At most `width` ids that may follow; fewer, or none, where it has no good guess."""

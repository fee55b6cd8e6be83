"""A drafter held at arm's length: what it may say is checked, and if it fails it is off, and said to be."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index

import mlx.core as mx

from ..drafter.protocol import NOTHING, Draft, DraftContext, Drafter
from ..model import Taps
from .counts import Counts

HELD = 64  # tokens of which a drafter is told at once, unless it is asked before


class GuardedDrafter:
    """Asks a drafter and passes on what the loop can use.

    A drafter that listens is told of tokens when it is asked, and in between now and then: work of
    its own after every plain step would wait for the next one, which is launched ahead.

    Whatever the drafter raises, or ids that are not in the vocabulary, turn it off for the rest of
    the request; more tokens than were asked for are cut. Both are counted in `counts`.
    """

    def __init__(self, drafter: Drafter | None, vocab_size: int, counts: Counts):
        self._drafter, self._vocab_size, self._counts = drafter, vocab_size, counts
        self.name = str(getattr(drafter, "name", type(drafter).__name__))
        self.taps: tuple[int, ...] = tuple(drafter.taps) if drafter is not None else ()
        self._untold: list[tuple[list[int], mx.array | None]] = []  # tokens, features
        if drafter is not None:
            with self._watched("reset"):
                drafter.reset()

    @property
    def listens(self) -> bool:
        """Whether it wants to be told of every token that is encoded."""
        return callable(getattr(self._drafter, "extend", None))

    @property
    def active(self) -> bool:
        return self._drafter is not None

    def resume(self, snapshot: object) -> None:
        """Have it go on from what its `snapshot()` gave."""
        if self._drafter is not None:
            with self._watched("restore"):
                self._drafter.restore(snapshot)

    def propose(self, context: DraftContext, width: int) -> Draft:
        """At most `width` ids of the vocabulary; none if it is off or has no guess."""
        draft = NOTHING
        if width > 0:
            self.tell()
        if self._drafter is not None and width > 0:
            with self._watched("propose"):
                draft = self._checked(self._drafter.propose(context, width), width)
        return draft

    def extend(self, tokens: Sequence[int], tapped: Taps) -> None:
        """Tokens that are encoded for good, and what was tapped at their positions: it is told in time."""
        if self.listens and tokens:
            self._untold.append((list(tokens), tapped.features[:, : len(tokens)] if self.taps else None))
            if sum(len(ids) for ids, _ in self._untold) >= HELD:
                self.tell()

    def tell(self) -> None:
        """Tell it of all tokens that it has not heard of."""
        untold, self._untold = self._untold, []
        if self.listens and untold:
            with self._watched("extend"):
                ids = [token for tokens, _ in untold for token in tokens]
                features = mx.concatenate([features for _, features in untold], axis=1) if self.taps else None
                self._drafter.extend(ids, features)

    def _checked(self, draft: Draft, width: int) -> Draft:
        self._counts.denoise_forwards += len(draft.passes)
        self._counts.positions += sum(draft.passes)
        tokens = [index(token) for token in draft.tokens]
        self._counts.surplus += max(0, len(tokens) - width)
        tokens = tokens[:width]
        wrong = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise ValueError(f"the id {wrong} is not in the vocabulary of {self._vocab_size}")
        if draft.confidences is None:
            return Draft(tokens)
        confidences = [float(confidence) for confidence in draft.confidences[:width]]
        if len(confidences) < len(tokens) or not all(map(math.isfinite, confidences)):
            raise ValueError(f"{len(tokens)} tokens need as many finite confidences")
        return Draft(tokens, [min(1.0, max(0.0, confidence)) for confidence in confidences])

    @contextmanager
    def _watched(self, call: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:  # a drafter is anyone's code: whatever it raises costs speed alone
            reason = " ".join(str(error).split())[:200] or "no message"
            self._counts.drafter_failure = f"{self.name}.{call} raised {type(error).__name__}: {reason}"
            self._drafter, self.taps = None, ()
        finally:
            self._counts.drafter_seconds += time.perf_counter() - start

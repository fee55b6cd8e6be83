"""Block: a small network that reads the main model's features and guesses a whole block in one pass.

DFlash (arXiv 2602.06036) and DSpark. What it knows of the tokens so far are the outputs of some of
the main model's layers, which come with every pass that encodes; of the last token, which is not
encoded yet, it knows the id.

    extend   features of tokens that are encoded for good -> rows of its own context cache
    propose  [last, MASK ...] behind that context -> hidden states -> the main model's head -> ids
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache import Snapshot
from ..loading import EMBEDDED, NANO, resolve
from ..model import DiffusionGemma
from .head import Head, check_bits, read_vocabulary
from .network import Behind, BlockNetwork
from .protocol import NOTHING, Draft, DraftContext
from .weights import read

CANDIDATES = 64  # ids that the correction by the token before may reorder
EMBEDDED_DRAFTER = EMBEDDED / "drafter"


class Block:
    """A drafter (see `protocol.Drafter`) of one request.

    Args:
        network: shared with others.
        head: what it guesses with, shared as well.
        name: under which its costs are remembered.
    """

    def __init__(self, network: BlockNetwork, head: Head, name: str = "block"):
        self.name, self.network, self._head = name, network, head
        self.taps: tuple[int, ...] = network.config.taps
        self.reset()

    def fresh(self) -> Block:
        return Block(self.network, self._head, self.name)

    def reset(self) -> None:
        self._cache = self.network.make_cache()

    def extend(self, tokens: Sequence[int], features: mx.array) -> None:
        """Take in the features (1, L, n * H) of tokens that are encoded."""
        self.network.extend(features, self._cache)
        mx.eval(self._cache.arrays())

    def snapshot(self) -> Snapshot:
        """What it has heard so far, to `restore` beside the main model's cache."""
        return self._cache.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        self._cache.restore(snapshot)

    def propose(self, context: DraftContext, width: int) -> Draft:
        tokens, config = context.tokens, self.network.config
        if self._cache.length != len(tokens) - 1:
            raise ValueError(f"it has heard of {self._cache.length} tokens, {len(tokens) - 1} are encoded")
        count = min(width, config.drafts)
        if count < 1:
            return NOTHING
        # a whole block whatever the width, as in training: guesses do not depend on how many are asked for
        block = mx.array([[tokens[-1], *[config.mask_token_id] * (config.positions - 1)]])
        embedded = context.model.embed(block)
        hidden = self.network.hidden(embedded, len(tokens) - 1, Behind(self._cache, config))
        hidden = self.network.predicting(hidden)[0, :count]
        guess = self._corrected if config.markov_rank is not None else self._plain
        ids, confidences = guess(hidden, self._head(hidden), context)
        mx.eval(ids, confidences)
        return Draft(ids.tolist(), confidences.tolist())

    def _plain(self, hidden: mx.array, logits: mx.array, context: DraftContext) -> tuple[mx.array, mx.array]:
        """Ids (L,) and how likely each is by the drafter's own distribution."""
        ids = context.sample(logits, len(context.tokens))
        return ids, mx.exp(_logprobs(logits, ids))

    def _corrected(self, hidden: mx.array, logits: mx.array, context: DraftContext) -> tuple[mx.array, mx.array]:
        """The same from left to right: each id corrects the distribution of the next."""
        markov, first = self.network.markov_head, len(context.tokens)
        chosen, before, likely = [], [], []
        last = mx.array(context.tokens[-1])
        for position in range(len(logits)):
            before.append(markov.before(last))
            row = self._reordered(logits[position], before[-1])
            last = context.sample(row[None], first + position)[0]
            chosen.append(last)
            likely.append(_logprobs(row[None], last[None])[0])
        if self.network.config.confidence is not None:
            return mx.stack(chosen), mx.sigmoid(self.network.confidence_head(hidden, mx.stack(before)))
        return mx.stack(chosen), mx.exp(mx.stack(likely))

    def _reordered(self, logits: mx.array, before: mx.array) -> mx.array:
        """Logits (V,) with the correction of the best candidates; the others get the least of theirs.

        So none of the others passes a candidate, and sampling and a bias still see all of them.
        """
        markov = self.network.markov_head
        if len(logits) <= CANDIDATES:
            return logits + markov.correction(before).astype(mx.float32)
        best = mx.argpartition(-logits, CANDIDATES)[:CANDIDATES]
        correction = markov.correction(before, best).astype(mx.float32)
        row = logits + correction.min()
        row[best] = logits[best] + correction
        return row


def _logprobs(logits: mx.array, ids: mx.array) -> mx.array:
    """Of one id a row: logits (L, V), ids (L,) -> (L,)."""
    chosen = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)


_loaded: list[tuple[weakref.ref, tuple, Block]] = []  # of models that are alive


def make(
    model: DiffusionGemma,
    place: str,
    *,
    drafter_bits: int | None = None,
    draft_head_bits: int | None = None,
    draft_vocab: Any = None,
) -> Block:
    """A drafter for one request; its weights are read once for a model.

    Args:
        place: a folder, a Hub id, or "nano".
        drafter_bits: 4 or 8: its matrices are quantised.
        draft_head_bits: 4 or 8: it guesses with a quantised copy of the head.
        draft_vocab: ids that it can draft, see `head.read_vocabulary`.

    Raises InputError, UsageError with one line.
    """
    check_bits("drafter_bits", drafter_bits)
    check_bits("draft_head_bits", draft_head_bits)
    ids = read_vocabulary(draft_vocab, model.config.vocab_size)
    key = (str(place), drafter_bits, draft_head_bits, ids)
    for owner, known, drafter in _loaded:
        if owner() is model and known == key:
            return drafter.fresh()
    name = f"block:{place}/{drafter_bits}/{draft_head_bits}/{len(ids) if ids else None}"
    network = read(find(place), model, drafter_bits)
    drafter = Block(network, Head(model, draft_head_bits, ids), name)
    _loaded.append((weakref.ref(model, _forget), key, drafter))
    return drafter.fresh()


def _forget(owner: weakref.ref) -> None:
    """A model is gone: so are its drafters, which hold its embedding."""
    _loaded[:] = [entry for entry in _loaded if entry[0] is not owner]


def find(place: str | Path) -> Path:
    """The folder of a drafter: "nano" (shipped for the embedded checkpoint), an existing folder, or a Hub id."""
    return EMBEDDED_DRAFTER if str(place) == NANO else resolve(place)

"""Block: a small network that reads the main model's features and guesses a whole block in one pass.

DFlash (arXiv 2602.06036) and DSpark. What it knows of the tokens so far are the outputs of some of
the main model's layers, which come with every pass that encodes; of the last token, which is not
encoded yet, it knows the id.

    extend   features of tokens that are encoded for good -> rows of its own context cache
    propose  [last, MASK ...] behind that context -> hidden states -> the main model's head -> ids
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache import Snapshot
from ..loading import HUB_ID
from ..memory import rows_kept
from ..model import DiffusionGemma
from . import weights
from .head import Head, check_bits, probabilities, read_ids, read_vocabulary, spelled, stamp
from .network import Behind, BlockNetwork
from .protocol import NOTHING, Draft, DraftContext
from .weights import find

CANDIDATES = 64  # ids that the correction by the token before may reorder
GROUP = 512  # ids that are searched together for them
AT_ONCE = 64  # tokens whose features may wait for the device
KEPT = 4  # networks, and heads, that later requests may share


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
        """Take in the features (1, L, n * H) of tokens that are encoded.

        Waiting would be for the main model's next step too, which may be launched already; a chunk of a
        prompt is waited for, so that its features are not held.
        """
        self.network.extend(features, self._cache)
        (mx.async_eval if features.shape[1] <= AT_ONCE else mx.eval)(self._cache.arrays())

    def snapshot(self) -> Snapshot:
        """What it has heard so far, to `restore` beside the main model's cache."""
        return self._cache.snapshot()

    def restore(self, snapshot: Snapshot) -> None:
        self._cache.restore(snapshot)

    def memory(self, context: int) -> int:
        """Bytes of its weights, of its copy of the head, and of its own rows behind `context` tokens."""
        network, config = self.network, self.network.config
        weights = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
        row = 2 * config.num_key_value_heads * config.head_dim * network.norm.weight.dtype.size
        return weights + self._head.nbytes + row * sum(rows_kept(window, context) for window in config.windows)

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
        return ids, probabilities(logits, ids)

    def _corrected(self, hidden: mx.array, logits: mx.array, context: DraftContext) -> tuple[mx.array, mx.array]:
        """The same from left to right: each id corrects the distribution of the next.

        What looks at the whole vocabulary does so at once, before; then an id costs one whole row, which
        `sample` wants. Likely is what is so among the candidates: the mass of the others is left out.
        """
        markov, first = self.network.markov_head, len(context.tokens)
        best = candidates(logits)
        rows = markov.rows(best)
        chosen, before, likely = [], [], []
        last = mx.array(context.tokens[-1])
        for position in range(len(logits)):
            before.append(markov.before(last))
            row = self._reordered(logits[position], best[position], rows[position], before[-1])
            last = context.sample(row[None], first + position)[0]
            chosen.append(last)
            likely.append(row[last] - mx.logsumexp(row[best[position]]))
        if self.network.config.confidence is not None:
            return mx.stack(chosen), mx.sigmoid(self.network.confidence_head(hidden, mx.stack(before)))
        return mx.stack(chosen), mx.exp(mx.stack(likely))

    def _reordered(self, logits: mx.array, best: mx.array, rows: mx.array, before: mx.array) -> mx.array:
        """Logits (V,) with the correction of the candidates `best` (n,), whose `rows` are (n, rank).

        The others get the least of theirs: none of them passes a candidate, and sampling and a bias
        still see all of them.
        """
        correction = self.network.markov_head.correction(before, rows).astype(mx.float32)
        row = logits + correction.min()
        row[best] = logits[best] + correction
        return row


def candidates(logits: mx.array) -> mx.array:
    """The likeliest ids of each row, in no order: (L, V) -> (L, n), all of them if there are so few.

    A wide vocabulary is searched in two steps, which find the same ids sooner: those groups of neighbours
    that hold the highest logits, and the ids in them.
    """
    count, size = logits.shape
    if size <= CANDIDATES:
        return mx.broadcast_to(mx.arange(size), (count, size))
    if size % GROUP or size <= GROUP * CANDIDATES:
        return mx.argpartition(-logits, CANDIDATES - 1, axis=-1)[:, :CANDIDATES]
    groups = logits.reshape(count, -1, GROUP)
    high = candidates(groups.max(axis=-1))
    inside = mx.take_along_axis(groups, high[..., None], axis=1).reshape(count, -1)
    best = mx.argpartition(-inside, CANDIDATES - 1, axis=-1)[:, :CANDIDATES]
    return mx.take_along_axis(high, best // GROUP, axis=-1) * GROUP + best % GROUP


class Shared:
    """What requests share of models that are alive, the latest few."""

    def __init__(self) -> None:
        self.entries: list[tuple[weakref.ref, Hashable, Any]] = []

    def get(self, model: DiffusionGemma, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made for this model and key, or is now."""
        found = next((entry for entry in self.entries if entry[0]() is model and entry[1] == key), None)
        if found is None:
            found = (weakref.ref(model, self._forget), key, make())
        self.entries = [*(entry for entry in self.entries if entry is not found), found][-KEPT:]
        return found[2]

    def _forget(self, owner: weakref.ref) -> None:
        """A model is gone: so is what holds its embedding."""
        self.entries = [entry for entry in self.entries if entry[0] is not owner]


networks, heads = Shared(), Shared()


def check(
    place: str, *, drafter_bits: int | None = None, draft_head_bits: int | None = None, draft_vocab: Any = None
) -> None:
    """Raise what `make` would, as far as it does not depend on the model; nothing is downloaded."""
    check_bits("drafter_bits", drafter_bits)
    check_bits("draft_head_bits", draft_head_bits)
    vocabulary = spelled(draft_vocab)
    if isinstance(vocabulary, Path):
        read_ids(vocabulary)
    if Path(place).exists() or not HUB_ID.fullmatch(place):
        weights.read_config(find(place))


def make(
    model: DiffusionGemma,
    place: str,
    *,
    drafter_bits: int | None = None,
    draft_head_bits: int | None = None,
    draft_vocab: Any = None,
) -> Block:
    """A drafter for one request; its weights are read once for a model, and again if its files were written since.

    Args:
        place: a folder, a Hub id, or "nano".
        drafter_bits: 4 or 8: its matrices are quantised.
        draft_head_bits: 4 or 8: it guesses with a quantised copy of the head.
        draft_vocab: the ids that it can draft: a number (so many from 0 on), ids, or a JSON file with a list of them.

    Raises InputError, UsageError with one line.
    """
    check_bits("drafter_bits", drafter_bits)
    check_bits("draft_head_bits", draft_head_bits)
    ids, folder = spelled(draft_vocab), find(place)
    network = networks.get(
        model,
        (folder.resolve(), drafter_bits, weights.stamp(folder)),
        lambda: weights.read(folder, model, drafter_bits),
    )
    head = heads.get(
        model,
        (draft_head_bits, stamp(ids)),
        lambda: Head(model, draft_head_bits, read_vocabulary(ids, model.config.vocab_size)),
    )
    count = None if ids is None else head.size
    return Block(network, head, f"block:{place}/{drafter_bits}/{draft_head_bits}/{count}")

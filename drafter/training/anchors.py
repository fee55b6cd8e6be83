"""Blocks at many anchors of one answer, run together, and how far they are from what the main model says.

    position    0 ........ P-1 P ........ N-1
                 prompt         answer, its end included
    block at a           [t_a, MASK ...] behind the features of tokens [0, a)
    its drafts            t_a+1, t_a+2 ...; those past the answer's end count for nothing

An anchor stands where a round of decoding may begin: from the prompt's last token to the last but
one of the answer. What a block sees is what `network.Behind` shows it when it drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...config import SLIDING
from ...model import DiffusionGemma, Taps
from ..geometry import BlockConfig
from ..network import BlockNetwork

CHUNK = 2048  # tokens that the main model encodes at a time
CE, TV, CONFIDENCE = 0.1, 0.9, 1.0  # shares of the loss, as DSpark's
DECAY = 4.0  # drafts after which a position weighs 1/e

Rows = list[tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Text:
    """A prompt and its answer, as the main model sees them.

    Attributes:
        ids: (N,)
        start: the first anchor there may be.
        features: (1, N - 1, n * H) float32, the tapped layers.
        hidden: (N - 1, H), from which the main model's logits of the next token follow.
    """

    ids: np.ndarray
    start: int
    features: mx.array
    hidden: mx.array

    @property
    def places(self) -> np.ndarray:
        """All anchors."""
        return np.arange(self.start, len(self.ids) - 1)


def first_anchor(prompt: Sequence[int]) -> int:
    """The prompt's last token; a block with no context at all is never trained here."""
    return max(1, len(prompt) - 1)


def observe(model: DiffusionGemma, prompt: Sequence[int], answer: Sequence[int], taps: Sequence[int]) -> Text:
    """Run the main model over a text, chunk by chunk. No gradient reaches it."""
    ids = np.array([*prompt, *answer], dtype=np.int32)
    cache, features, hidden = model.make_cache(slack=0), [], []
    for first in range(0, len(ids) - 1, CHUNK):
        tapped = Taps(taps)
        out = model.encode(mx.array(ids[None, first : min(first + CHUNK, len(ids) - 1)]), cache, tapped)
        features.append(tapped.features.astype(mx.float32))
        hidden.append(out[0])
        mx.eval(features[-1], hidden[-1], cache.arrays())
    joined = [parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-2) for parts in (features, hidden)]
    return Text(ids, first_anchor(prompt), *joined)


class Anchored:
    """The view of blocks at many anchors of one text, a `network.View`: `Behind` for each of them.

    Args:
        rows: of the whole text, from `BlockNetwork.context`.
        anchors: (B,) positions of the blocks' first tokens.
    """

    def __init__(self, rows: Rows, anchors: np.ndarray, config: BlockConfig):
        self._rows, self._anchors, self._config = rows, anchors, config
        self._masks: dict[str, tuple[slice, mx.array]] = {}  # by kind of layer

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        batch, heads, length, size = queries.shape
        kv_heads = keys.shape[1]
        span, seen = self._seen(layer, length)
        far_keys, far_values = (rows[0, :, span] for rows in self._rows[layer])  # (kv heads, S, D)
        # (kv heads, B, group, L, D): all blocks' queries of a head lie side by side
        grouped = (queries * scale).reshape(batch, kv_heads, -1, length, size).swapaxes(0, 1)
        near_keys, near_values = (x.swapaxes(0, 1)[:, :, None] for x in (keys, values))
        far = grouped.reshape(kv_heads, -1, size) @ far_keys.swapaxes(-1, -2)
        far = far.reshape(*grouped.shape[:-1], -1)
        near = grouped @ near_keys.swapaxes(-1, -2)
        scores = mx.where(seen, mx.concatenate([far, near], axis=-1), -mx.inf)
        shares = mx.softmax(scores, axis=-1, precise=True)
        count = far_keys.shape[1]
        out = (shares[..., :count].reshape(kv_heads, -1, count) @ far_values).reshape(grouped.shape)
        out = out + shares[..., count:] @ near_values
        return out.swapaxes(0, 1).reshape(batch, heads, length, size)

    def _seen(self, layer: int, length: int) -> tuple[slice, mx.array]:
        """The rows that any block may see, and which of them and of its own each does: (B, 1, L, S + L)."""
        kind, last = self._config.kinds[layer], int(self._anchors.max())
        if kind in self._masks:
            return self._masks[kind]
        kept = self._config.windows[layer]
        kept = last if kept is None else kept
        first = max(0, int(self._anchors.min()) - kept)
        # positions of rows and queries from each block's first one on
        rows = np.arange(first, last)[None, None] - self._anchors[:, None, None]
        own = np.arange(length)
        far = np.broadcast_to((rows < 0) & (rows >= -kept), (len(rows), length, last - first))
        near = np.full((len(rows), length, length), True)
        if self._config.causal:  # a sliding window is each position's own
            window = self._config.sliding_window if kind == SLIDING else last + length
            far = far & (own[None, :, None] - rows < window)
            distance = own[:, None] - own[None]
            near = near & (distance >= 0) & (distance < window)
        both = np.concatenate([far, near], axis=-1)
        self._masks[kind] = slice(first, last), mx.array(both[:, None])
        return self._masks[kind]


def weights(length: int, anchors: np.ndarray, drafts: int) -> np.ndarray:
    """Of the drafts (B, K) of blocks at anchors (B,) of a text so long: exp(-k / DECAY), 0 past the end."""
    order = np.arange(drafts)
    is_there = anchors[:, None] + order + 1 < length
    return (is_there * np.exp(-order / DECAY)).astype(np.float32)


@dataclass(frozen=True)
class Blocks:
    """What blocks at anchors (B,) of a text are compared with, draft by draft (B, K)."""

    anchors: np.ndarray
    targets: np.ndarray
    before: np.ndarray  # the token before each target
    weights: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, anchors: np.ndarray, drafts: int) -> Blocks:
        """Of a text's ids (N,)."""
        places = np.minimum(anchors[:, None] + np.arange(drafts), len(ids) - 2)
        return cls(anchors, ids[places + 1], ids[places], weights(len(ids), anchors, drafts))

    def __getitem__(self, key: slice) -> Blocks:
        return Blocks(self.anchors[key], self.targets[key], self.before[key], self.weights[key])


def run(
    network: BlockNetwork, model: DiffusionGemma, text: Text, blocks: Blocks, rows: Rows
) -> tuple[mx.array, mx.array | None]:
    """The drafter's logits (B, K, V), float32, and what its confidence head says (B, K).

    Each draft is told the true token before it. That changes no leading run of right drafts: as long
    as they are right, the drafted token is the true one.
    """
    config = network.config
    ids = np.full((len(blocks.anchors), config.positions), config.mask_token_id, np.int32)
    ids[:, 0] = text.ids[blocks.anchors]
    embedded = model.embed(mx.array(ids)).astype(mx.float32)
    view = Anchored(rows, blocks.anchors, config)
    hidden = network.predicting(network.hidden(embedded, mx.array(blocks.anchors.astype(np.int32)), view))
    logits = model.logits(hidden.astype(model.dtype))
    if config.markov_rank is None:
        return logits, None
    before = network.markov_head.before(mx.array(blocks.before))
    logits = logits + network.markov_head.correction(before).astype(mx.float32)
    return logits, None if config.confidence is None else network.confidence_head(hidden, before)


def main_shares(model: DiffusionGemma, text: Text, blocks: Blocks) -> mx.array:
    """The main model's own distributions of the targets (B, K, V), at temperature 1; each place is computed once."""
    places = np.minimum(blocks.anchors[:, None] + np.arange(blocks.targets.shape[1]), len(text.ids) - 2)
    unique, inverse = np.unique(places, return_inverse=True)
    shares = mx.softmax(model.logits(text.hidden[mx.array(unique)][None])[0], axis=-1)
    return mx.stop_gradient(shares[mx.array(inverse.reshape(places.shape))])


def loss(logits: mx.array, confidence: mx.array | None, shares: mx.array, blocks: Blocks) -> tuple[mx.array, mx.array]:
    """The weighted sum over all drafts, and the acceptance probabilities (B, K), 0 past the end.

    A draft drawn from q where the main model draws from p can be accepted with probability
    sum min(p, q) = 1 - TV (arXiv 2211.17192).
    """
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    weights = mx.array(blocks.weights)
    surprise = -mx.take_along_axis(logprobs, mx.array(blocks.targets)[..., None], axis=-1)[..., 0]
    distance = 0.5 * mx.abs(shares - mx.exp(logprobs)).sum(axis=-1)
    total = CE * surprise + TV * distance
    accepted = mx.stop_gradient(1 - distance)
    if confidence is not None:
        total = total + CONFIDENCE * (mx.logaddexp(mx.zeros_like(confidence), confidence) - accepted * confidence)
    return (weights * total).sum(), accepted * (weights > 0)

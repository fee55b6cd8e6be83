"""Bugs planted in the block drafter: the comparison with the arbiter sees each of them."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dgemma.drafter import network
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.geometry import BlockConfig
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.model import DiffusionGemma
from tests.drafter.arbiter import CONFIGS, LAST, MIDDLE, arbiter, random_weights
from tests.drafter.judge import MAX_RATIO, embedding, our_drafter, ours, random_features, ratio, their_drafter, theirs

pytestmark = pytest.mark.reference


def dealt_heads(patch):
    """Columns dealt to the heads in turn instead of cut into heads."""

    def rows(self, x, heads):
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, heads).swapaxes(2, 3)

    def call(self, x, first, view):
        batch, length, _ = x.shape
        queries = self.q_norm(rows(self, self.q_proj(x), self.heads)).swapaxes(1, 2)
        out = view.attend(self.index, self._rotary(queries, first), *self.rows(x, first), self.scale)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))

    patch.setattr(network.Attention, "__call__", call)


def tiled_kv_heads(patch):
    """Query head i reads key head i modulo their number instead of i by the size of a group."""
    attend = network.Behind.attend

    def tiled(self, layer, queries, keys, values, scale):
        order = mx.argsort(mx.arange(queries.shape[1]) % keys.shape[1])
        out = attend(self, layer, queries[:, order], keys, values, scale)
        return out[:, mx.argsort(order)]

    patch.setattr(network.Behind, "attend", tiled)


def unscaled_embedding(patch):
    patch.setattr(DiffusionGemma, "embed", lambda self, ids: self.model.decoder.embed_tokens(ids))


def read_one_too_late(patch):
    own = BlockNetwork.predicting
    patch.setattr(BlockNetwork, "predicting", lambda self, hidden: mx.roll(own(self, hidden), -1, axis=1))


def read_as_the_other_family(patch):
    """[MASK ...] read where [last, MASK ...] is meant, or the other way round."""

    def predicting(self, hidden):
        return mx.roll(hidden, -1, axis=1) if self.config.from_anchor else hidden[:, :-1]

    patch.setattr(BlockNetwork, "predicting", predicting)


def block_one_too_far(patch):
    hidden = BlockNetwork.hidden
    patch.setattr(BlockNetwork, "hidden", lambda self, x, first, view: hidden(self, x, first + 1, view))


def context_one_too_far(patch):
    context = BlockNetwork.context
    patch.setattr(BlockNetwork, "context", lambda self, features, first: context(self, features, first + 1))


def changed_rows(change):
    def plant(patch):
        patch.setattr(network.Attention, "rows", change)

    return plant


def without_k_norm(self, x, first):
    batch, length, _ = x.shape
    keys = self.k_proj(x).reshape(batch, length, self.kv_heads, -1).swapaxes(1, 2)
    return self._rotary(keys, first), self.v_proj(x).reshape(batch, length, self.kv_heads, -1).swapaxes(1, 2)


_rows = network.Attention.rows


def with_v_norm(self, x, first):
    keys, values = _rows(self, x, first)
    return keys, mx.fast.rms_norm(values, None, 1e-6)


def other_mask(patch):
    start = network.Behind.__init__
    patch.setattr(
        network.Behind,
        "__init__",
        lambda self, cache, config: start(self, cache, replace(config, causal=not config.causal)),
    )


def other_window(by):
    def plant(patch):
        own = BlockConfig.windows.fget
        changed = property(lambda self: [None if window is None else window + by for window in own(self)])
        patch.setattr(BlockConfig, "windows", changed)

    return plant


def other_mask_window(patch):
    """The mask of a sliding layer sees one position less; what is kept is right."""
    causal = network.Behind._causal

    def narrow(self, layer, queries, keys):
        mask = causal(self, layer, queries, keys)
        return mask & (mx.arange(keys)[None] > mx.argmax(mask, axis=1)[:, None])

    patch.setattr(network.Behind, "_causal", narrow)


def from_right_to_left(patch):
    def corrected(self, hidden, logits, context):
        markov, first, last = self.network.markov_head, len(context.tokens), mx.array(context.tokens[-1])
        rows, chosen = {}, {}
        for position in reversed(range(len(logits))):
            rows[position] = logits[position] + markov.correction(markov.before(last))
            last = chosen[position] = mx.argmax(rows[position])
        stacked = mx.stack([rows[i] for i in range(len(logits))])
        context.sample(stacked, first)
        return mx.stack([chosen[i] for i in range(len(logits))]), mx.zeros(len(logits))

    patch.setattr(Block, "_corrected", corrected)


def always_by_the_last_token(patch):
    patch.setattr(network.Markov, "before", lambda self, ids: self.markov_w1(mx.full(ids.shape, LAST)))


def by_the_token_itself(patch):
    """The correction of a position by its own best guess."""
    own = Block._reordered

    def itself(self, logits, best, rows, before):
        return own(self, logits, best, rows, self.network.markov_head.before(mx.argmax(logits)))

    patch.setattr(Block, "_reordered", itself)


def confidence_without_what_is_before(patch):
    call = network.Confidence.__call__
    patch.setattr(network.Confidence, "__call__", lambda self, hidden, before: call(self, hidden, 0 * before))


def no_scale(patch):
    start = network.Attention.__init__

    def unscaled(self, config, index):
        start(self, config, index)
        self.scale = 1.0

    patch.setattr(network.Attention, "__init__", unscaled)


def no_softcap(patch):
    start = Head.__init__

    def uncapped(self, *given):
        start(self, *given)
        self._cap = 1e6

    patch.setattr(Head, "__init__", uncapped)


PLANTED = [
    (dealt_heads, "full"),
    (dealt_heads, "wide"),
    (tiled_kv_heads, "full"),
    (tiled_kv_heads, "wide"),
    (unscaled_embedding, "full"),
    (unscaled_embedding, "dspark"),
    (read_one_too_late, "full"),
    (read_one_too_late, "dspark"),
    (read_as_the_other_family, "full"),
    (read_as_the_other_family, "dspark"),
    (read_as_the_other_family, "dspark, not from the anchor"),
    (block_one_too_far, "full"),
    (block_one_too_far, "sliding"),
    (block_one_too_far, "dspark"),
    (context_one_too_far, "sliding"),
    (changed_rows(without_k_norm), "full"),
    (changed_rows(with_v_norm), "full"),
    (changed_rows(with_v_norm), "dspark"),
    (other_mask, "full"),
    (other_mask, "sliding"),
    (other_mask, "dspark"),
    (other_mask, "causal"),
    (other_window(1), "sliding"),
    (other_window(-1), "sliding"),
    (other_window(1), "draft window"),
    (other_mask_window, "causal, sliding"),
    (from_right_to_left, "dspark"),
    (always_by_the_last_token, "dspark"),
    (by_the_token_itself, "dspark"),
    (confidence_without_what_is_before, "confidence"),
    (no_scale, "full"),
    (no_softcap, "full"),
]


@pytest.mark.parametrize(("plant", "name"), PLANTED)
def test_a_planted_bug_fails(monkeypatch, plant, name):
    """Logits, or confidences, are far from the truth; a draft of other tokens is not needed to see it."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, MIDDLE)
    truth, other = arbiter(raw, given, embedding(raw), features), theirs(their_drafter(raw, given), features)
    plant(monkeypatch)
    own = ours(our_drafter(raw, given), features, 33)
    assert ratio(own, truth, other) > 100 * MAX_RATIO

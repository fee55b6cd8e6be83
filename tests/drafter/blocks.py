"""What the tests of block drafters in the loop share: drafters, some of them helped, and what they draft."""

from __future__ import annotations

import mlx.core as mx

from mlx_dgemma.cache import CacheReader
from mlx_dgemma.config import FULL, SLIDING
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.protocol import Draft, DraftContext
from tests.decoding.runs import VOCAB, plain
from tests.drafter.files import changed

HIDDEN = 64
DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 16,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [0, 1]},
    "final_logit_softcapping": 30.0,
    "head_dim": 16,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "layer_types": [SLIDING, FULL],
    "max_position_embeddings": 512,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "sliding_window": 12,
    "vocab_size": VOCAB,
}
SPARK = {"projector_type": "dspark", "markov_rank": 8, "enable_confidence_head": True}
DSPARK = {**DFLASH, "dflash_config": DFLASH["dflash_config"] | SPARK}
RAW = {
    "dflash": DFLASH,
    "dflash, draft window": changed(DFLASH, "own.draft_window_size", 5),
    "dspark": DSPARK,
    "dspark, later": changed(changed(DSPARK, "own.sample_from_anchor", False), "own.causal", True),
    "dspark, wide": changed(DSPARK, "block_size", 40),
}
# longer than a chunk of the prompt, the model's window and the drafter's
PROMPT = [(11 * i * i + 5 * i + 3) % VOCAB for i in range(40)]
STEP = 7


class Helped(Block):
    """Has the first tokens of every draft whispered: `right` of them, or that many in turn.

    It writes down what it drafted by itself: (tokens so far, ids, confidences).
    """

    says_confidences = True

    def __init__(self, drafter: Block, text=(), right=(0,)):
        super().__init__(drafter.network, drafter._head, drafter.name)
        self.text, self.right, self.story = list(text), right, []

    def propose(self, context, width):
        draft = super().propose(context, width)
        self.story.append((list(context.tokens), list(draft.tokens), list(draft.confidences)))
        tokens, count = list(draft.tokens), len(context.tokens)
        right = min(self.right[len(self.story) % len(self.right)], len(tokens), len(self.text) - count)
        tokens[:right] = self.text[count : count + right]
        return Draft(tokens, draft.confidences if self.says_confidences else None)


HELP = (0, 2, 15, 1, 40, 5)


def helped(drafter: Block, model, prompt, config, seed=0, right=HELP) -> Helped:
    return Helped(drafter, plain(model, prompt, config, seed).text, right)


def greedy(logits, first):
    return mx.argmax(logits, axis=-1)


def asked(model, drafter: Block, tokens, width: int = 40, sample=greedy):
    """(ids, confidences) behind `tokens`."""
    context = DraftContext(tokens, CacheReader(model.make_cache()), model, sample)
    draft = Block.propose(drafter, context, width)
    return list(draft.tokens), list(draft.confidences)


def told(model, drafter: Block, tokens, step: int = 2048) -> Block:
    """A fresh one that heard tokens[:-1] in a prefill."""
    fresh = drafter.fresh()
    prefill(
        model,
        tokens[:-1],
        model.make_cache(),
        step,
        taps=fresh.taps,
        listener=lambda ids, tapped: fresh.extend(ids, tapped.features),
    )
    return fresh


def assert_drafts_alike(got, expected) -> None:
    """Ids, and confidences up to what passes of other widths round otherwise."""
    assert got[0] == expected[0]
    assert mx.allclose(mx.array(got[1]), mx.array(expected[1]), rtol=1e-3, atol=1e-5)


def assert_as_if_prefilled(model, drafter: Helped) -> None:
    """Every draft of its story is that of one that heard of all tokens at once."""
    assert drafter.story
    for tokens, ids, confidences in drafter.story:
        expected = asked(model, told(model, drafter, tokens), tokens, len(ids))
        assert_drafts_alike((ids, confidences), expected)

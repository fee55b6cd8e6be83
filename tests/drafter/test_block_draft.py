"""How a block drafter drafts: from which layers, with whose draws, and how DSpark corrects."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_dgemma.drafter import block
from mlx_dgemma.drafter.block import Block, make
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.layers import Pass
from mlx_dgemma.model import Taps
from tests.decoding.runs import GREEDY, VOCAB, WARM, assert_lossless, plain
from tests.drafter.blocks import DFLASH, PROMPT, RAW, Helped, asked, assert_drafts_alike, told
from tests.drafter.files import changed, random_network


def test_taps_are_the_outputs_of_their_layers(model, folders, monkeypatch):
    """`hidden_states[i + 1]` of transformers, whose first entry is the embeddings: both give the same drafts."""
    raw = changed(DFLASH, "own.target_layer_ids", [1])
    drafter = Block(random_network(raw), Head(model))
    ids = mx.array([PROMPT[:-1]])
    states, cache = [model.embed(ids)], model.make_cache()
    run_of = Pass(cache, model.config.sliding_window, ids.shape[1], causal=True)
    for layer, own in zip(model.layers, model.model.encoder.language_model.layers, strict=True):
        states.append(layer(states[-1], run_of, own.layer_scalar))

    def by_states(first):
        fresh = drafter.fresh()
        fresh.extend(PROMPT[:-1], mx.concatenate([states[tap + first] for tap in drafter.taps], axis=-1))
        return asked(model, fresh, PROMPT)

    expected = by_states(1)
    assert_drafts_alike(asked(model, told(model, drafter, PROMPT), PROMPT), expected)
    assert by_states(0)[0] != expected[0]
    offer = Taps.offer
    # planted: the layer before, and the one behind
    monkeypatch.setattr(Taps, "offer", lambda self, index, hidden: offer(self, index + 1, hidden))
    assert asked(model, told(model, drafter, PROMPT), PROMPT)[0] != expected[0]


def knowing(drafter: Block, model, text) -> Block:
    """One whose distribution is the main model's own, behind each prefix of `text`."""
    truth = model.logits(model.encode(mx.array([text]), model.make_cache()))[0]
    fresh = drafter.fresh()
    fresh._head = lambda hidden: truth[fresh._cache.length :][: len(hidden)]
    return fresh


@pytest.mark.parametrize("name", ["dflash", "dspark"])
@pytest.mark.parametrize(
    "config",
    [GREEDY, WARM, WARM.replace(temperature=1.5, logit_bias={7: 2.0}, top_k=0, top_p=1.0)],
    ids=["greedy", "warm", "hot"],
)
def test_drafts_are_sampled_with_the_loops_own_draws(model, name, config):
    """So one that knows the main model's distribution drafts what it will choose, at any temperature."""
    network = random_network(RAW[name])
    if network.config.markov_rank is not None:
        network.markov_head.markov_w2.weight *= 0
    text = plain(model, PROMPT, config, 5).text
    for width in (3, 15):
        drafter = knowing(Block(network, Head(model)), model, text)
        done = assert_lossless(model, drafter, PROMPT, config, 5, width=width)
        assert done.counts.drafter_failure is None
        assert done.counts.accepted == done.counts.drafted > 0
        assert done.counts.rounds <= -(-config.max_new_tokens // (width + 1))
    if config.temperature:  # planted: the draws of the positions before
        drafter = knowing(Block(network, Head(model)), model, text)
        own = drafter.propose

        def shifted(context, width):
            sample = context.sample
            changed = DraftContext(context.tokens, context.cache, model, lambda logits, at: sample(logits, at - 1))
            return own(changed, width)

        drafter.propose = shifted
        done = assert_lossless(model, drafter, PROMPT, config, 5, width=15)
        assert done.counts.accepted < done.counts.drafted


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_ids_outside_the_slice_are_never_drafted(model, folders, name, bits):
    allowed = [1, 5, 6, 77, 100, 130]
    for config in (GREEDY, WARM.replace(temperature=3.0, top_k=0, top_p=1.0)):
        drafter = Helped(make(model, folders(name), draft_head_bits=bits, draft_vocab=allowed))
        assert_lossless(model, drafter, PROMPT, config, width=9)
        drafted = {token for _, ids, _ in drafter.story for token in ids}
        assert drafted <= set(allowed)
        assert len(drafted) > 1


# --- the correction


def test_the_correction_reorders_candidates_alone(model, folders):
    """64 of 131 ids are corrected; none of the others passes one of them, and all can be sampled still."""
    drafter = make(model, folders("dspark"))
    markov = drafter.network.markov_head
    for seed in range(8):
        logits = mx.random.normal((VOCAB,), key=mx.random.key(seed))
        before = 3 * markov.before(mx.array(seed))
        best = block.candidates(logits[None])[0]
        row, whole = drafter._reordered(logits, best, markov.rows(best), before), logits + markov.correction(before)
        order = mx.argsort(-logits)
        assert sorted(best.tolist()) == sorted(order[: block.CANDIDATES].tolist())
        others = order[block.CANDIDATES :]
        assert mx.allclose(row[best], whole[best], atol=1e-5)
        assert row[others].max() <= row[best].min() + 1e-5
        assert mx.isfinite(row).all()
        assert mx.argmax(row).item() in best.tolist()


@pytest.mark.parametrize("size", [5, 64, 65, 131, 512, 512 * 64, 512 * 65, 512 * 65 + 1, 512 * 130])
@pytest.mark.parametrize("known", [1.0, 0.001])
def test_candidates_are_the_likeliest(size, known):
    """Of wide vocabularies too, and where most ids cannot be drafted."""
    logits = mx.random.normal((3, size), key=mx.random.key(size))
    logits = mx.where(mx.random.uniform(shape=(size,), key=mx.random.key(1)) <= known, logits, -mx.inf)
    logits[:, size // 2] = 0.5
    best, count = block.candidates(logits), min(size, block.CANDIDATES)
    assert best.shape == (3, count)
    assert all(len(set(ids)) == count and max(ids) < size for ids in best.tolist())
    found = mx.sort(mx.take_along_axis(logits, best, axis=-1), axis=-1)
    assert mx.array_equal(found, mx.sort(logits, axis=-1)[:, size - count :])


def test_candidates_are_searched_once_a_draft(model, folders, monkeypatch):
    """What looks at the whole vocabulary does so for all positions together; nothing waits in between."""
    drafter = told(model, make(model, folders("dspark")), PROMPT)
    expected, calls = asked(model, drafter, PROMPT), []
    for name in ("argpartition", "eval"):
        own = getattr(mx, name)
        monkeypatch.setattr(
            mx, name, lambda *given, own=own, name=name, **how: calls.append(name) or own(*given, **how)
        )
    assert asked(model, drafter, PROMPT) == expected
    assert calls == ["argpartition", "eval"]


def test_likely_is_what_is_so_among_the_candidates(model, folders):
    raw = changed(RAW["dspark"], "own.enable_confidence_head", False)
    network, rows, stray = random_network(raw), [], 0
    drafter = told(model, Block(network, Head(model)), PROMPT)

    def sample(logits, first):  # the likeliest, and now and then the least likely
        rows.append(logits[0])
        return mx.argmax(logits, axis=-1) if first % 3 else mx.argmin(logits, axis=-1)

    ids, confidences = asked(model, drafter, PROMPT, sample=sample)
    for token, confidence, row in zip(ids, confidences, rows, strict=True):
        shares = mx.softmax(mx.sort(row)[-block.CANDIDATES :])
        if row[token] > mx.sort(row)[-block.CANDIDATES]:
            assert confidence == pytest.approx(shares.max().item(), rel=1e-4)
        else:
            stray += 1
            assert 0 <= confidence <= 1 / block.CANDIDATES
    assert stray

"""The block drafter in the loop: the answer is the same, and a draft depends on what was heard alone."""

from __future__ import annotations

import gc
import shutil
import weakref
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.cache import GROWTH, SPARE, CacheReader
from mlx_dgemma.config import FULL, SLIDING
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter import block, weights
from mlx_dgemma.drafter.block import Block, Shared, make
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.protocol import Draft, DraftContext
from mlx_dgemma.errors import UsageError
from mlx_dgemma.layers import Pass
from mlx_dgemma.model import DiffusionGemma, Taps
from tests.decoding.runs import CHEAP, GREEDY, VOCAB, WARM, assert_lossless, lively_model, plain, run
from tests.drafter.files import changed, random_network, write_drafter

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


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return lively_model(hidden_size=HIDDEN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> the folder of a random drafter."""
    place = tmp_path_factory.mktemp("drafters")

    @cache
    def of(name: str) -> str:
        return str(write_drafter(place / name.replace(", ", "-").replace(" ", "-"), RAW[name]))

    return of


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


# --- the answer is the same

OPTIONS = {
    "as it is": {},
    "4 bits": {"drafter_bits": 4},
    "8 bits": {"drafter_bits": 8},
    "head of 4 bits": {"draft_head_bits": 4},
    "head of 8 bits": {"draft_head_bits": 8},
    "a slice": {"draft_vocab": 70},
    "few ids": {"draft_vocab": [3, 9, 100]},
    "all": {"drafter_bits": 4, "draft_head_bits": 4, "draft_vocab": list(range(0, VOCAB, 2))},
}
WIDTHS = {str(width): (lambda width=width: Widths(fixed=width)) for width in (1, 4, 15, 16, 40)}
WIDTHS |= {"costs": lambda: Widths(CHEAP), "adaptive": Widths}


def assert_sane(done, drafter) -> None:
    counts = done.counts
    assert counts.drafter_failure is None
    assert counts.surplus == 0
    assert counts.accepted <= counts.drafted
    # the chunks of the prompt, then a pass a round, each giving what it accepted and a token of its own
    assert counts.encode_forwards >= -(-(len(done.prompt) - 1) // STEP) + len(done.ids) - counts.accepted - 1
    assert drafter._cache.length == len(done.text) - 1


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", RAW)
def test_the_answer_is_that_without_a_drafter(model, folders, name, widths):
    for config, seed in ((GREEDY, 0), (WARM, 1)):
        drafter = helped(make(model, folders(name)), model, PROMPT, config, seed)
        done = assert_lossless(model, drafter, PROMPT, config, seed, widths=WIDTHS[widths](), prefill_step=STEP)
        assert_sane(done, drafter)
        if widths not in ("costs", "adaptive"):
            assert done.counts.accepted > 0
            assert max(len(ids) for _, ids, _ in drafter.story) == min(int(widths), drafter.network.config.drafts, 19)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_quantised_and_sliced_as_well(model, folders, name, options):
    for config, seed in ((GREEDY, 0), (WARM, 3), (WARM.replace(top_k=0, top_p=1.0, repetition_penalty=1.3), 2)):
        drafter = helped(make(model, folders(name), **OPTIONS[options]), model, PROMPT, config, seed)
        done = assert_lossless(model, drafter, PROMPT, config, seed, width=6, prefill_step=STEP)
        assert_sane(done, drafter)


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_without_any_help(model, folders, name):
    """Short and long prompts, drafts as they come."""
    for prompt in ([2], [2, 17], PROMPT, PROMPT * 8):
        for config, seed in ((GREEDY, 0), (WARM, 1)):
            drafter = make(model, folders(name))
            done = assert_lossless(model, drafter, prompt, config, seed, width=4, prefill_step=100)
            assert done.counts.drafter_failure is None
            assert done.counts.drafted > 20


@pytest.mark.parametrize("name", ["dflash", "dspark"])
@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "warm"])
def test_an_end_inside_a_block(model, folders, name, config):
    ids = plain(model, PROMPT, config).ids
    for place in (0, 3, 8):
        ended = config.replace(eos_token_ids=(ids[place],))
        drafter = Helped(make(model, folders(name)), PROMPT + ids, (40,))
        done = assert_lossless(model, drafter, PROMPT, ended, width=12, prefill_step=STEP)
        assert done.reasons[-1] == "stop"
        assert drafter._cache.length == len(done.text) - 1
    for most in (1, 2, 7):
        drafter = Helped(make(model, folders(name)), PROMPT + ids, (40,))
        done = assert_lossless(model, drafter, PROMPT, config.replace(max_new_tokens=most), width=12)
        assert len(done.ids) == most
        assert done.counts.drafter_failure is None


# --- a draft is a function of what was heard


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


@pytest.mark.parametrize("right", [(0,), (1,), (3,), HELP], ids=str)
@pytest.mark.parametrize("name", RAW)
def test_after_rejected_drafts(model, folders, name, right):
    drafter = helped(make(model, folders(name)), model, PROMPT, GREEDY, right=right)
    done = run(model, PROMPT, drafter=drafter, width=6, prefill_step=STEP)
    assert done.counts.accepted < done.counts.drafted
    assert_as_if_prefilled(model, drafter)


@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_after_rounds_without_drafts(model, folders, name):
    """Where drafting does not pay it stops, and probes at growing distance."""
    drafter = Helped(make(model, folders(name)))
    drafter.says_confidences = False  # or it would be asked, and its drafts left alone
    costs = Costs(plain=1.0, verified={1: 1.0, 17: 1.5})
    config = GREEDY.replace(max_new_tokens=60)
    done = run(model, PROMPT, config, drafter=drafter, widths=Widths(costs), prefill_step=STEP)
    assert done.counts.drafter_failure is None
    assert 0 < done.counts.rounds < len(done.ids) / 3
    assert_as_if_prefilled(model, drafter)


@pytest.mark.parametrize("name", RAW)
def test_after_a_snapshot(model, folders, name):
    drafter = make(model, folders(name))
    first, second = PROMPT, PROMPT[:25] + [(7 * token + 1) % VOCAB for token in PROMPT[:30]]
    one = told(model, drafter, [*PROMPT[:25], 0])
    snapshot = one.snapshot()
    for text in (first, second, first):
        other = drafter.fresh()
        for heard in (one, other):  # one that went on since, and one that never heard of anything
            heard.restore(snapshot)
            assert heard._cache.length == 25
            cache = model.make_cache()
            prefill(model, text[:25], cache)
            tapped = Taps(drafter.taps)
            model.encode(mx.array([text[25:-1]]), cache, tapped)
            asked(model, heard, text[:26])  # writes behind what was heard
            heard.extend(text[25:-1], tapped.features)
            assert_drafts_alike(asked(model, heard, text), asked(model, told(model, drafter, text), text))


def test_a_snapshot_outlives_what_comes_after(model, folders):
    drafter = told(model, make(model, folders("dflash")), [*PROMPT[:20], 0])
    snapshot = drafter.snapshot()
    expected = asked(model, drafter, [*PROMPT[:20], 9])
    for _ in range(4):
        drafter.extend(PROMPT, mx.random.normal((1, len(PROMPT), 2 * HIDDEN)))
    drafter.restore(snapshot)
    assert asked(model, drafter, [*PROMPT[:20], 9]) == expected
    assert drafter.fresh()._cache.length == 0


def test_the_loop_goes_on_behind_a_cached_prefix(model, folders):
    drafter = told(model, make(model, folders("dspark")), [*PROMPT[:25], 0])
    cache = model.make_cache()
    prefill(model, PROMPT[:25], cache)
    again = Helped(drafter)
    done = run(model, PROMPT, drafter=again, width=5, cache=cache, drafter_snapshot=drafter.snapshot())
    assert done.ids == plain(model, PROMPT).ids
    assert done.counts.drafter_failure is None
    assert_as_if_prefilled(model, again)


def test_chunks_of_the_prompt_do_not_matter(model, folders):
    """One prefill that all of them hear."""
    text = (PROMPT * 10)[:390]  # chunks that go into the buffer, and one that replaces it
    drafters = {name: make(model, folders(name)) for name in RAW}
    (taps,) = {drafter.taps for drafter in drafters.values()}

    def drafts(step: int) -> dict:
        fresh = {name: drafter.fresh() for name, drafter in drafters.items()}

        def listener(ids, tapped):
            for drafter in fresh.values():
                drafter.extend(ids, tapped.features)

        prefill(model, text[:-1], model.make_cache(), step, taps=taps, listener=listener)
        return {name: asked(model, drafter, text) for name, drafter in fresh.items()}

    expected = drafts(2048)
    for step in (1, 3, 64, 300):
        for name, got in drafts(step).items():
            assert_drafts_alike(got, expected[name])


def test_the_width_does_not_matter(model, folders):
    for name in RAW:
        drafter = told(model, make(model, folders(name)), PROMPT)
        ids, confidences = asked(model, drafter, PROMPT)
        assert len(ids) == drafter.network.config.drafts
        for width in (1, 3, 8):
            assert_drafts_alike(asked(model, drafter, PROMPT, width), (ids[:width], confidences[:width]))
        context = DraftContext(PROMPT, CacheReader(model.make_cache()), model, greedy)
        assert not drafter.propose(context, 0).tokens


def test_one_that_did_not_hear_says_so(model, folders):
    drafter = told(model, make(model, folders("dflash")), PROMPT)
    for tokens in (PROMPT[:-1], [*PROMPT, 3]):
        with pytest.raises(ValueError, match="heard of 39 tokens"):
            asked(model, drafter, tokens)


# --- what is kept


def test_fresh_ones_share_weights_and_nothing_else(model, folders):
    one = told(model, make(model, folders("dflash")), PROMPT)
    other = one.fresh()
    assert other.network is one.network
    assert other._head is one._head
    assert other._cache.length == 0
    before = asked(model, one, PROMPT)
    other.extend(PROMPT, mx.random.normal((1, len(PROMPT), 2 * HIDDEN)))
    assert asked(model, one, PROMPT) == before
    one.reset()
    assert (one._cache.length, other._cache.length) == (0, len(PROMPT))


@pytest.mark.parametrize("name", RAW)
def test_the_context_holds_no_draft(model, folders, name):
    drafter = helped(make(model, folders(name)), model, PROMPT, GREEDY)
    done = run(model, PROMPT, drafter=drafter, width=6, prefill_step=STEP)
    expected = told(model, drafter, done.text)
    assert drafter._cache.length == expected._cache.length == len(done.text) - 1
    for got, truth in zip(drafter._cache.layers, expected._cache.layers, strict=True):
        count = truth.visible()
        for rows, true in ((got.keys, truth.keys), (got.values, truth.values)):
            last, true_last = got.end - got.start, truth.end - truth.start
            assert mx.allclose(rows[:, :, last - count : last], true[:, :, true_last - count : true_last], atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 50, 256, 257, 1000])
def test_sliding_layers_stay_small(model, folders, chunk):
    for name, windows in (("dflash", [11, None]), ("dflash, draft window", [5, 5])):
        drafter = make(model, folders(name))
        count = 3000 if chunk > 1 else 600
        for _ in range(0, count, chunk):
            drafter.extend([0] * chunk, mx.zeros((1, chunk, 2 * HIDDEN)))
        for rows, window in zip(drafter._cache.layers, windows, strict=True):
            assert rows.visible() == (rows.end if window is None else window)
            if window is not None:
                assert rows.keys.shape[2] <= window + min(chunk, GROWTH) + SPARE


# --- what it guesses with


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


def test_smaller_heads_are_the_same_head(model):
    hidden = mx.random.normal((5, HIDDEN))
    whole = model.logits(hidden)
    assert mx.array_equal(Head(model)(hidden), whole)
    ids = [100, 3, 77, 3]
    part = Head(model, ids=ids)(hidden)
    assert mx.allclose(part[:, [3, 77, 100]], whole[:, [3, 77, 100]], atol=1e-5)
    assert mx.isinf(part).sum().item() == 5 * (VOCAB - 3)
    for bits, near in ((4, 0.5), (8, 0.03)):
        for chosen in (None, ids):
            quantised = Head(model, bits, chosen)(hidden)
            known = mx.isfinite(quantised)
            error = mx.where(known, quantised - whole, 0).abs().max().item()
            assert 0 < error < near
            assert known.sum().item() == 5 * (VOCAB if chosen is None else 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_drafters_matrices_are_quantised(model, folders, bits):
    network = make(model, folders("dspark"), drafter_bits=bits).network
    kinds = {path: type(module) for path, module in network.named_modules() if "weight" in module}
    quantised = {path for path, kind in kinds.items() if kind is nn.QuantizedLinear}
    assert quantised == {path for path in kinds if path == "fc" or "_proj" in path}
    assert kinds["markov_head.markov_w2"] is kinds["confidence_head.proj"] is nn.Linear
    assert {network.fc.bits, network.layers[0].mlp.up_proj.bits} == {bits}
    arrays = dict(tree_flatten(network.parameters()))
    assert arrays["fc.weight"].dtype == mx.uint32
    assert arrays["fc.weight"].nbytes * 32 == bits * 2 * HIDDEN * HIDDEN * 4


def packed(mode: str, group: int, bits: int) -> DiffusionGemma:
    """A main model with a quantised embedding."""
    model = lively_model(hidden_size=HIDDEN)
    kind = model.model.decoder.embed_tokens.to_quantized(group_size=group, bits=bits, mode=mode)
    model.model.decoder.embed_tokens = kind
    return model


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)],
)
def test_rows_of_a_quantised_head_stay_packed(monkeypatch, mode, group, bits):
    model, ids = packed(mode, group, bits), [3, 77, 100]
    embedding = model.model.decoder.embed_tokens
    hidden = mx.random.normal((5, HIDDEN))
    whole = model.logits(hidden)
    monkeypatch.setattr(type(embedding), "__call__", None)  # it dequantises
    head = Head(model, ids=ids)
    assert mx.allclose(head(hidden)[:, ids], whole[:, ids], atol=1e-4)
    assert sum(array.nbytes for array in head._project._arrays) * VOCAB == 3 * sum(
        array.nbytes for _, array in tree_flatten(embedding.parameters())
    )
    # no copy where the head has no more bits than are asked for
    assert mx.array_equal(Head(model, bits=8)(hidden), whole)
    assert not hasattr(Head(model, bits=8)._project, "_arrays")
    assert mx.array_equal(Head(model, bits=8, ids=ids)(hidden), head(hidden))
    monkeypatch.undo()
    if bits == 8:
        assert Head(model, bits=4)._project._mode == {"group_size": 64, "bits": 4}


# --- weights are read once


@pytest.fixture
def shared(monkeypatch):
    """Caches of this test alone; the folders that were read, and the heads that were made."""
    made = {"networks": [], "heads": []}
    own_read, own_head = weights.read, block.Head
    monkeypatch.setattr(weights, "read", lambda *given: made["networks"].append(given) or own_read(*given))
    monkeypatch.setattr(block, "Head", lambda *given: made["heads"].append(given) or own_head(*given))
    monkeypatch.setattr(block, "networks", Shared())
    monkeypatch.setattr(block, "heads", Shared())
    return made


def test_weights_are_read_once_for_a_model_and_its_options(model, folders, shared):
    one, other = make(model, folders("dflash")), make(model, folders("dflash"))
    assert one is not other
    assert one.network is other.network
    assert one._head is other._head
    assert one._cache is not other._cache
    for options in ({"draft_head_bits": 4}, {"draft_vocab": 9}, {"draft_vocab": [3]}):
        for _ in range(2):
            again = make(model, folders("dflash"), **options)
            assert again.name != one.name
            assert again.network is one.network  # its heads differ alone
    assert len(shared["networks"]) == 1
    assert len(shared["heads"]) == 4
    quantised = make(model, folders("dflash"), drafter_bits=4)
    assert quantised.network is not one.network
    assert quantised.name != one.name
    by_range, by_count = (make(model, folders("dflash"), draft_vocab=given) for given in (range(9), 9))
    assert by_range.name == by_count.name
    make(model, folders("dspark"))
    make(lively_model(hidden_size=HIDDEN), folders("dflash"))
    assert len(shared["networks"]) == 4


def test_a_folder_that_is_written_again_is_read_again(model, folders, shared, tmp_path):
    folder = shutil.copytree(folders("dflash"), tmp_path / "drafter")
    one = make(model, str(folder))
    for file in folder.iterdir():
        file.touch()
    other = make(model, str(folder))
    assert other.network is not one.network
    assert mx.array_equal(other.network.fc.weight, one.network.fc.weight)
    write_drafter(folder, RAW["dspark"])
    assert make(model, str(folder)).network.config.markov_rank == 8
    assert len(shared["networks"]) == 3
    assert len(shared["heads"]) == 1


def test_a_vocabulary_is_read_and_checked_once(model, folders, shared, tmp_path, monkeypatch):
    file, reads = tmp_path / "ids.json", []
    own = block.read_vocabulary
    monkeypatch.setattr(block, "read_vocabulary", lambda *given: reads.append(given) or own(*given))
    file.write_text("[3, 4]")
    for given in (file, str(file), [5, 6], (5, 6), np.array([5, 6])):
        for _ in range(2):
            drafter = make(model, folders("dflash"), draft_vocab=given)
            assert drafter._head.size == 2
    assert len(reads) == 2
    file.write_text("[3, 4, 5]")
    assert make(model, folders("dflash"), draft_vocab=file)._head.size == 3
    assert len(reads) == 3


def test_the_latest_few_are_kept(model, folders, shared):
    for count in range(1, 9):
        make(model, folders("dflash"), draft_vocab=count)
        make(model, folders("dflash"), draft_vocab=1)  # in use
    assert len(block.heads.entries) == block.KEPT
    assert len(shared["heads"]) == 8
    make(model, folders("dflash"), draft_vocab=2)
    assert len(shared["heads"]) == 9


def test_what_fails_is_not_kept(model, folders, shared):
    for _ in range(2):
        with pytest.raises(UsageError):
            make(model, folders("dflash"), draft_vocab=VOCAB + 1)
    assert block.heads.entries == []


def test_weights_go_with_their_model(folders, shared):
    model = lively_model(hidden_size=HIDDEN)
    options = ({}, {"draft_head_bits": 4}, {"draft_vocab": 9})
    drafters = [weakref.ref(make(model, folders("dflash"), **given).network) for given in options]
    gc.collect()
    assert all(reference() is not None for reference in drafters)
    for made in shared.values():
        made.clear()
    alive, embedding = weakref.ref(model), weakref.ref(model.model.decoder.embed_tokens)
    del model
    gc.collect()
    assert alive() is None
    assert embedding() is None
    assert block.heads.entries == block.networks.entries == []
    assert all(reference() is None for reference in drafters)


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


# --- what is waited for


@pytest.mark.parametrize(("count", "waits"), [(1, False), (64, False), (65, True), (2048, True)])
def test_a_few_tokens_are_not_waited_for(model, folders, monkeypatch, count, waits):
    """They would wait for the step that is launched ahead; a chunk of a prompt is, or its features were held."""
    drafter, calls = make(model, folders("dflash")), []
    for name in ("eval", "async_eval"):
        own = getattr(mx, name)
        monkeypatch.setattr(mx, name, lambda *given, own=own, name=name: calls.append(name) or own(*given))
    drafter.extend([0] * count, mx.zeros((1, count, 2 * HIDDEN)))
    assert calls == (["eval"] if waits else ["async_eval"])
    assert drafter._cache.length == count


@pytest.mark.parametrize("options", [{}, {"drafter_bits": 8, "draft_head_bits": 4, "draft_vocab": 96}], ids=str)
def test_it_says_what_it_needs(model, folders, options):
    drafter = make(model, folders("dspark"), **options)
    head = drafter._head._project
    copied = sum(array.nbytes for array in head._arrays) if options else 0
    assert drafter.memory(0) == sum(array.nbytes for _, array in tree_flatten(drafter.network.parameters())) + copied
    row = 2 * 2 * 16 * 4  # keys and values of 2 heads of 16 in float32
    assert drafter.memory(40) - drafter.memory(0) == 2 * 40 * row
    assert drafter.memory(10**6) - drafter.memory(10**5) == 9 * 10**5 * row, "of its full layer alone"


@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["dflash", "dspark"])
def test_a_caller_that_stops_inside_a_block(model, folders, name, config):
    whole = plain(model, PROMPT, config)
    for first in (1, 2, 5, 9):
        drafter = helped(make(model, folders(name)), model, PROMPT, config, right=(3,))
        done = run(model, PROMPT, config, drafter=drafter, width=4, first=first)
        assert done.ids == whole.ids[:first] and done.cache.length == len(done.text) - 1
        fresh = told(model, drafter, done.text)
        assert_drafts_alike(asked(model, drafter, done.text), asked(model, fresh, done.text))

"""The block drafter in the loop: the answer is the same, and a draft depends on what was heard alone."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.cache import GROWTH, SPARE, CacheReader
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.block import make
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.model import Taps
from tests.decoding.runs import CHEAP, GREEDY, VOCAB, WARM, assert_lossless, plain, run
from tests.drafter.blocks import (
    HELP,
    HIDDEN,
    PROMPT,
    RAW,
    STEP,
    Helped,
    asked,
    assert_as_if_prefilled,
    assert_drafts_alike,
    greedy,
    helped,
    told,
)

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

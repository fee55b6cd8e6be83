"""AR mode without a drafter and with a known one: tokens, ends, the cache, exact counts."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.draws import Draws, RecordedDraws
from mlx_dgemma.filters import process
from tests.decoding.runs import (
    GREEDY,
    LONG,
    REPEATING,
    SEEDS,
    SHORT,
    VOCAB,
    WARM,
    Scripted,
    assert_cache_holds_all_but_the_last,
    assert_lossless,
    cases,
    guess,
    lively_model,
    naive,
    plain,
    run,
)

OPTIONS = {
    "unfiltered": {"top_k": 0, "top_p": 1.0},
    "top-k": {"top_k": 5, "top_p": 1.0},
    "top-p": {"top_k": 0, "top_p": 0.6},
    "min-p": {"top_k": 0, "top_p": 1.0, "min_p": 0.2},
    "all filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "penalty": {"repetition_penalty": 1.7, "repetition_context_size": 6},
    "long penalty": {"repetition_penalty": 0.6, "repetition_context_size": 200},
    "bias": {"logit_bias": {77: 4.0, 13: -8.0}},
    "all": {"repetition_penalty": 1.3, "logit_bias": {77: 3, 2: -1.5}, "top_k": 30, "top_p": 0.8, "min_p": 0.01},
}


@pytest.mark.parametrize(
    ("prompt", "name"),
    [([7], "unfiltered"), ([7], "all"), *((prompt, name) for prompt in (SHORT, LONG) for name in OPTIONS)],
    ids=lambda value: value if isinstance(value, str) else len(value),
)
def test_plain_decoding_equals_the_naive_loop(model, prompt, name):
    seeds = SEEDS if name in ("unfiltered", "all") else [1]
    for config, seed in [(GREEDY, 0), *((WARM, seed) for seed in seeds)]:
        config = config.replace(max_new_tokens=12, **OPTIONS[name])
        assert run(model, prompt, config, seed).ids == naive(model, prompt, config, seed)


@pytest.mark.parametrize("name", OPTIONS)
def test_drafts_are_verified_under_the_same_options(model, name):
    for prompt, config, seed, right in [
        (LONG, GREEDY, 0, 2),
        (SHORT, WARM, 1, None),
        (LONG, WARM, 1, 1),
        ([7], WARM, 2, 0),
    ]:
        config = config.replace(**OPTIONS[name])
        text = plain(model, prompt, config, seed).text
        assert_lossless(model, Scripted(guess(text, right)), prompt, config, seed, width=5)


def test_each_option_changes_the_tokens(model):
    """Or the tests above would say nothing."""
    off = OPTIONS["unfiltered"]
    base = [(prompt, config.replace(**off), seed) for prompt, config, seed in cases()]
    for name in OPTIONS.keys() - {"unfiltered"}:
        changed = [(prompt, config.replace(**OPTIONS[name]), seed) for prompt, config, seed in base]
        assert any(plain(model, *a).ids != plain(model, *b).ids for a, b in zip(base, changed, strict=True)), name
    assert len({tuple(plain(model, LONG, WARM, seed).ids) for seed in SEEDS}) == len(SEEDS)
    assert len(set(plain(model, LONG).ids)) > 10


def test_prefill_and_a_cache_that_holds_a_part_change_nothing(model):
    for config in (GREEDY, WARM):
        expected = plain(model, LONG, config).ids
        for step in (1, 7, 20, 4096):
            assert run(model, LONG, config, prefill_step=step).ids == expected
        for held in (1, 13, len(LONG) - 1):
            cache = model.make_cache()
            prefill(model, LONG[:held], cache)
            done = run(model, LONG, config, cache=cache)
            assert done.ids == expected
            assert done.counts.positions == len(LONG) - 1 - held + config.max_new_tokens


def test_logprobs_are_those_of_the_model_after_bias_and_penalty(model):
    config = WARM.replace(repetition_penalty=1.5, repetition_context_size=4, logit_bias={3: 2.0})
    expected = plain(model, LONG, config)
    hidden = model.encode(mx.array([expected.text]), model.make_cache())
    for drafter, width in [(None, 0), (Oracle(expected.text), 4), (Scripted(guess(expected.text, 1)), 3)]:
        done = run(model, LONG, config, drafter=drafter, width=width)
        for number, token in enumerate(done.tokens):
            end = len(LONG) + number
            logits = process(
                model.logits(hidden[:, end - 1 : end])[0], mx.array([expected.text[end - 4 : end]]), config
            )
            assert mx.allclose(token.logprobs, logits[0] - mx.logsumexp(logits[0]), rtol=1e-3, atol=1e-3)


def test_recorded_draws_are_followed(model):
    text = [*SHORT, *[(11 * i) % VOCAB for i in range(20)]]
    for drafter, width in [(None, 0), (Oracle(text), 4), (Scripted(guess(text, 1)), 3)]:
        done = run(model, SHORT, WARM, draws=RecordedDraws(text=[text]), drafter=drafter, width=width)
        assert done.text == text


# ---- every width, every rollback, every end


@pytest.mark.parametrize("width", range(17))
def test_every_width_and_every_rollback(model, width):
    """Prompts that are shorter and longer than the window; blocks of 17 cross it both ways."""
    for right in range(width + 1):
        prompt, config = (SHORT, LONG)[right % 2], (GREEDY, WARM)[right // 2 % 2].replace(max_new_tokens=24)
        text = plain(model, prompt, config).text
        done = assert_lossless(model, Scripted(guess(text, right)), prompt, config, width=width)
        if 0 < right < width:
            assert 0 < done.counts.accepted < done.counts.drafted


@pytest.mark.parametrize("width", [0, 1, 3, 6, 16])
def test_an_end_anywhere_in_a_block(model, width):
    """Eos at every place, and the last token at every place: nothing beyond is kept, in the answer or the cache."""
    for config, right in [(GREEDY, None), (WARM, 1)]:
        whole = plain(model, SHORT, config)
        for place, token in enumerate(whole.ids):
            ends = [(config.replace(max_new_tokens=place + 1), "length")]
            if token not in whole.ids[:place]:
                ends.append((config.replace(eos_token_ids=(9999, token)), "stop"))
            for ended, reason in ends:
                done = run(model, SHORT, ended, drafter=Scripted(guess(whole.text, right)), width=width)
                assert done.ids == whole.ids[: place + 1]
                assert done.reasons == [None] * place + [reason]
                assert done.cache.length == len(done.text) - 1
        assert_cache_holds_all_but_the_last(model, done.cache, done.text)


@pytest.mark.parametrize("width", [0, 1, 5, 16])
def test_the_end_of_the_context_ends_the_answer(width):
    model = lively_model(max_position_embeddings=32)
    text = run(lively_model(), LONG, GREEDY).text[:32]
    done = run(model, LONG, GREEDY, drafter=Oracle(text), width=width)
    assert done.text == text
    assert done.reasons == [None] * 10 + ["length"]
    assert done.cache.length == 31


@pytest.mark.parametrize("width", [0, 1, 4, 16])
def test_a_caller_may_stop_after_any_token(model, width):
    """Also inside a block, and behind a step that was launched ahead."""
    for right in (None, 2):
        text = plain(model, SHORT, WARM).text
        for first in range(1, 20):
            drafter = Scripted(guess(text, right))
            done = run(model, SHORT, WARM, drafter=drafter, width=width, first=first)
            assert done.text == text[: len(SHORT) + first]
            assert_cache_holds_all_but_the_last(model, done.cache, done.text)


def test_a_second_turn_goes_on_from_the_cache(model):
    first = run(model, SHORT, WARM, drafter=Scripted(guess(plain(model, SHORT, WARM).text, 2)), width=5)
    prompt = [*first.text, 90, 91, 92]
    again = run(model, prompt, WARM, cache=first.cache)
    assert again.ids == run(model, prompt, WARM).ids
    assert again.counts.positions == 3 + WARM.max_new_tokens


def test_lookup_finds_what_is_there(model):
    """Greedy text that repeats: some drafts are right, and some are not."""
    config = GREEDY.replace(max_new_tokens=40, logit_bias={token: 12.0 for token in (8, 30, 61)})
    done = assert_lossless(model, Lookup(), REPEATING, config, width=3)
    assert 0 < done.counts.accepted < done.counts.drafted


def test_counts_of_an_oracle(model):
    """10 prompt tokens, 13 of an answer: three rounds of four tokens, and one plain step for the last."""
    prompt, config = LONG[:10], GREEDY.replace(max_new_tokens=13)
    done = assert_lossless(model, Oracle(plain(model, prompt, config).text), prompt, config, width=3)
    counts = done.counts
    assert (counts.encode_forwards, counts.positions) == (1 + 3 + 1, 9 + 3 * 4 + 1)
    assert (counts.rounds, counts.drafted, counts.accepted, counts.surplus) == (3, 9, 9, 0)
    assert [token.from_draft for token in done.tokens] == [True, True, True, False] * 3 + [False]
    assert counts.denoise_forwards == 0
    assert counts.drafter_seconds > 0


def test_counts_of_a_drafter_that_is_always_wrong(model):
    """One token a round, drafts only as wide as could be kept: 3, 3, 2, 1, 0."""
    config = GREEDY.replace(max_new_tokens=5)
    done = assert_lossless(model, Scripted(guess(plain(model, SHORT, config).text, 0)), SHORT, config, width=3)
    counts = done.counts
    assert (counts.encode_forwards, counts.positions) == (1 + 5, 4 + 4 + 4 + 3 + 2 + 1)
    assert (counts.rounds, counts.drafted, counts.accepted, counts.surplus) == (4, 9, 0, 0)
    assert not any(token.from_draft for token in done.tokens)


def test_counts_of_an_eos_inside_a_block(model):
    """The drafts behind it were verified, and are not accepted."""
    whole = plain(model, SHORT)
    place = next(i for i in range(5, 12) if i % 4 == 1 and whole.ids[i] not in whole.ids[:i])
    done = run(model, SHORT, GREEDY.replace(eos_token_ids=(whole.ids[place],)), drafter=Oracle(whole.text), width=3)
    rounds = place // 4 + 1
    assert done.ids == whole.ids[: place + 1]
    assert done.tokens[-1].from_draft
    assert (done.counts.rounds, done.counts.drafted) == (rounds, 3 * rounds)
    assert done.counts.accepted == 3 * (rounds - 1) + 2


@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "warm"])
def test_plain_decoding_takes_one_pass_a_token(model, config):
    done = run(model, SHORT, config)
    assert done.counts.encode_forwards == 1 + 20
    assert done.counts.positions == 4 + 20
    assert done.counts.rounds == done.counts.drafted == 0
    place = next(i for i in range(6, 20) if done.ids[i] not in done.ids[:i])
    ended = run(model, SHORT, config.replace(eos_token_ids=(done.ids[place],)))
    assert len(ended.ids) == place + 1
    assert ended.counts.encode_forwards == 1 + place + 1 + (place + 1 < 20), "one was launched ahead in vain"
    assert run(model, [7], config).counts.encode_forwards == 20, "nothing to prefill"


class Watched:
    """A round's samples that tell when they are read."""

    def __init__(self, array: mx.array, events: list[str]):
        self.array, self._events = array, events

    def tolist(self) -> list[int]:
        self._events.append("read")
        return self.array.tolist()


def events_of(monkeypatch, model, **options) -> list[str]:
    events: list[str] = []
    own = causal.Verifier.launch

    def launch(self, block, *arguments):
        events.append("launch")
        launched = own(self, getattr(block, "array", block), *arguments)
        return replace(launched, samples=Watched(launched.samples, events))

    monkeypatch.setattr(causal.Verifier, "launch", launch)
    for _ in decode(model, SHORT, GREEDY.replace(max_new_tokens=5), Draws([0], VOCAB), **options):
        events.append("yield")
    return events


def test_without_a_draft_the_next_pass_is_launched_before_the_token_is_read(monkeypatch, model):
    step = ["launch", "read", "yield"]
    assert events_of(monkeypatch, model) == ["launch", *step * 4, "read", "yield"]


def test_with_a_draft_nothing_is_launched_ahead(monkeypatch, model):
    text = plain(model, SHORT).text
    events = events_of(monkeypatch, model, drafter=Oracle(text), widths=Widths(fixed=2))
    assert events == ["launch", "read", *["yield"] * 3, "launch", "read", *["yield"] * 2]

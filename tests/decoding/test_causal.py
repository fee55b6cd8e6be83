"""AR mode: the same tokens whatever is drafted, no pass too many, and tests that would notice if it were not so."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.cache import PrefixCache
from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.draws import Draws, RecordedDraws
from mlx_dgemma.filters import process, shape
from mlx_dgemma.layers import Pass
from mlx_dgemma.model import Taps
from tests.helpers import random_model, with_text

VOCAB, WINDOW = 131, 9
SHORT = [2, 17, 40, 99, 3]  # the answer crosses the window
LONG = [(7 * i * i + 3) % VOCAB for i in range(21)]
REPEATING = [8, 30, 61, 77, 8, 30, 61, 77, 12, 8, 30]
SEEDS = range(5)
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=20)
WARM = GenerationConfig(temperature=0.8, max_new_tokens=20)
CHEAP = Costs(plain=1.0, verified={1: 1.0, 17: 1.1})  # so that drafting always pays


def lively_model(**changes):
    """Two layers that weigh more than the embedding, so that greedy text does not stand still."""
    model = random_model(with_text(**{"num_hidden_layers": 2, "layer_types": LAYERS, **changes}), seed=3)
    for layer in model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight = 8 * norm.weight
    mx.eval(model.parameters())
    return model


LAYERS = ["sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def model():
    return lively_model()


@dataclass
class Run:
    """What became of one request."""

    prompt: list[int]
    cache: PrefixCache
    counts: Counts
    tokens: list[causal.Token] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> list[int]:
        return self.prompt + self.ids

    @property
    def reasons(self) -> list[str | None]:
        return [token.finish_reason for token in self.tokens]


def run(model, prompt, config=GREEDY, seed=0, *, width=None, first=None, cache=None, draws=None, **options) -> Run:
    """Decode; `width` fixes the width, `first` closes the generator after so many tokens."""
    if width is not None:
        options["widths"] = Widths(fixed=width)
    done = Run(list(prompt), model.make_cache() if cache is None else cache, Counts())
    draws = draws or Draws([seed], model.config.vocab_size)
    steps = decode(model, prompt, config, draws, cache=done.cache, counts=done.counts, **options)
    for token in steps:
        done.tokens.append(token)
        if len(done.tokens) == first:
            steps.close()
    return done


def naive(model, prompt, config, seed) -> list[int]:
    """Every token from a pass of its own over the whole text."""
    text, draws = list(prompt), Draws([seed], model.config.vocab_size)
    while len(text) < len(prompt) + config.max_new_tokens:
        hidden = model.encode(mx.array([text]), model.make_cache())
        seen = mx.array([text[-config.repetition_context_size :]]) if config.repetition_penalty != 1 else None
        logits = process(model.logits(hidden[:, -1:])[0], seen, config)
        if config.temperature:
            noise = draws.next_token(len(text), 1).noise(0, model.config.vocab_size)[0]
            logits = shape(logits, config) + noise
        text.append(mx.argmax(logits[0]).item())
    return text[len(prompt) :]


_plain: dict = {}


def plain(model, prompt, config=GREEDY, seed=0) -> Run:
    """The answer without a drafter, computed once."""
    key = (id(model), tuple(prompt), repr(config), seed)
    if key not in _plain:
        _plain[key] = run(model, prompt, config, seed)
    return _plain[key]


def assert_cache_holds_all_but_the_last(model, cache, text):
    """By length, and by what comes of going on from it: in ar mode, and with a canvas."""
    assert cache.length == len(text) - 1
    fresh = model.make_cache()
    prefill(model, text[:-1], fresh)
    here, there = (model.encode(mx.array([text[-1:]]), rows) for rows in (cache, fresh))
    assert mx.allclose(here, there, rtol=1e-4, atol=1e-4)
    canvas = mx.arange(12)[None]
    here, there = (model.denoise_hidden(canvas, rows) for rows in (cache, fresh))
    assert mx.allclose(here, there, rtol=1e-4, atol=1e-4)


def assert_lossless(model, drafter, prompt, config, seed=0, **options) -> Run:
    """Same tokens, same end; whether the cache is right as well is seen for one seed."""
    expected = plain(model, prompt, config, seed)
    done = run(model, prompt, config, seed, drafter=drafter, **options)
    assert done.ids == expected.ids
    assert done.reasons == expected.reasons
    assert done.counts.accepted == sum(token.from_draft for token in done.tokens)
    if seed == 0:
        assert_cache_holds_all_but_the_last(model, done.cache, done.text)
    return done


def cases(seeds=SEEDS):
    """(prompt, config, seed): both prompts at temperature 0, and in turn at 0.8."""
    return [(prompt, GREEDY, 0) for prompt in (SHORT, LONG)] + [((SHORT, LONG)[seed % 2], WARM, seed) for seed in seeds]


class Scripted:
    """A drafter made of a function (context, width) -> Draft."""

    taps: tuple[int, ...] = ()

    def __init__(self, draft: Callable[..., object]):
        self._draft, self.calls = draft, 0

    def reset(self) -> None:
        pass

    def propose(self, context, width):
        self.calls += 1
        return self._draft(context, width)


class Hearing(Scripted):
    """A drafter that also listens."""

    def __init__(self, draft, taps=(), hear=None):
        super().__init__(draft)
        self.taps, self._hear = taps, hear
        self.heard: list[int] = []
        self.features: list[mx.array] = []
        self.known_when_asked: list[list[int]] = []

    def extend(self, tokens, features):
        self.heard += tokens
        self.features.append(features)
        if self._hear is not None:
            self._hear(features)

    def propose(self, context, width):
        self.known_when_asked.append(list(context.tokens[:-1]))
        assert self.heard == self.known_when_asked[-1]  # a failure is seen in counts.drafter_failure
        return super().propose(context, width)


def guess(text: Sequence[int], right: int | None = None) -> Callable[..., Draft]:
    """Drafts of `text`, only the first `right` tokens of each true."""

    def draft(context, width):
        count = len(context.tokens)
        tokens = list(text[count : count + width])
        wrong = range(len(tokens) if right is None else right, len(tokens))
        for i in wrong:
            tokens[i] = (tokens[i] + 1) % VOCAB
        return Draft(tokens)

    return draft


def guess_at_random(context, width):
    chance = random.Random(len(context.tokens))
    mx.random.seed(0)  # the loop's draws do not listen to the global state
    return Draft([chance.randrange(VOCAB) for _ in range(width)])


def guess_by_canvas(context, width):
    """Denoise behind the cache, wider than what is asked for: rows beside it are overwritten, none is kept."""
    canvas = mx.array([[context.tokens[-1], *range(70)]])
    best = mx.argmax(context.model.logits(context.model.denoise_hidden(canvas, context.cache)), axis=-1)
    return Draft(best[0, 1 : width + 1].tolist())


def with_confidences(draft, confidence: Callable[[int], object]) -> Callable[..., Draft]:
    def changed(context, width):
        tokens = draft(context, width).tokens
        return Draft(tokens, [confidence(i) for i in range(len(tokens))])

    return changed


# what may stand in a draft; every one is made from the text that is true
HARMLESS: dict[str, Callable[[list[int]], object]] = {
    "oracle": Oracle,
    "lookup": lambda text: Lookup(),
    "always wrong": lambda text: Scripted(guess(text, 0)),
    "right twice": lambda text: Scripted(guess(text, 2)),
    "random": lambda text: Scripted(guess_at_random),
    "nothing": lambda text: Scripted(lambda context, width: Draft(())),
    "one": lambda text: Scripted(lambda context, width: guess(text)(context, 1)),
    "over-long": lambda text: Scripted(lambda context, width: guess([*text, *range(20)])(context, width + 5)),
    "mx ids": lambda text: Scripted(lambda context, width: Draft(mx.array(guess(text, 3)(context, width).tokens))),
    "numpy ids": lambda text: Scripted(lambda context, width: Draft(np.array(guess(text, 3)(context, width).tokens))),
    "modest": lambda text: Scripted(with_confidences(guess(text), lambda i: 0.0)),
    "boastful": lambda text: Scripted(with_confidences(guess(text, 0), lambda i: 1.0)),
    "absurdly boastful": lambda text: Scripted(with_confidences(guess(text, 0), lambda i: 1e300 * (-1) ** i)),
    "too many confidences": lambda text: Scripted(
        lambda context, width: Draft(guess(text, 3)(context, width).tokens, mx.ones(width + 9))
    ),
    "canvas": lambda text: Scripted(guess_by_canvas),
    "listening": lambda text: Hearing(guess(text, 2), taps=(1, 0)),
    "writing into features": lambda text: Hearing(guess(text, 2), (0,), lambda features: features.__setitem__(0, 0.0)),
}
WIDTHS: dict[str, Callable[[], Widths]] = {
    "1": lambda: Widths(fixed=1),
    "4": lambda: Widths(fixed=4),
    "11": lambda: Widths(fixed=11),
    "adaptive": Widths,
    "costs": lambda: Widths(CHEAP),
}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", HARMLESS)
def test_the_tokens_do_not_depend_on_the_drafter(model, name, widths):
    for prompt, config, seed in cases() if widths == "4" else [(SHORT, GREEDY, 0), (LONG, WARM, 1)]:
        drafter = HARMLESS[name](plain(model, prompt, config, seed).text)
        done = assert_lossless(model, drafter, prompt, config, seed, widths=WIDTHS[widths]())
        assert done.counts.drafter_failure is None


def raises(error: BaseException) -> Callable:
    def anything(*arguments, **options):
        raise error

    return anything


def failing_in(method: str, text, number: int = 1) -> Scripted:
    """Fails in call `number` of a method, and is right until then."""
    drafter = Hearing(guess(text))
    own, calls = getattr(drafter, method), []

    def fail(*arguments):
        calls.append(arguments)
        return own(*arguments) if len(calls) < number else raises(KeyError("out  of\ncheese"))()

    setattr(drafter, method, fail)
    return drafter


def proposing(draft) -> Callable[[list[int]], Scripted]:
    return lambda text: Scripted(lambda context, width: draft)


def doing(action: Callable) -> Callable[[list[int]], Scripted]:
    """Does something it must not, then drafts as if nothing had happened."""

    def make(text):
        def draft(context, width):
            action(context)
            return guess(text)(context, width)

        return Scripted(draft)

    return make


# name -> (drafter, what is said about it)
FAILING: dict[str, tuple[Callable[[list[int]], object], str]] = {
    "reset": (lambda text: failing_in("reset", text), "Hearing.reset raised KeyError: 'out of"),
    "propose": (lambda text: failing_in("propose", text), "Hearing.propose raised KeyError"),
    "second propose": (lambda text: failing_in("propose", text, 2), "Hearing.propose raised KeyError"),
    "extend, in prefill": (lambda text: failing_in("extend", text), "Hearing.extend raised KeyError"),
    "extend, in a round": (lambda text: failing_in("extend", text, 3), "Hearing.extend raised KeyError"),
    "StopIteration": (lambda text: Scripted(raises(StopIteration())), "StopIteration: no message"),
    "GeneratorExit's cousin": (lambda text: Scripted(raises(MemoryError("full"))), "MemoryError: full"),
    "a negative id": (proposing(Draft([-1, 3])), "the id -1 is not in the vocabulary of 131"),
    "an id too large": (proposing(Draft([VOCAB])), "the id 131 is not in the vocabulary"),
    "a huge id": (proposing(Draft([1 << 80])), "is not in the vocabulary"),
    "no draft": (proposing(None), "AttributeError"),
    "a list": (proposing([1, 2]), "AttributeError"),
    "no tokens": (proposing(Draft(None)), "TypeError"),
    "a number": (proposing(Draft(7)), "TypeError"),
    "text": (proposing(Draft("the")), "TypeError"),
    "strings": (proposing(Draft(["3", "4"])), "TypeError"),
    "floats": (proposing(Draft([3.0])), "TypeError"),
    "float array": (proposing(Draft(mx.array([3.0]))), "raised"),
    "a batch": (proposing(Draft([[3, 4]])), "TypeError"),
    "nan confidence": (proposing(Draft([3], [float("nan")])), "1 tokens need as many finite confidences"),
    "infinite confidence": (proposing(Draft([3], [float("inf")])), "finite confidences"),
    "too few confidences": (proposing(Draft([3, 4], [])), "need as many"),
    "confidence in words": (proposing(Draft([3], ["sure"])), "ValueError"),
    "no confidence": (proposing(Draft([3], [None])), "TypeError"),
    "one confidence for all": (proposing(Draft([3], 0.5)), "TypeError"),
    "changes a token": (doing(lambda context: context.tokens.__setitem__(0, 5)), "AttributeError"),
    "appends a token": (doing(lambda context: context.tokens.append(5)), "AttributeError"),
    "deletes a token": (doing(lambda context: context.tokens.__delitem__(-1)), "AttributeError"),
    "replaces the tokens": (doing(lambda context: setattr(context, "tokens", [])), "FrozenInstanceError"),
    "rolls back": (doing(lambda context: context.cache.rollback(1)), "AttributeError"),
    "sets the length": (doing(lambda context: setattr(context.cache, "length", 0)), "AttributeError"),
    "restores": (doing(lambda context: context.cache.restore(None)), "AttributeError"),
    "encodes": (doing(lambda context: context.model.encode(mx.array([[3]]), context.cache)), "AttributeError"),
    "extends a layer": (doing(lambda context: context.cache.layers[0].extend(None, None)), "AttributeError"),
    "samples nothing": (doing(lambda context: context.sample(None, 0)), "TypeError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_drafter_that_fails_is_off_and_changes_nothing(model, name):
    make, said = FAILING[name]
    for prompt, config, seed in cases():
        config = config.replace(max_new_tokens=8)
        drafter = make(plain(model, prompt, config, seed).text)
        done = assert_lossless(model, drafter, prompt, config, seed, width=(1, 3, 5)[seed % 3], prefill_step=3)
        assert done.counts.drafter_failure is not None
        assert said in done.counts.drafter_failure
        assert "\n" not in done.counts.drafter_failure
    text = plain(model, SHORT, WARM).text
    assert_lossless(model, make(text), SHORT, WARM, widths=Widths(CHEAP))


def test_confidences_below_zero_change_nothing(model):
    """They are lies like others; these sum up to just what a prior is worth."""
    drafter = Scripted(lambda context, width: Draft([0, 0][:width], [-2.0, -2.0][:width]))
    assert_lossless(model, drafter, SHORT, GREEDY, widths=Widths(CHEAP))


def test_a_drafter_that_failed_is_not_called_again(model):
    for config in (GREEDY, WARM):
        drafter = Scripted(raises(ValueError("no")))
        done = assert_lossless(model, drafter, SHORT, config, width=3)
        assert drafter.calls == 1
        assert done.counts.drafter_failure == "Scripted.propose raised ValueError: no"
        assert done.counts.rounds == done.counts.drafted == 0
        assert done.counts.encode_forwards == 1 + config.max_new_tokens
    heard = failing_in("extend", plain(model, SHORT).text, 2)
    assert_lossless(model, heard, SHORT, GREEDY, width=3, prefill_step=2)
    assert heard.calls == 0
    assert heard.heard == SHORT[:2]


def test_a_drafter_that_ends_the_process_is_not_held_back(model):
    with pytest.raises(KeyboardInterrupt):
        run(model, SHORT, drafter=Scripted(raises(KeyboardInterrupt())), width=2)


def test_surplus_is_ignored_and_counted(model):
    text = plain(model, SHORT).text
    drafter = Scripted(lambda context, width: guess([*text, *range(20)])(context, width + 5))
    done = assert_lossless(model, drafter, SHORT, GREEDY, width=3)
    assert done.counts.rounds == drafter.calls == 5
    assert done.counts.surplus == 5 * 5
    assert done.counts.drafted == done.counts.accepted == 15
    assert done.counts.drafter_failure is None


# ---- the loop without a drafter


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


# ---- what a drafter is told


class Scheduled(Widths):
    """Asks for widths[context % len(widths)], and verifies all, or `verified` of it."""

    def __init__(self, widths: Sequence[int], verified: int = 99):
        super().__init__(Costs())
        self._schedule, self._verified = widths, verified

    def ask(self, context, room):
        return min(room, self._schedule[context % len(self._schedule)])

    def verify(self, context, draft):
        return min(self._verified, len(draft.tokens))


@pytest.mark.parametrize("taps", [(), (1,), (1, 0)])
@pytest.mark.parametrize("schedule", [[3], [0, 0, 4], [0, 2, 0, 0, 1], [16], [5, 0]], ids=str)
def test_extend_hears_every_token_once_with_its_features(model, taps, schedule):
    for prompt, right, verified in [(SHORT, None, 99), (LONG, 2, 99), (LONG, 0, 99), (SHORT, None, 2), ([7], 1, 99)]:
        text = plain(model, prompt, WARM).text
        drafter = Hearing(guess(text, right), taps)
        done = run(model, prompt, WARM, drafter=drafter, widths=Scheduled(schedule, verified), prefill_step=4)
        assert done.text == text
        assert done.counts.drafter_failure is None, "what it had heard differed from what was encoded"
        assert drafter.known_when_asked
        assert drafter.heard == text[: len(drafter.heard)]
        if not taps:
            assert all(features is None for features in drafter.features)
            continue
        tapped = Taps(taps)
        model.encode(mx.array([drafter.heard]), model.make_cache(), tapped)
        heard = mx.concatenate(drafter.features, axis=1)
        assert heard.shape == (1, len(drafter.heard), len(taps) * model.config.hidden_size)
        assert mx.allclose(heard, tapped.features, rtol=1e-3, atol=1e-3)


def test_steps_launched_ahead_change_nothing(model):
    for prompt, config, seed in cases():
        text = plain(model, prompt, config, seed).text
        for schedule, right in [([0, 3], 1), ([0, 0, 0, 5], None), ([2, 0, 0], 0)]:
            assert_lossless(model, Scripted(guess(text, right)), prompt, config, seed, widths=Scheduled(schedule))


def test_context_is_what_the_protocol_says(model):
    seen = []

    def look(context, width):
        seen.append((list(context.tokens), context.tokens[-1], len(context.tokens), context.cache.length, width))
        assert context.model is model
        fresh = model.make_cache()
        prefill(model, context.tokens[:-1], fresh)
        canvas = mx.arange(5)[None]
        here, there = (model.denoise_hidden(canvas, cache) for cache in (context.cache, fresh))
        assert mx.allclose(here, there, rtol=1e-4, atol=1e-4)
        return guess(text, 1)(context, width)

    text = plain(model, SHORT).text
    done = assert_lossless(model, Scripted(look), SHORT, GREEDY, width=4)
    assert done.counts.drafter_failure is None
    for tokens, last, count, cached, width in seen:
        assert tokens == text[:count]
        assert (last, cached) == (text[count - 1], count - 1)
        assert width == min(4, len(text) - count - 1), "no more than could be kept"


class Twin(Scripted):
    """Drafts with the main model itself, behind a cache of its own, by the loop's own draws."""

    def __init__(self, model):
        super().__init__(self._think)
        self._model, self._cache, self._known = model, model.make_cache(), []

    def _think(self, context, width):
        new = list(context.tokens)
        shared = next((i for i, (a, b) in enumerate(zip(self._known, new, strict=False)) if a != b), len(self._known))
        shared = min(shared, len(new) - 1)
        self._cache.rollback(self._cache.length - shared)
        block, draft = new[shared:], []
        for _ in range(width):
            logits = self._model.logits(self._model.encode(mx.array([block]), self._cache))[0, -1:]
            draft.append(context.sample(logits, len(new) + len(draft)).item())
            block = draft[-1:]
        self._known = (new + draft)[: self._cache.length]
        return Draft(draft)


@pytest.mark.parametrize("width", [1, 4, 9])
def test_a_drafter_that_shares_the_draws_is_always_right(model, width):
    for prompt, config, seed in cases():
        counts = assert_lossless(model, Twin(model), prompt, config, seed, width=width).counts
        assert counts.drafter_failure is None
        assert counts.accepted == counts.drafted > 0


def test_sample_takes_a_block_as_it_takes_its_rows(model):
    sampled = []

    def sample(context, width):
        z, first = mx.random.normal((6, VOCAB), key=mx.random.key(4)), len(context.tokens)
        sampled.append(context.sample(z, first).tolist())
        sampled.append([context.sample(z[i : i + 1], first + i).item() for i in range(6)])
        return Draft(())

    for config in (GREEDY, WARM):
        assert run(model, SHORT, config, drafter=Scripted(sample), width=2).counts.drafter_failure is None
    assert sampled[::2] == sampled[1::2]
    assert len({tuple(ids) for ids in sampled}) > 10


# ---- counts


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


# ---- the distribution


VOWELS = 11  # a vocabulary small enough to count


def exact(logits: mx.array, config: GenerationConfig) -> np.ndarray:
    """Probabilities (..., V) by the definition of each filter, in float64."""
    z = np.array(logits, np.float64) / config.temperature
    shares = np.exp(z - z.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    order = np.argsort(-shares, axis=-1)
    ranks = np.argsort(order, axis=-1)
    if config.top_k:
        shares = np.where(ranks < config.top_k, shares, 0)
        shares /= shares.sum(-1, keepdims=True)
    ordered = np.take_along_axis(shares, order, -1)
    above = np.take_along_axis(np.cumsum(ordered, -1) - ordered, ranks, -1)
    shares = np.where(above < config.top_p, shares, 0)
    return shares / shares.sum(-1, keepdims=True)


def misfit(observed: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Chi-square of counts (..., V) against probabilities, and its 99.9 % quantile (Wilson-Hilferty).

    Cells of fewer than five expected counts are taken together, row by row.
    """
    assert not observed[expected == 0].any(), "what a filter forbids was drawn"
    expected = expected * observed.sum(-1, keepdims=True)
    statistic, freedom = 0.0, 0
    for counts, wanted in zip(np.atleast_2d(observed), np.atleast_2d(expected), strict=True):
        rare = wanted < 5
        cells = [*zip(counts[~rare], wanted[~rare], strict=True), (counts[rare].sum(), wanted[rare].sum())]
        cells = [(count, want) for count, want in cells if want > 1]
        statistic += sum((count - want) ** 2 / want for count, want in cells)
        freedom += max(0, len(cells) - 1)
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 3.0902 * spread**0.5) ** 3


FILTERS = {
    "unfiltered": WARM.replace(top_k=0, top_p=1.0),
    "top-k": WARM.replace(top_k=5, top_p=1.0),
    "top-p": WARM.replace(top_k=0, top_p=0.7),
    "both": WARM.replace(top_k=6, top_p=0.8),
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution(name):
    config, count = FILTERS[name], 4000
    logits = mx.random.normal((1, VOWELS), key=mx.random.key(2)) * 1.5
    draw = Draws(range(count), VOWELS).next_token(7, 1)
    draw.add(mx.broadcast_to(shape(logits, config)[None], (count, 1, VOWELS)), 0)
    observed = np.bincount(np.array(draw.ids).ravel(), minlength=VOWELS)
    statistic, quantile = misfit(observed, exact(logits[0], config))
    assert statistic < quantile
    statistic, quantile = misfit(observed, exact(logits[0], FILTERS["unfiltered"].replace(temperature=0.9)))
    assert statistic > quantile, "a temperature that is a little off is noticed"


class Chain:
    """Stands in for the model: what follows depends on the last token alone, by a table of logits."""

    def __init__(self):
        self.config = ModelConfig.from_dict(with_text(vocab_size=VOWELS, max_position_embeddings=1 << 16))
        self.table = mx.random.normal((VOWELS, VOWELS), key=mx.random.key(6))
        self.layers = self.config.layers

    def make_cache(self):
        return PrefixCache(self.config)

    def encode(self, ids, cache, taps=None):
        rows = mx.zeros((1, 1, ids.shape[1], 1))
        for layer in cache.layers:
            layer.extend(rows, rows)
        return ids[..., None]

    def logits(self, hidden):
        return self.table[hidden[..., 0]]


def likeliest(context, width):
    """The greedy continuation in a chain."""
    draft, table = [context.tokens[-1]], np.array(context.model.table)
    for _ in range(width):
        draft.append(int(table[draft[-1]].argmax()))
    return Draft(draft[1:])


@pytest.mark.parametrize(
    ("drafter", "name"),
    [*(("none", name) for name in FILTERS), ("likeliest", "unfiltered"), ("likeliest", "both"), ("lookup", "both")],
)
def test_a_long_text_follows_the_distribution(drafter, name):
    """2,000 tokens of a chain: from each token, the next ones as often as they should."""
    chain, config = Chain(), FILTERS[name].replace(max_new_tokens=2000)
    made = {"none": None, "likeliest": Scripted(likeliest), "lookup": Lookup()}[drafter]
    done = run(chain, [4], config, seed=11, drafter=made, width=3)
    assert done.counts.drafter_failure is None
    observed = np.zeros((VOWELS, VOWELS))
    np.add.at(observed, (done.text[:-1], done.text[1:]), 1)
    statistic, quantile = misfit(observed, exact(chain.table, config))
    assert statistic < quantile
    statistic, quantile = misfit(observed, exact(chain.table, FILTERS["unfiltered"].replace(temperature=1.0)))
    assert statistic > quantile
    if made is not None:
        assert done.counts.accepted > 300


def test_the_second_token_follows_the_distribution():
    """Of the real model, over seeds, where the first one is drafted, and right in about half of them."""
    model, count = lively_model(vocab_size=VOWELS, num_hidden_layers=1, layer_types=LAYERS[1:]), 2000
    config, prompt = FILTERS["top-k"].replace(max_new_tokens=2), [3, 9, 4]
    first = exact(model.logits(model.encode(mx.array([prompt]), model.make_cache())[:, -1])[0], config)
    behind = mx.array([[*prompt, token] for token in range(VOWELS)])
    second = exact(model.logits(model.encode(behind, model.make_cache())[:, -1]), config)
    cache, drafter = model.make_cache(), Scripted(lambda context, width: Draft([int(first.argmax())]))
    pairs, accepted = np.zeros((VOWELS, VOWELS)), 0
    for seed in range(count):
        cache.rollback(max(0, cache.length - 2))
        done = run(model, prompt, config, seed, cache=cache, drafter=drafter, width=1)
        pairs[tuple(done.ids)] += 1
        accepted += done.counts.accepted
    assert count / 5 < accepted < count * 4 / 5
    for observed, expected in [(pairs.sum(1), first), (pairs.sum(0), first @ second), (pairs, second)]:
        statistic, quantile = misfit(observed, expected)
        assert statistic < quantile
        assert misfit(np.roll(observed, 1, axis=-1) * (expected > 0), expected)[0] > quantile


# ---- mistakes that the tests above must notice


def short_rollback(monkeypatch):
    own = PrefixCache.rollback
    monkeypatch.setattr(PrefixCache, "rollback", lambda self, count: own(self, max(0, count - 1)))


def long_rollback(monkeypatch):
    own = PrefixCache.rollback
    monkeypatch.setattr(PrefixCache, "rollback", lambda self, count: own(self, count + (count > 0)))


def wrong_positions(monkeypatch):
    """Blocks behind a prefix are rotated one position further."""
    own = Pass.__init__

    def init(self, cache, window, queries, causal):
        own(self, cache, window, queries, causal)
        self.offset += causal and queries > 1 and cache.length > 0

    monkeypatch.setattr(Pass, "__init__", init)


def wrong_mask(monkeypatch):
    """Each position of a block sees the one after it."""
    own = Pass.sliding_mask

    def mask(self, keys):
        if self.queries == 1 or self.offset == 0 or not self.causal:
            return own(self, keys)
        distance = mx.arange(keys - self.queries, keys)[:, None] - mx.arange(keys)[None]
        return (distance >= -1) & (distance < self.window)

    monkeypatch.setattr(Pass, "sliding_mask", mask)


def wide_window(monkeypatch):
    """Each position of a block sees one more position than the window holds."""
    own = Pass.sliding_mask

    def mask(self, keys):
        if self.queries == 1 or self.offset == 0 or not self.causal:
            return own(self, keys)
        distance = mx.arange(keys - self.queries, keys)[:, None] - mx.arange(keys)[None]
        return (distance >= 0) & (distance < self.window + 1)

    monkeypatch.setattr(Pass, "sliding_mask", mask)


def one_accepted_too_many(monkeypatch):
    own = causal.agreement
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: min(own(draft, samples) + 1, len(draft)))


def encoded_twice(monkeypatch):
    """The token that follows a block is encoded at once, and again with the next block."""
    own = causal.Verifier.launch

    def launch(self, block, *arguments):
        if block.size > 1:
            self._model.encode(block[None, :1], self._cache)
        return own(self, block, *arguments)

    monkeypatch.setattr(causal.Verifier, "launch", launch)


def draws_by_width(monkeypatch):
    own = Draws.next_token
    monkeypatch.setattr(Draws, "next_token", lambda self, first, length: own(self, first + length - 1, length))


def draws_by_step(monkeypatch):
    """All rows of a block draw as its first."""
    own = causal.Verifier.choose

    def choose(self, logits, first):
        return mx.concatenate([own(self, logits[i : i + 1], first) for i in range(len(logits))])

    monkeypatch.setattr(causal.Verifier, "choose", choose)


def penalty_without_drafts(monkeypatch):
    """Every row of a block looks at what the first one sees."""
    own = causal.recent

    def recent(known, block, config):
        seen = own(known, block, config)
        return None if seen is None else mx.broadcast_to(seen[:1], seen.shape)

    monkeypatch.setattr(causal, "recent", recent)


def penalty_with_later_drafts(monkeypatch):
    """Every row of a block looks at what the last one sees."""
    own = causal.recent

    def recent(known, block, config):
        seen = own(known, block, config)
        return None if seen is None else mx.broadcast_to(seen[-1:], seen.shape)

    monkeypatch.setattr(causal, "recent", recent)


PENALISED = GREEDY.replace(repetition_penalty=2.0, repetition_context_size=12)
MISTAKES = {  # mistake -> a case that it must break: configuration, drafts that are right, width
    short_rollback: (GREEDY, 0, 3),
    long_rollback: (GREEDY, 0, 3),
    wrong_positions: (GREEDY, None, 5),
    wrong_mask: (GREEDY, None, 5),
    wide_window: (GREEDY, None, 5),
    one_accepted_too_many: (GREEDY, 1, 3),
    encoded_twice: (GREEDY, 2, 3),
    draws_by_width: (WARM, 2, 3),
    draws_by_step: (WARM, None, 3),
    penalty_without_drafts: (PENALISED, None, 5),
    penalty_with_later_drafts: (PENALISED, None, 5),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(monkeypatch, model, mistake):
    config, right, width = MISTAKES[mistake]
    expected = plain(model, LONG, config)

    def check():
        drafter = Scripted(guess(expected.text, right))
        done = run(model, LONG, config, drafter=drafter, width=width)
        assert done.ids == expected.ids

    check()
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check()

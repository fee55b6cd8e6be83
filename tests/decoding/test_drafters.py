"""Whatever a drafter says or does, the tokens are those of no drafter."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.decoding import guard
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.canvas import Canvas
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.drafter.protocol import Draft
from tests.decoding.runs import (
    CHEAP,
    GREEDY,
    LONG,
    SHORT,
    VOCAB,
    WARM,
    Hearing,
    Scripted,
    assert_lossless,
    cases,
    guess,
    guess_at_random,
    guess_by_canvas,
    plain,
    run,
    with_confidences,
)

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
    "self-drafting": lambda text: Canvas(),
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
    assert heard.calls == 1, "what it did not hear of before the second draft it failed to hear"
    assert heard.heard == SHORT[:-1]


def test_plain_steps_are_not_charged_to_the_next_draft(model, monkeypatch):
    """It is told of 64 tokens at once, and only what a draft itself took counts as its cost."""
    told, charged, now = [], [], [0.0]
    drafter = Hearing(guess(plain(model, SHORT, GREEDY.replace(max_new_tokens=200)).text, 0), taps=(0,))
    extend = drafter.extend

    def slow(tokens, features):
        told.append(len(tokens))
        assert features.shape[1] == len(tokens)
        now[0] += 0.02
        extend(tokens, features)

    drafter.extend = slow
    real = Widths.verified

    def verified(widths, context, asked, draft, accepted, drafter_seconds, seconds):
        charged.append(drafter_seconds if asked else 0.0)
        real(widths, context, asked, draft, accepted, drafter_seconds, seconds)

    monkeypatch.setattr(Widths, "verified", verified)
    monkeypatch.setattr(guard, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    config = GREEDY.replace(max_new_tokens=200)
    assert_lossless(model, drafter, SHORT, config, widths=Widths(Costs(plain=1.0, verified={1: 1.0, 16: 5.0})))
    assert sum(told) == len(SHORT) + 200 - 1 and len(told) < 30
    assert charged and max(charged) < 0.03, "not 0.02 for every step in between"


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

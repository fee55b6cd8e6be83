"""Drafts of the model's own denoising pass: what they are made of, that they change no token, that they are good."""

from __future__ import annotations

import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.nano.tasks import held_out
from mlx_dgemma.cache import CacheReader
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter import canvas, check_name, make
from mlx_dgemma.drafter.canvas import Canvas
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.draws import Draws
from mlx_dgemma.errors import UsageError
from mlx_dgemma.filters import process
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.prompt import encode_prompt
from mlx_dgemma.sampling import accept, summarise, temperature
from tests.decoding.runs import (
    CHEAP,
    GREEDY,
    LONG,
    SHORT,
    VOCAB,
    WARM,
    WINDOW,
    assert_lossless,
    cases,
    lively_model,
    plain,
    run,
)


@pytest.fixture(scope="module")
def model():
    model = lively_model()
    model.generation_config = GenerationConfig()
    return model


def encoded(model, tokens):
    """A cache that holds all but the last."""
    cache = model.make_cache()
    if len(tokens) > 1:
        model.encode(mx.array([tokens[:-1]]), cache)
    return cache


def context(model, tokens, config=GREEDY, seed=0, cache=None):
    """What the loop would give a drafter behind `tokens`."""
    cache = encoded(model, tokens) if cache is None else cache
    verifier = causal.Verifier(model, cache, config, Draws([seed], model.config.vocab_size), tokens, None)
    return DraftContext(tokens, CacheReader(cache), model, verifier.sample)


# --- what a draft is made of


@pytest.mark.parametrize("tokens", [[7], SHORT, LONG], ids=len)
def test_one_step_by_hand(model, tokens):
    """Slot j is the token at len(tokens) - 1 + j, slot 0 the last one; the noise is addressed by where it starts."""
    noise = Draws([canvas.SEED], VOCAB).canvas(len(tokens) - 1, 32)[0].tolist()
    slots = mx.array([[tokens[-1], *noise[1:]]])
    logits = model.logits(model.denoise_hidden(slots, encoded(model, tokens)))[0]
    draft = Canvas(steps=1).propose(context(model, tokens), 9)
    assert draft.tokens == mx.argmax(logits, axis=-1)[1:10].tolist()
    assert np.allclose(draft.confidences, mx.softmax(logits, axis=-1).max(axis=-1)[1:10], atol=1e-6)


def by_hand(model, tokens, length, steps):
    """Logits (C, V) of the last pass, by the steps of `denoise`, row 0 put right after each."""
    cache, draws, start = encoded(model, tokens), Draws([canvas.SEED], model.config.vocab_size), len(tokens) - 1
    config = GREEDY.replace(max_denoising_steps=steps)
    slots, soft = draws.canvas(start, length), None
    for number in range(steps):
        slots[0, 0] = tokens[-1]
        hidden = model.denoise_hidden(slots, cache, soft)
        heat = temperature(config, steps - number)
        step = summarise(model, hidden, heat, draws.token(start, number, length))
        accepted = accept(step.entropy[:, 1:], config.entropy_bound)
        new = mx.where(accepted, step.draw[:, 1:], draws.renoise(start, number, length)[:, 1:])
        slots = mx.concatenate([slots[:, :1], new], axis=1)
        soft = step.soft
        soft[0, 0] = model.embed(mx.array([tokens[-1]]))[0]
    return model.logits(hidden)[0]


@pytest.mark.parametrize("length", [2, 12, 64])
@pytest.mark.parametrize("steps", [2, 4])
def test_several_steps_by_hand(model, length, steps):
    draft = Canvas(length, steps).propose(context(model, LONG), 16)
    assert draft.tokens == mx.argmax(by_hand(model, LONG, length, steps), axis=-1)[1:17].tolist()


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_last_token_stands_in_slot_0_of_every_pass(monkeypatch, model, steps):
    passes, own = [], DiffusionGemma.denoise_hidden

    def denoise_hidden(self, slots, cache, soft=None):
        passes.append((slots, soft))
        return own(self, slots, cache, soft)

    monkeypatch.setattr(DiffusionGemma, "denoise_hidden", denoise_hidden)
    Canvas(steps=steps).propose(context(model, LONG), 4)
    assert len(passes) == steps
    assert all(slots[0, 0].item() == LONG[-1] and slots.shape == (1, 32) for slots, _ in passes)
    assert passes[0][1] is None
    known = model.embed(mx.array([LONG[-1]]))[0]
    assert all(mx.array_equal(soft[0, 0], known) for _, soft in passes[1:])


def test_the_last_token_costs_nothing_of_the_entropy_bound(monkeypatch, model):
    seen = []
    monkeypatch.setattr(
        canvas, "accept", lambda entropy, bound: seen.append((entropy, bound)) or accept(entropy, bound)
    )
    Canvas(steps=3).propose(context(model, LONG), 4)
    assert [(entropy[0, 0].item(), bound) for entropy, bound in seen] == [(0.0, GREEDY.entropy_bound)] * 2
    assert all(entropy[0, 1:].min().item() > 0 for entropy, _ in seen)


def test_the_checkpoints_sampler_is_used(monkeypatch, model):
    heats = []
    monkeypatch.setattr(canvas, "temperature", lambda *about: heats.append(temperature(*about)) or heats[-1])
    monkeypatch.setattr(model, "generation_config", GREEDY.replace(t_min=0.1, t_max=0.9))
    Canvas(steps=4).propose(context(model, LONG), 4)
    assert heats == pytest.approx([0.9, 0.7, 0.5])


# --- a draft depends on the tokens and the loop's draws, and changes nothing


def state(cache):
    return cache.length, [tuple(map(np.array, layer.state()[1:])) for layer in cache.layers]


@pytest.mark.parametrize("config", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_same_tokens_give_the_same_draft_and_leave_the_cache(model, steps, config):
    cache, drafter = encoded(model, LONG), Canvas(steps=steps)
    length, rows = state(cache)
    first = drafter.propose(context(model, LONG, config, cache=cache), 16)
    mx.random.seed(99)
    chance = mx.random.state[0].tolist()
    assert drafter.propose(context(model, LONG, config, cache=cache), 16) == first
    assert mx.random.state[0].tolist() == chance, "the global state is nobody's business"
    for other in (Canvas(steps=steps), drafter.fresh()):
        other.propose(context(model, SHORT, config), 3)
        assert other.propose(context(model, LONG, config), 16) == first
    after, kept = state(cache)
    assert after == length == len(LONG) - 1
    for own, left in zip(rows, kept, strict=True):
        assert all(np.array_equal(a[:, :, -WINDOW:], b[:, :, -WINDOW:]) for a, b in zip(own, left, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(rows[-1], kept[-1], strict=True)), "the full layer's, all of them"


def test_a_shorter_width_is_the_beginning_of_a_longer_one(model):
    """One at a time, too: what is asked for has no part in what the canvas becomes."""
    drafts = [Canvas(steps=2).propose(context(model, LONG, WARM), width) for width in (1, 5, 31)]
    for draft in drafts:
        assert draft.tokens == drafts[-1].tokens[: len(draft.tokens)]
        assert draft.confidences == pytest.approx(drafts[-1].confidences[: len(draft.tokens)], abs=1e-6)


@pytest.mark.parametrize(
    ("length", "width", "drafted"), [(32, 0, 0), (32, 31, 31), (32, 40, 31), (64, 64, 63), (2, 4, 1)]
)
def test_a_draft_fits_into_the_canvas(model, length, width, drafted):
    draft = Canvas(length).propose(context(model, LONG), width)
    assert len(draft.tokens) == drafted == len(draft.confidences or ())
    assert all(0 < confidence <= 1 for confidence in draft.confidences or ())


def test_the_loops_bias_is_the_drafts(model):
    """A bias, as the loop applies it, on logits that are not the main model's."""
    config = GREEDY.replace(logit_bias={77: 90.0})
    assert Canvas().propose(context(model, LONG, config), 5).tokens == [77] * 5
    logits = by_hand(model, LONG, 32, 1)[1:6]
    noise = Draws([3], VOCAB).next_token(len(LONG), 5).noise(0, VOCAB)[0]
    unfiltered = WARM.replace(top_k=0, top_p=1.0, logit_bias={5: 1.0})
    expected = mx.argmax(process(logits, None, unfiltered) / unfiltered.temperature + noise, axis=-1).tolist()
    assert Canvas().propose(context(model, LONG, unfiltered, seed=3), 5).tokens == expected


# --- the tokens are those of no drafter

WIDTHS = {
    "1": lambda: Widths(fixed=1),
    "4": lambda: Widths(fixed=4),
    "16": lambda: Widths(fixed=16),
    "costs": lambda: Widths(CHEAP),
    "measured": Widths,
}


@pytest.mark.parametrize(
    "drafter", [Canvas(), Canvas(64), Canvas(12, 2), Canvas(2, 4)], ids=lambda drafter: drafter.name
)
@pytest.mark.parametrize("widths", WIDTHS)
def test_losslessness(model, drafter, widths):
    """Both prompts cross the sliding window, one before its first draft."""
    for prompt, config, seed in cases(range(2)) if widths == "4" else [(SHORT, GREEDY, 0), (LONG, WARM, 1)]:
        done = assert_lossless(model, drafter, prompt, config, seed, widths=WIDTHS[widths]())
        assert done.counts.drafter_failure is None
        assert done.counts.drafted > 0 or not widths.isdigit(), "by cost, guesses without confidence are left"
        # its passes are the main model's, and are counted
        assert done.counts.denoise_forwards % drafter.steps == 0 or not widths.isdigit()
        assert done.counts.denoise_forwards >= done.counts.rounds * drafter.steps
        assert done.counts.drafter_seconds > 0


def test_losslessness_after_one_token(model):
    for config in (GREEDY, WARM):
        assert_lossless(model, Canvas(), [7], config, width=4)


def test_nothing_is_drafted_beyond_the_context():
    """The last canvas that fits ends at the last position."""
    small = lively_model(max_position_embeddings=45)
    asked = []

    class Watched(Canvas):
        def propose(self, context, width):
            draft = super().propose(context, width)
            asked.append((len(context.tokens) - 1 + self.length, bool(draft.tokens)))
            return draft

    for config in (GREEDY, WARM):
        done = assert_lossless(small, Watched(32), SHORT, config.replace(max_new_tokens=60), width=4)
        assert done.counts.drafter_failure is None
        assert len(done.text) == 45
    assert {end for end, has_drafted in asked if has_drafted} == {end for end, _ in asked if end <= 45}
    assert max(end for end, _ in asked) > 45


# --- on nano, where a draft can be right


def questions(nano, *tasks, count):
    return [encode_prompt(nano[1], example.prompt) for task in tasks for example in held_out(task, count)]


def accepted(nano, drafter, prompts, config, width=8, seed=0):
    """Drafts kept per round; every answer is that of no drafter."""
    kept = rounds = 0
    for prompt in prompts:
        done = run(nano[0], prompt, config, seed, drafter=drafter, width=width)
        assert done.ids == plain(nano[0], prompt, config, seed).ids
        assert done.counts.drafter_failure is None
        kept, rounds = kept + done.counts.accepted, rounds + done.counts.rounds
    return kept / rounds


@pytest.fixture(scope="module")
def greedy(nano):
    return nano[0].generation_config.replace(temperature=0.0)


def unpinned(monkeypatch):
    monkeypatch.setattr(canvas, "_pinned", lambda first, slots: slots)


def shifted(by):
    """Slot j taken for the token after it, or the one before."""

    def plant(monkeypatch):
        own = Canvas._denoise
        monkeypatch.setattr(Canvas, "_denoise", lambda *about: mx.roll(own(*about), by, axis=1))

    plant.__name__ = f"shifted by {by}"
    return plant


def noise_alone(monkeypatch):
    """The prefix is not looked at."""
    own = Canvas._denoise
    monkeypatch.setattr(
        Canvas, "_denoise", lambda self, model, cache, last: own(self, model, CacheReader(model.make_cache()), last)
    )


def begun_right(nano, prompts, config, width=8):
    """Drafts kept of the first round, on average: nano has learnt canvases right behind the prompt, and no others."""
    model, kept = nano[0], []
    for prompt in prompts:
        answer = plain(model, prompt, config.replace(max_new_tokens=width)).ids
        kept.append(causal.agreement(Canvas().propose(context(model, prompt, config), width).tokens, answer))
    return sum(kept) / len(kept)


def test_most_first_drafts_are_right(nano, greedy):
    assert begun_right(nano, questions(nano, "json", "function", count=4), greedy) > 6


@pytest.mark.parametrize("mistake", [shifted(1), shifted(-1), noise_alone], ids=lambda mistake: mistake.__name__)
def test_a_mistake_makes_drafts_bad(monkeypatch, nano, greedy, mistake):
    mistake(monkeypatch)
    assert begun_right(nano, questions(nano, "json", "function", count=4), greedy) < 2


def test_a_slot_0_that_is_not_pinned_is_noticed(monkeypatch, model):
    """On nano it costs little: there the prefix says all. So drafts are compared, of one pass and of several."""
    drafts = [Canvas(steps=steps).propose(context(model, LONG), 16).tokens for steps in (1, 2)]
    unpinned(monkeypatch)
    others = [Canvas(steps=steps).propose(context(model, LONG), 16).tokens for steps in (1, 2)]
    assert drafts[0] != others[0] and drafts[1] != others[1]


def test_answers_take_fewer_passes(nano, greedy):
    """Also in the middle of an answer, which nano's canvases have not learnt; eos stands inside the last block."""
    assert accepted(nano, Canvas(), questions(nano, "json", "function", count=2), greedy) > 1.2


def test_an_answer_ends_inside_a_draft(nano, greedy):
    """At its eos, and at max_tokens; drafting by cost drafts here."""
    model, prompt = nano[0], questions(nano, "reverse", count=1)[0]
    whole = assert_lossless(model, Canvas(), prompt, greedy, width=16)
    assert whole.reasons[-1] == "stop" and whole.tokens[-1].from_draft
    assert whole.counts.drafted > len(whole.ids)
    for config, widths in ((greedy.replace(max_new_tokens=4), {"width": 16}), (greedy, {"widths": Widths(CHEAP)})):
        done = assert_lossless(model, Canvas(), prompt, config, **widths)
        assert done.ids == whole.ids[: len(done.ids)]
        assert done.counts.accepted > 0


class Deaf(Canvas):
    """Draws with noise of its own."""

    def __init__(self, config):
        super().__init__()
        self._config = config

    def propose(self, context, width):
        draws = Draws([77], context.model.config.vocab_size)
        own = causal.Verifier(context.model, None, self._config, draws, (), None)
        return super().propose(replace(context, sample=own.sample), width)


def test_a_sampled_draft_shares_the_loops_noise(monkeypatch, model):
    """A canvas that believes what the causal pass will is the answer, whatever is drawn; with other noise it is not."""
    answer = plain(model, LONG, WARM).ids[:8]
    believed = model.encode(mx.array([[*LONG, *answer]]), model.make_cache())[:, len(LONG) - 2 :]  # slot 0: the last
    monkeypatch.setattr(Canvas, "_denoise", lambda *_: believed)
    shared, own = (d.propose(context(model, LONG, WARM), 8).tokens for d in (Canvas(), Deaf(WARM)))
    assert shared == answer != own


# --- by name, and by its options


def test_it_is_made_by_name(tiny):
    made = make("canvas", tiny)
    assert isinstance(made, Canvas)
    assert (made.length, made.steps) == (canvas.LENGTH, canvas.STEPS)
    assert make("canvas", tiny) is not made
    assert made.taps == ()
    made = make("canvas:64x2", tiny)
    assert (made.length, made.steps) == (64, 2)
    with pytest.raises(UsageError, match=r"write canvas\[:POSITIONSxSTEPS\]$"):
        check_name("canvas:")
    for wrong in ("64", "x2", "64x", "64x2x1", "-64x2", "64x9", "1x1", "9" * 50 + "x1", "a"):
        with pytest.raises(UsageError, match="canvas"):
            make(f"canvas:{wrong}", tiny)


def test_a_fresh_one_has_the_same_options(tiny):
    other = make(Canvas(64, 3), tiny)
    assert (other.length, other.steps) == (64, 3)


def test_each_kind_has_its_costs():
    names = {Canvas(length, steps).name for length in (32, 64) for steps in (1, 2, 3, 4)}
    assert len(names) == 8
    assert all(re.fullmatch(r"canvas-\d+x\d", name) for name in names), "costs are stored under it, between slashes"


@pytest.mark.parametrize(
    "wrong", [{"length": 1}, {"length": 66}, {"length": 32.0}, {"steps": 0}, {"steps": 5}, {"steps": True}]
)
def test_options_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=rf"{name} of a canvas drafter must be .* not {value!r}"):
        Canvas(**wrong)

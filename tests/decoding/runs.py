"""What the tests of the causal loop share: a model, runs of it, a naive loop, drafters made of functions."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_dgemma.cache import PrefixCache
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.prefill import prefill
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.draws import Draws
from mlx_dgemma.filters import process, shape
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


_known: dict = {}


def once(model, key, make: Callable):
    """What `make` gives, for this model and key called once; the model is kept, so that its id stays its own."""
    key = (id(model), key)
    if key not in _known:
        _known[key] = model, make()
    return _known[key][1]


def plain(model, prompt, config=GREEDY, seed=0) -> Run:
    """The answer without a drafter."""
    return once(model, ("plain", *prompt, repr(config), seed), lambda: run(model, prompt, config, seed))


def behind(model, cache, last) -> list[mx.array]:
    """What a token and a canvas become behind a cache."""
    return [model.encode(mx.array([last]), cache), model.denoise_hidden(mx.arange(12)[None], cache)]


def behind_afresh(model, text) -> list[mx.array]:
    cache = model.make_cache()
    prefill(model, text[:-1], cache)
    out = behind(model, cache, text[-1:])
    mx.eval(out)
    return out


def assert_cache_holds_all_but_the_last(model, cache, text):
    """By length, and by what comes of going on from it: in ar mode, and with a canvas."""
    assert cache.length == len(text) - 1
    expected = once(model, ("behind", *text), lambda: behind_afresh(model, text))
    for here, there in zip(behind(model, cache, text[-1:]), expected, strict=True):
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

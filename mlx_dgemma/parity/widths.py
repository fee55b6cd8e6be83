"""Does a pass over several positions choose the tokens that passes over one choose, on this device?

Drafts are verified many positions at a time. A device whose kernels round differently for one row
than for many may then choose another token where two are all but equally good. This runs the same
answer with and without drafts and names every place where they part: a tie, with its margin, or a
fault, which no rounding explains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..config import GenerationConfig
from ..decoding.causal import Verifier, agreement, decode
from ..decoding.counts import Counts
from ..decoding.prefill import prefill
from ..decoding.width import Widths
from ..drafter.oracle import Oracle
from ..draws import Draws
from ..filters import shape
from ..model import DiffusionGemma

# how far the logits of a position may move with the width of the pass, by rounding alone
NOISE = {mx.float32: 2e-3, mx.bfloat16: 0.25, mx.float16: 0.06}


@dataclass(frozen=True)
class Flip:
    """A token that differs: `got` instead of `expected`, by how much in logits, and whether that is a tie."""

    number: int  # of the token in the answer
    expected: int
    got: int
    margin: float
    is_tie: bool


@dataclass(frozen=True)
class Comparison:
    """An answer written `width` drafts a pass beside the same one written token by token."""

    width: int
    tokens: int  # compared
    passes: int  # with drafts
    flips: tuple[Flip, ...]
    is_whole: bool = True  # False: a pass raised before all tokens were compared

    @property
    def passed(self) -> bool:
        return all(flip.is_tie for flip in self.flips)

    def line(self) -> str:
        first = self.flips[0] if self.flips else None
        where = f"{first.number:8} {first.margin:9.1e}" if first else f"{'-':>8} {'-':>9}"
        verdict = "same" if not self.flips else "ties alone" if self.passed else "FAULT"
        return f"{self.width:6} {self.tokens:7} {self.passes:7} {len(self.flips):6} {where}  {verdict}"


HEAD = f"{'drafts':>6} {'tokens':>7} {'passes':>7} {'flips':>6} {'first at':>8} {'margin':>9}"


def plain_options(config: GenerationConfig, temperature: float, max_tokens: int) -> GenerationConfig:
    """No end and no filter: one that keeps or drops a token at its edge says nothing about rounding."""
    off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "eos_token_ids": ()}
    return config.replace(temperature=temperature, max_new_tokens=max_tokens, **off)


def compare(
    model: DiffusionGemma, prompt: Sequence[int], config: GenerationConfig, seed: int, widths: Sequence[int]
) -> Iterator[Comparison]:
    """Write an answer token by token, then with right drafts of every width in `widths`.

    After a flip, the comparison goes on behind the token that plain decoding chose. What a pass
    raises is raised on, after what was compared until then.
    """
    draws = Draws([seed], model.config.vocab_size)
    expected = [token.id for token in decode(model, prompt, config, draws)]
    for width in widths:
        yield from _compare(model, list(prompt), expected, config, draws, width)


def _compare(
    model: DiffusionGemma, prompt: list[int], expected: list[int], config: GenerationConfig, draws: Draws, width: int
) -> Iterator[Comparison]:
    flips, counts, done = [], Counts(), 0
    try:
        while done < len(expected):
            known = prompt + expected[:done]
            rest = config.replace(max_new_tokens=len(expected) - done)
            drafter, fixed = Oracle(prompt + expected), Widths(fixed=width)
            written = decode(model, known, rest, draws, drafter=drafter, widths=fixed, counts=counts)
            got = [token.id for token in written]
            done += agreement(expected[done:], got)
            if done < len(expected):
                flips.append(_flip(model, prompt, expected, done, got[done - len(known) + len(prompt)], config, draws))
                done += 1
    except (Exception, KeyboardInterrupt):
        if done:
            yield Comparison(width, done, counts.encode_forwards, tuple(flips), is_whole=False)
        raise
    yield Comparison(width, len(expected), counts.encode_forwards, tuple(flips))


def _flip(
    model: DiffusionGemma,
    prompt: list[int],
    expected: list[int],
    number: int,
    got: int,
    config: GenerationConfig,
    draws: Draws,
) -> Flip:
    """How much better the expected token is, by a pass over one position."""
    tokens, cache = prompt + expected[:number], model.make_cache()
    prefill(model, tokens[:-1], cache)
    verifier = Verifier(model, cache, config, draws, tokens, Counts())
    scores = verifier.launch(mx.array(tokens[-1:]), ()).logits
    if config.temperature:
        scores = shape(scores, config) + draws.next_token(len(tokens), 1).noise(0, scores.shape[-1])[0]
    margin = (scores[0, expected[number]] - scores[0, got]).item() * (config.temperature or 1.0)
    return Flip(number, expected[number], got, margin, abs(margin) <= 2 * NOISE[model.dtype])

"""AR mode: token after token by the causal pass, or several a pass where a drafter guesses them.

At the start of a round the cache holds all tokens but the last, which is emitted and not encoded yet.

    1. draft    a drafter guesses d1 .. dk, the tokens that follow the last one
    2. verify   one causal pass over [last, d1 .. dk]: the main model's own token after each of them,
                and their keys and values
    3. accept   drafts as long as they are the main model's own tokens; then its own token y
    4. roll back what was not accepted: the cache holds all tokens but the last again, which is y

The main model's token at a position is fixed by its distribution and by a draw that belongs to the
seed and the position. So the answer is the same whatever is drafted (speculative decoding, arXiv
2211.17192, with coupled draws), and a drafter changes only how many passes it takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from ..cache import CacheReader, PrefixCache
from ..config import GenerationConfig
from ..drafter.protocol import NOTHING, Draft, DraftContext, Drafter
from ..draws import Draws, RecordedDraws
from ..filters import process, recent, shape
from ..model import DiffusionGemma, Taps
from .counts import Counts
from .diffusion import cut
from .guard import GuardedDrafter
from .prefill import PREFILL_STEP, Progress, prefill
from .width import Widths

SLOW_CALLER = 0.3  # share of a step spent outside the loop from which its time says nothing


@dataclass(frozen=True)
class Token:
    """One token of the answer."""

    id: int
    from_draft: bool
    finish_reason: str | None  # "stop" (eos), "length" (max_new_tokens or the context), None: more follows
    logprobs: mx.array  # (V,) what the main model gave each id, after bias and penalty; not evaluated yet


def decode(
    model: DiffusionGemma,
    prompt: Sequence[int],
    config: GenerationConfig,
    draws: Draws | RecordedDraws,
    *,
    drafter: Drafter | None = None,
    widths: Widths | None = None,
    cache: PrefixCache | None = None,
    drafter_snapshot: object = None,
    counts: Counts | None = None,
    prefill_step: int = PREFILL_STEP,
    progress: Progress | None = None,
) -> Iterator[Token]:
    """Continue `prompt`; yields its tokens one by one.

    Args:
        drafter: guesses what follows; the tokens are the same without it.
        widths: how many tokens to draft, by default what costs least time.
        cache: may hold the first tokens of `prompt` already, all but one at most. Afterwards, and
            whenever the caller stops, it holds all tokens but the last.
        drafter_snapshot: what the drafter's `snapshot()` gave when the cache was as it is now; needed
            if the cache holds tokens and the drafter wants to hear of them.
        counts: incremented as work is launched.
    """
    cache = model.make_cache() if cache is None else cache
    counts, widths = counts or Counts(), widths or Widths()
    tokens, goal = list(prompt), min(len(prompt) + config.max_new_tokens, model.config.max_position_embeddings)
    guard = GuardedDrafter(drafter, model.config.vocab_size, counts)
    if cache.length >= len(tokens):
        raise ValueError(f"the cache holds {cache.length} tokens of {len(tokens)}, which is too many to begin with")
    if drafter_snapshot is not None:
        guard.resume(drafter_snapshot)
    elif cache.length and guard.listens:
        raise ValueError(f"{guard.name} has not heard of the {cache.length} tokens in the cache; give its snapshot")
    verifier = Verifier(model, cache, config, draws, tokens, counts)
    context = DraftContext(TokensView(tokens), CacheReader(cache), model, verifier.sample)
    widths.drafter, watch = guard.name, StepWatch()

    def width(count: int) -> int:  # how many tokens to ask for behind `count` tokens
        room = min(goal - count - 1, cache.slack)  # what could be kept, and what can be rolled back
        return widths.ask(count, room) if guard.active else 0

    listener = guard.extend if guard.listens else None
    prefill(model, tokens[:-1], cache, prefill_step, progress, counts=counts, taps=guard.taps, listener=listener)
    ahead: Round | None = None
    charged = counts.drafter_seconds
    try:
        while True:
            count = len(tokens)
            if ahead is None:
                # 1. draft
                asked = width(count)
                draft = guard.propose(context, asked)
                draft = draft.first(widths.verify(count, draft))
                # 2. verify
                current = verifier.launch(mx.array([tokens[-1], *draft.tokens]), guard.taps, draft)
            else:
                current, asked = ahead, 0
            # where nothing will be drafted, the next pass is launched before this one's token is read
            goes_ahead = not current.draft.tokens and count + 1 < goal and not width(count + 1)
            following = verifier.launch(current.samples, guard.taps) if goes_ahead else None
            # 3. accept
            samples = current.samples.tolist()
            accepted = agreement(current.draft.tokens, samples)
            emitted, reason = cut(samples[: accepted + 1], config.eos_token_ids, goal - count)
            accepted = min(accepted, len(emitted))
            # 4. roll back
            cache.rollback(len(current.draft.tokens) + 1 - len(emitted))

            seconds = watch.read(current)
            if guard.active and current is ahead:
                widths.stepped(count, seconds)
            elif guard.active:
                widths.verified(count, asked, draft, accepted, counts.drafter_seconds - charged, seconds)
            charged = counts.drafter_seconds
            try:
                for number, token in enumerate(emitted):
                    tokens.append(token)
                    counts.accepted += number < accepted
                    is_last = number + 1 == len(emitted)
                    with watch.away():
                        yield Token(token, number < accepted, reason if is_last else None, current.logprobs(number))
            finally:  # wherever the caller stops, also inside a block
                guard.extend(tokens[count - 1 : -1], current.tapped)
            if reason is not None:
                return
            ahead = following
    finally:
        cache.rollback(max(0, cache.length - len(tokens) + 1))
        guard.tell()


def agreement(draft: Sequence[int], samples: Sequence[int]) -> int:
    """How many drafted tokens, from the first on, are the main model's own."""
    return next((i for i, (guess, own) in enumerate(zip(draft, samples, strict=False)) if guess != own), len(draft))


@dataclass(frozen=True)
class Round:
    """A pass that has been launched over [last, *draft]."""

    draft: Draft
    logits: mx.array  # (L, V) with bias and penalty
    samples: mx.array  # (L,) the main model's own token after each position
    tapped: Taps
    launched: float

    def logprobs(self, number: int) -> mx.array:
        return self.logits[number] - mx.logsumexp(self.logits[number])


class Verifier:
    """Launches passes: each encodes a block, and chooses the main model's own token after every position."""

    def __init__(
        self,
        model: DiffusionGemma,
        cache: PrefixCache,
        config: GenerationConfig,
        draws: Draws | RecordedDraws,
        tokens: Sequence[int],
        counts: Counts,
    ):
        self._model, self._cache, self._config = model, cache, config
        self._draws, self._tokens, self._counts = draws, tokens, counts

    def launch(self, block: mx.array, taps: Sequence[int], draft: Draft = NOTHING) -> Round:
        """Encode `block` (L,) ids; does not wait for the result."""
        launched, tapped, first = time.perf_counter(), Taps(taps), self._cache.length
        hidden = self._model.encode(block[None], self._cache, tapped)
        known = self._tokens[max(0, first - self._config.repetition_context_size) : first]
        logits = process(self._model.logits(hidden)[0], recent(known, block, self._config), self._config)
        samples = self.choose(logits, first + 1)
        mx.async_eval(samples)
        self._counts.encode_forwards += 1
        self._counts.positions += block.size
        self._counts.rounds += bool(draft.tokens)
        self._counts.drafted += len(draft.tokens)
        return Round(draft, logits, samples, tapped, launched)

    def choose(self, logits: mx.array, first: int) -> mx.array:
        """Tokens (L,) at positions [first, first + L) from their logits (L, V)."""
        if self._config.temperature == 0:
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        draw = self._draws.next_token(first, len(logits))
        draw.add(shape(logits, self._config)[None], 0)
        return draw.ids[0]

    def sample(self, logits: mx.array, first: int) -> mx.array:
        """The same for a drafter's logits: with the bias, without the penalty, which looks at what is being drafted.

        Recorded draws are the answer itself, which a drafter is not told: it gets its likeliest ids.
        """
        logits = process(logits, None, self._config)
        if isinstance(self._draws, RecordedDraws):
            return mx.argmax(logits, axis=-1).astype(mx.int32)
        return self.choose(logits, first)


class StepWatch:
    """Seconds of a pass, as far as they were its own."""

    def __init__(self) -> None:
        self._read = self._away = 0.0

    def read(self, current: Round) -> float | None:
        """Since its launch, or since the pass before it; None if the caller kept it waiting meanwhile."""
        now, away = time.perf_counter(), self._away
        waited = current.launched < self._read
        seconds = now - max(current.launched, self._read)
        self._read, self._away = now, 0.0
        return None if waited and away > SLOW_CALLER * seconds else seconds

    @contextmanager
    def away(self) -> Iterator[None]:
        left = time.perf_counter()
        yield
        self._away += time.perf_counter() - left


class TokensView(Sequence):
    """A list that can be read, not written."""

    def __init__(self, tokens: list[int]):
        self._tokens = tokens

    def __getitem__(self, key):
        return self._tokens[key]

    def __len__(self) -> int:
        return len(self._tokens)

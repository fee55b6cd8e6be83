"""What ar mode is asked in `benchmarks.causal`: kinds of text, and the share of all tokens that each stands for.

Shares were stated before anything was counted. They are a guess at what a drafter meets with whoever
turns one on: edits and extraction first, code next, a tenth of puzzles, and a sixth of text in which
nothing can be foreseen. Conversations are not among them: nano has learnt single turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_dgemma.prompt import encode_prompt

from .measure import Question
from .nano.tasks import held_out

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

FORCED_PROMPT, FORCED_ANSWER = 32, 96  # ids


@dataclass(frozen=True)
class Forced(Question):
    """A prompt that is continued by given ids, whatever the model would say."""

    answer: list[int]


Maker = Callable[["TokenizerWrapper", int, int, int], list[Question]]  # (tokenizer, vocabulary, count, seed)


@dataclass(frozen=True)
class Domain:
    share: float  # of all tokens
    why: str
    questions: Maker


def _held_out(task: str) -> Maker:
    """Prompts of one of nano's tasks; their answers were not trained on."""

    def make(tokenizer: TokenizerWrapper, vocab_size: int, count: int, seed: int) -> list[Question]:
        examples = held_out(task, count)
        return [Question(encode_prompt(tokenizer, example.prompt), example.answer) for example in examples]

    return make


def _random(ids: int | None = None) -> Maker:
    """Texts of random ids, each of so many different ones; None: of the whole vocabulary."""

    def make(tokenizer: TokenizerWrapper, vocab_size: int, count: int, seed: int) -> list[Question]:
        questions = []
        for number in range(count):
            chance = random.Random(seed + number)
            alphabet = chance.sample(range(vocab_size), ids or vocab_size)
            text = chance.choices(alphabet, k=FORCED_PROMPT + FORCED_ANSWER)
            questions.append(Forced(text[:FORCED_PROMPT], None, text[FORCED_PROMPT:]))
        return questions

    return make


DOMAINS = {
    "edit": Domain(0.35, "one field of a JSON object changed: all but a value stands in the prompt", _held_out("edit")),
    "json": Domain(0.15, "pairs written as JSON: words of the prompt in another spelling", _held_out("json")),
    "function": Domain(0.20, "a Python function: little of the prompt, but code repeats itself", _held_out("function")),
    "sudoku": Domain(0.10, "a 4x4 grid: every digit has to be found out", _held_out("sudoku")),
    "reverse": Domain(0.05, "words in reverse: what followed before does not follow now", _held_out("reverse")),
    "random": Domain(0.10, "random ids, forced: nothing to be right about, drafting can only cost", _random()),
    "digits": Domain(0.05, "ten ids at random, forced: all pairs recur and promise nothing", _random(10)),
}

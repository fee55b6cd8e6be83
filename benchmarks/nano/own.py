"""Somebody's own data as rows: JSON lines of prompts with their answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dgemma.errors import InputError

from ..examples import Example
from ..examples import read as read_examples
from .rows import Row, encode


def read(path: Path) -> list[Example]:
    """The examples of a file. Raises InputError naming the line that has no prompt, or no answer to be learnt."""
    examples = read_examples(path)
    for example in examples:
        answer, thought = (example.fields.get(key) for key in ("answer", "thought"))
        if not isinstance(answer, str) or not isinstance(thought, str | None):
            raise InputError(
                f'{example.where}: "answer" must be the text to be learnt (and "thought", if there is one)'
            )
        if bool(example.enable_thinking) != (thought is not None):
            raise InputError(
                f'{example.where}: "enable_thinking" is {"true" if thought is None else "false"}, and '
                f'{"no" if thought is None else "a"} "thought" is given; they go together'
            )
    return examples


def encoded(examples: Sequence[Example], tokenizer: TokenizerWrapper, end: int) -> list[Row]:
    """Their rows. Raises InputError naming the line that is no text, or that the chat template does not take."""
    rows = []
    for example in examples:
        answer, thought = example.fields["answer"], example.fields.get("thought")
        try:
            f"{answer}{thought}".encode()  # half of a surrogate pair is JSON but no text
            rows.append(encode(tokenizer, end, example.prompt, answer, thought))
        except (InputError, UnicodeError) as error:
            raise InputError(f"{example.where}: {error}") from None
    return rows


def endless(rows: list[Row], seed: int) -> Iterator[Row]:
    """All rows in a random order, again and again."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))

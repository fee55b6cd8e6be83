"""Somebody's own data as rows: JSON lines of prompts with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mlx_dgemma.drafter.training.prompts import contents, parse
from mlx_dgemma.errors import InputError

from .rows import Row, encode


def read(path: Path, tokenizer: PreTrainedTokenizerBase, end: int) -> list[Row]:
    """The rows of a file. Raises InputError naming the line that has no prompt or no answer."""
    data = contents(path)
    prompts = parse(data, path)  # every line is JSON, with a prompt
    lines = [json.loads(raw) for raw in data.decode("utf-8-sig").split("\n") if raw.strip()]
    rows = []
    for line, fields in zip(prompts, lines, strict=True):
        answer, thought = (fields.get(key) if isinstance(fields, dict) else None for key in ("answer", "thought"))
        if not isinstance(answer, str) or not isinstance(thought, str | None):
            raise InputError(f'{line.where}: "answer" must be the text to be learnt (and "thought", if there is one)')
        messages = [{"role": "user", "content": line.prompt}] if isinstance(line.prompt, str) else line.prompt
        rows.append(encode(tokenizer, end, messages, answer, thought))
    return rows


def endless(rows: list[Row], seed: int) -> Iterator[Row]:
    """All rows in a random order, again and again."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(rows, len(rows))

"""Stage one: the main model answers every prompt in ar mode, several of equal length side by side.

Each answer is the one that `stream_generate(mode="ar", seed=seed + number)` gives, by the draws of
its own seed. A line per answer is appended to a file; after an interruption, those that are whole
are kept and the group that was not finished is written again. Finished, they may be kept in a file
for other trainings (`keep`, `take`), whose first line says what they depend on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ...config import GenerationConfig
from ...convert.journal import hashes
from ...decoding.prefill import check_prompt
from ...draws import Draws
from ...errors import InputError, UsageError
from ...filters import process, shape
from ...model import DiffusionGemma
from .anchors import CHUNK
from .options import Options
from .prompts import PromptLine
from .workspace import changes_in_words, write_atomically


def check(model: DiffusionGemma, lines: Sequence[PromptLine], prompts: Sequence[Sequence[int]]) -> None:
    """Raise InputError, naming the line, for a prompt that the model cannot answer."""
    for line, ids in zip(lines, prompts, strict=True):
        try:
            check_prompt(model, ids, room=2)
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None


def write(model: DiffusionGemma, prompts: Sequence[Sequence[int]], options: Options, path: Path) -> list[list[int]]:
    """The answers to all prompts, by number; those that are in the file already are not made again."""
    known, whole = _read(path.read_bytes() if path.exists() else b"")
    with path.open("ab") as file, tqdm(total=len(prompts), initial=len(known), desc="Answering", unit="answer") as bar:
        file.truncate(whole)
        tokens = 0
        for numbers in groups(prompts, options.at_once):
            if all(number in known for number in numbers):
                continue
            made = answer(model, [prompts[n] for n in numbers], [options.seed + n for n in numbers], options.max_tokens)
            for number, ids in zip(numbers, made, strict=True):
                if number not in known:
                    file.write(_line(number, prompts[number], ids))
                    known[number] = ids
                    tokens += len(ids)
                    bar.update()
            file.flush()
            os.fsync(file.fileno())
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
    return [known[number] for number in range(len(prompts))]


def take(path: Path, facts: Mapping[str, Any], count: int) -> list[list[int]] | None:
    """The answers to `count` prompts of a file that `keep` wrote; None if it is not there yet.

    Raises UsageError if it holds others, or could not be written.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: {path.absolute().parent} is not a folder; create it first")
    try:
        first, _, rest = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        begun = dict(json.loads(first)["fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path}: is no file of answers; name another --answers") from None
    changes = changes_in_words(hashes(facts), begun)
    if changes:
        raise UsageError(f"{path}: holds answers of other {changes}; remove it or name another --answers")
    known, whole = _read(rest)
    if whole < len(rest) or known.keys() != set(range(count)):
        raise UsageError(f"{path}: is not whole; remove it or name another --answers")
    return [known[number] for number in range(count)]


def keep(path: Path, facts: Mapping[str, Any], prompts: Sequence[Sequence[int]], texts: Sequence[list[int]]) -> None:
    """Write the answers for `take`; the file is there when it is whole."""
    lines = [json.dumps({"fingerprint": hashes(facts)}).encode() + b"\n"]
    lines += [_line(number, *pair) for number, pair in enumerate(zip(prompts, texts, strict=True))]
    write_atomically(path, lambda new: new.write_bytes(b"".join(lines)))


def _line(number: int, prompt: Sequence[int], answer: list[int]) -> bytes:
    return json.dumps({"number": number, "prompt": list(prompt), "answer": answer}).encode() + b"\n"


def _read(data: bytes) -> tuple[dict[int, list[int]], int]:
    """Answers by number, and how many bytes are whole lines: what follows a torn one counts for nothing."""
    known: dict[int, list[int]] = {}
    whole = 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            known[int(entry["number"])] = [int(i) for i in entry["answer"]]
        except (ValueError, KeyError, TypeError):
            break
        whole += len(line)
    return known, whole


def groups(prompts: Sequence[Sequence[int]], at_once: int) -> Iterator[list[int]]:
    """Numbers of prompts that are equally long, at most so many together, from the shortest on.

    Which stand together depends on nothing but the prompts: kernels may round by company.
    """
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(prompts):
        by_length.setdefault(len(ids), []).append(number)
    for _, numbers in sorted(by_length.items()):
        for first in range(0, len(numbers), at_once):
            yield numbers[first : first + at_once]


def answer(
    model: DiffusionGemma, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Continue prompts of one length, each by the draws of its seed, up to its eos: ids without the prompt's."""
    config: GenerationConfig = model.generation_config
    draws, cache, length = Draws(seeds, model.config.vocab_size), model.make_cache(slack=0), len(prompts[0])
    texts = mx.array(prompts, dtype=mx.int32)
    for first in range(0, length - 1, CHUNK):
        model.encode(texts[:, first : min(first + CHUNK, length - 1)], cache)
        mx.eval(cache.arrays())
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for position in range(length, min(length + max_tokens, model.config.max_position_embeddings)):
        logits = model.logits(model.encode(texts[:, -1:], cache))[:, 0]
        seen = texts[:, -config.repetition_context_size :] if config.repetition_penalty != 1 else None
        ids = _choose(process(logits, seen, config), draws, position, config)
        texts = mx.concatenate([texts, ids[:, None]], axis=1)
        for row, token in enumerate(ids.tolist()):
            if not done[row]:
                answers[row].append(token)
                done[row] = token in config.eos_token_ids
        if all(done):
            break
    return answers


def _choose(logits: mx.array, draws: Draws, position: int, config: GenerationConfig) -> mx.array:
    """The tokens (B,) at one position, as `decoding.causal` chooses them."""
    if config.temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    draw = draws.next_token(position, 1)
    draw.add(shape(logits, config)[:, None], 0)
    return draw.ids[:, 0]

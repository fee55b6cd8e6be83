"""The head that a drafter guesses with: the main model's, or a smaller copy of it.

A draft need not be exact, and the whole head is a third of what an AR step reads. So it may be
quantised, and cut to the part of the vocabulary that is likely at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import mlx.core as mx

from ..errors import InputError, UsageError
from ..model import DiffusionGemma

GROUPS = (64, 32)  # columns that share a scale: the first that divides them
ROWS = 16_384  # of the embedding, quantised at a time
BITS = (4, 8)


class Head:
    """Softcapped logits from hidden states.

    It holds on to the model's embedding, not to the model, so that both can be forgotten together.

    Args:
        model: whose embedding is the head.
        bits: 4 or 8: a quantised copy; None: the head as it is.
        ids: the part of the vocabulary that can be drafted; None: all of it.
    """

    def __init__(self, model: DiffusionGemma, bits: int | None = None, ids: Sequence[int] | None = None):
        self._cap, self._vocab = model.config.final_logit_softcapping, model.config.vocab_size
        self._ids = None if ids is None else mx.array(sorted(set(ids)))
        is_whole = bits is None and ids is None
        embedding = model.model.decoder.embed_tokens
        self._project = embedding.as_linear if is_whole else _Rows(model, self._ids, bits).project

    def __call__(self, hidden: mx.array) -> mx.array:
        """(L, H) -> float32 (L, V); -inf for what cannot be drafted."""
        logits = mx.tanh(self._project(hidden).astype(mx.float32) / self._cap) * self._cap
        if self._ids is None:
            return logits
        whole = mx.full((len(hidden), self._vocab), -mx.inf)
        whole[:, self._ids] = logits
        return whole


class _Rows:
    """Rows of the embedding, gathered and quantised once."""

    def __init__(self, model: DiffusionGemma, ids: mx.array | None, bits: int | None):
        embedding, self._bits = model.model.decoder.embed_tokens, bits
        self._group = None if bits is None else _group(model.config.hidden_size)
        parts = []
        count = model.config.vocab_size if ids is None else ids.size
        for first in range(0, count, ROWS):
            chosen = mx.arange(first, min(first + ROWS, count)) if ids is None else ids[first : first + ROWS]
            rows = embedding(chosen).astype(model.dtype)
            parts.append((rows,) if bits is None else mx.quantize(rows, group_size=self._group, bits=bits))
            mx.eval(parts[-1])
        self._arrays = [mx.concatenate(pieces) for pieces in zip(*parts, strict=True)]
        mx.eval(self._arrays)

    def project(self, hidden: mx.array) -> mx.array:
        if self._bits is None:
            return hidden @ self._arrays[0].T
        return mx.quantized_matmul(hidden, *self._arrays, transpose=True, group_size=self._group, bits=self._bits)


def _group(width: int) -> int:
    group = next((size for size in GROUPS if width % size == 0), None)
    if group is None:
        raise UsageError(
            f"draft_head_bits: a head {width} wide cannot be quantised in groups of {GROUPS[0]} or {GROUPS[1]}"
        )
    return group


def check_bits(name: str, bits: int | None) -> None:
    """Raise UsageError for bits that nothing is quantised to here."""
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise UsageError(f"{name} must be {' or '.join(map(str, BITS))}, not {bits!r}")


def read_vocabulary(given: int | str | Path | Iterable[int] | None, size: int) -> list[int] | None:
    """The ids that can be drafted: a number (so many ids from 0 on), ids, or a JSON file that holds a list of them.

    Raises UsageError, InputError for ids that are none.
    """
    if given is None:
        return None
    if isinstance(given, str | Path) and not str(given).isdecimal():
        return _checked(_read_ids(Path(given)), size, str(given), InputError)
    if isinstance(given, str | Path | int):
        count = given if isinstance(given, int) else int(str(given)[:20])
        ids: Sequence[int] = range(count if type(count) is int and 0 < count <= size else 0)
    else:
        ids = list(given) if isinstance(given, Iterable) else ()
    return _checked(ids, size, "draft_vocab", UsageError)


def _checked(ids: Sequence[int], size: int, where: str, kind: type[InputError]) -> list[int]:
    if not len(ids) or any(type(i) is not int or not 0 <= i < size for i in ids):
        raise kind(f"{where}: must hold ids in 0-{size - 1}, one at least, or be their number in 1-{size}")
    return list(ids)


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"draft_vocab {path}: neither a number nor a file") from None
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of ids in JSON ({error})") from None
    if not isinstance(ids, list):
        raise InputError(f"{path}: must hold a JSON list of ids")
    return ids

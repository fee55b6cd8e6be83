"""The head that a drafter guesses with: the main model's, or a smaller copy of it.

A draft need not be exact, and the whole head is a third of what an AR step reads. So it may be
quantised, and cut to the part of the vocabulary that is likely at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import InputError, UsageError
from ..model import DiffusionGemma

GROUPS = (64, 32)  # columns that share a scale: the first that divides them
ROWS = 16_384  # of the embedding, quantised at a time
BITS = (4, 8)

Vocabulary = int | Path | tuple[int, ...] | None  # ids from 0 on, a file of ids, ids, all


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
        self.size = self._vocab if ids is None else self._ids.size  # ids that can be drafted
        self._project = _projection(model, self._ids, bits)

    @property
    def nbytes(self) -> int:
        """Beside the main model's."""
        return getattr(self._project, "nbytes", 0)

    def __call__(self, hidden: mx.array) -> mx.array:
        """(L, H) -> float32 (L, V); -inf for what cannot be drafted."""
        logits = mx.tanh(self._project(hidden).astype(mx.float32) / self._cap) * self._cap
        if self._ids is None:
            return logits
        whole = mx.full((len(hidden), self._vocab), -mx.inf)
        whole[:, self._ids] = logits
        return whole


def _projection(model: DiffusionGemma, ids: mx.array | None, bits: int | None) -> Callable[[mx.array], mx.array]:
    """(L, H) -> (L, n). Rows are copied where they are not all of them, or get fewer bits than they have."""
    embedding = model.model.decoder.embed_tokens
    if bits is not None and bits < getattr(embedding, "bits", 32):
        return _Rows(_quantised(model, ids, bits), group_size=_group(model), bits=bits)
    if ids is None:
        return embedding.as_linear
    arrays = [embedding[name][ids] for name in ("weight", "scales", "biases") if embedding.get(name) is not None]
    if "scales" not in embedding:
        return _Rows(arrays)
    return _Rows(arrays, group_size=embedding.group_size, bits=embedding.bits, mode=embedding.mode)


class _Rows:
    """Rows of the embedding: a matrix in floats, or packed as `mode` says."""

    def __init__(self, arrays: Sequence[mx.array], **mode: Any):
        mx.eval(arrays)
        self._arrays, self._mode = list(arrays), mode
        self.nbytes = sum(array.nbytes for array in arrays)

    def __call__(self, hidden: mx.array) -> mx.array:
        if not self._mode:
            return hidden @ self._arrays[0].T
        return mx.quantized_matmul(hidden, *self._arrays, transpose=True, **self._mode)


def _quantised(model: DiffusionGemma, ids: mx.array | None, bits: int) -> list[mx.array]:
    """Rows of the embedding, quantised a part at a time."""
    group, embedding, parts = _group(model), model.model.decoder.embed_tokens, []
    count = model.config.vocab_size if ids is None else ids.size
    for first in range(0, count, ROWS):
        chosen = mx.arange(first, min(first + ROWS, count)) if ids is None else ids[first : first + ROWS]
        parts.append(mx.quantize(embedding(chosen).astype(model.dtype), group_size=group, bits=bits))
        mx.eval(parts[-1])
    return [mx.concatenate(pieces) for pieces in zip(*parts, strict=True)]


def _group(model: DiffusionGemma) -> int:
    try:
        return common_group([model.config.hidden_size])
    except ValueError as error:
        raise UsageError(f"draft_head_bits: {error}") from None


def common_group(widths: Iterable[int]) -> int:
    """Columns that share a scale in matrices so wide. Raises ValueError if nothing divides them all."""
    widths = sorted(widths)
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    if group is None:
        wide = ", ".join(map(str, widths))
        raise ValueError(f"matrices {wide} wide cannot be quantised in groups of {' or '.join(map(str, GROUPS))}")
    return group


def probabilities(logits: mx.array, ids: mx.array) -> mx.array:
    """Of ids (L,) under softmax(logits (L, V)): (L,), what is promised of a draft."""
    chosen = mx.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
    return mx.exp(chosen - mx.logsumexp(logits, axis=-1))


def check_bits(name: str, bits: int | None) -> None:
    """Raise UsageError for bits that nothing is quantised to here."""
    if bits is not None and (type(bits) is not int or bits not in BITS):
        raise UsageError(f"{name} must be {' or '.join(map(str, BITS))}, not {bits!r}")


def spelled(given: Any) -> Vocabulary:
    """A vocabulary as it is given, in a form that can be compared before it is checked: () for what is none."""
    if isinstance(given, bytes | bytearray | memoryview):
        return ()
    given = given.tolist() if hasattr(given, "tolist") else given  # arrays
    if isinstance(given, str | Path):
        return int(str(given)[:20]) if str(given).isdecimal() else Path(given)
    try:
        ids = tuple(given) if isinstance(given, Iterable) else (given,)
        numbers = () if bool in set(map(type, ids)) else tuple(map(index, ids))
    except TypeError:
        return None if given is None else ()
    return numbers if isinstance(given, Iterable) or not numbers else numbers[0]


def stamp(vocabulary: Vocabulary) -> Hashable:
    """What two that are the same have in common; of a file, that it was not written since."""
    if not isinstance(vocabulary, Path):
        return vocabulary
    try:
        found = vocabulary.expanduser().resolve().stat()
    except (OSError, RuntimeError, ValueError):
        return vocabulary
    return vocabulary, found.st_ino, found.st_size, found.st_mtime_ns


def read_vocabulary(vocabulary: Vocabulary, size: int) -> Sequence[int] | None:
    """The ids that can be drafted. Raises UsageError, InputError for ids that are none."""
    if vocabulary is None:
        return None
    if isinstance(vocabulary, Path):
        read = read_ids(vocabulary)
        return _checked(() if set(map(type, read)) - {int} else read, size, str(vocabulary), InputError)
    if isinstance(vocabulary, int):
        vocabulary = range(vocabulary if 0 < vocabulary <= size else 0)
    return _checked(vocabulary, size, "draft_vocab", UsageError)


def _checked(ids: Sequence[int], size: int, where: str, kind: type[InputError]) -> Sequence[int]:
    if not ids or min(ids) < 0 or max(ids) >= size:
        raise kind(f"{where}: must hold ids in 0-{size - 1}, one at least, or be their number in 1-{size}")
    return ids


def read_ids(path: Path) -> list[int]:
    """A JSON file's list. Raises UsageError if there is no such file, InputError if it holds something else."""
    try:
        ids = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"draft_vocab {path}: neither a number nor a file") from None
    except (OSError, RuntimeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a list of ids in JSON ({error})") from None
    if not isinstance(ids, list):
        raise InputError(f"{path}: must hold a JSON list of ids")
    return ids

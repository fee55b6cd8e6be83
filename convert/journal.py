"""The journal of a conversion: what it is, which tensors are finished, and what they hash to.

    {"fingerprint": {"sources": "<sha256>", "options": ..., "versions": ..., "plan": ...}}
    {"tensors": {"<name>": ["BF16", [2, 3], "<sha256>"], ...}}          a line per finished job

The file is locked by the process that writes it, and it stays in the finished checkpoint as its manifest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoint import MAX_HEADER, TensorInfo
from ..errors import InputError, UsageError
from ..version import __version__
from .shards import write_all

JOURNAL = "conversion.jsonl"
Record = list[Any]  # of a tensor: dtype, shape, sha256


def fingerprint(sources: Iterable[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversion depends on: files by size, time and content (of shards: the header), options, versions."""
    return {
        "sources": [_facts(path) for path in sources],
        "options": dict(options),
        "versions": {"mlx_dgemma": __version__, "mlx": version("mlx"), "numpy": version("numpy")},
    }


def _facts(path: Path) -> list[Any]:
    status = path.stat()
    with path.open("rb") as file:
        is_shard = path.suffix == ".safetensors"
        length = min(int.from_bytes(file.read(8), "little"), MAX_HEADER) if is_shard else -1
        content = hashlib.sha256(file.read(length))
    return [path.name, status.st_size, status.st_mtime_ns, content.hexdigest()]


class Journal:
    """An open journal. `begun` is the fingerprint of its first line, or None; `tensors` are those that are finished.

    Raises UsageError if another process holds it.
    """

    def __init__(self, path: Path):
        self._file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{path.parent}: another process is writing it; wait for it or stop it") from None
        self._file.seek(0)
        self.begun, self.tensors, whole = _parse(self._file.read())
        self._file.truncate(whole)

    def changes(self, facts: Mapping[str, Any]) -> list[str]:
        """Which parts of a fingerprint are not as they were."""
        return differing(hashes(facts), self.begun or {})

    def forget(self) -> None:
        self.begun, self.tensors = None, {}
        self._file.truncate(0)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write the fingerprint into an empty journal."""
        self.begun = hashes(facts)
        self._append({"fingerprint": self.begun})

    def add(self, tensors: Mapping[str, Record]) -> None:
        """A job is finished; its tensors must be on disk by now."""
        self._append({"tensors": dict(tensors)})
        self.tensors |= tensors

    def close(self) -> None:
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        write_all(self._file, json.dumps(line).encode() + b"\n")
        os.fsync(self._file.fileno())


def record(info: TensorInfo, sha256: str) -> Record:
    """What the journal says of a tensor."""
    return [info.dtype, list(info.shape), sha256]


def manifest(folder: Path) -> dict[str, Record]:
    """What was written into a converted checkpoint. Raises InputError if there is no journal."""
    path = folder / JOURNAL
    if not path.is_file():
        raise InputError(f"{folder}: has no {JOURNAL}; only what mlx_dgemma.convert wrote can be verified")
    return _parse(path.read_bytes())[1]


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """The parts that are not the same."""
    return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))


def hashes(facts: Mapping[str, Any]) -> dict[str, str]:
    """Of JSON, by part."""
    texts = {key: json.dumps(value, sort_keys=True) for key, value in facts.items()}
    return {key: hashlib.sha256(text.encode()).hexdigest() for key, text in texts.items()}


def _parse(data: bytes) -> tuple[dict[str, str] | None, dict[str, Record], int]:
    """The fingerprint, the tensors, and how many bytes are whole lines: what follows a torn one counts for nothing."""
    begun: dict[str, str] | None = None
    tensors: dict[str, Record] = {}
    whole = 0
    for line in data.splitlines(keepends=True):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
            if begun is None:
                begun = dict(entry["fingerprint"])
            else:
                tensors |= entry["tensors"]
        except (ValueError, KeyError, TypeError):
            break
        whole += len(line)
    return begun, tensors, whole

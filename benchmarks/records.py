"""Records of answers, and runs of them, as files hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_dgemma.drafter.training.prompts import contents
from mlx_dgemma.errors import InputError
from mlx_dgemma.files import write_whole

from .engine import Answered

SCHEMA = 1
COUNTS = ("tokens", "canvases", "denoise_forwards", "encode_forwards", "verify_passes", "drafted", "accepted")


@dataclass(frozen=True, kw_only=True)
class Record(Answered):
    """One answer: `prompt` is the number of its example in the file."""

    task: str
    prompt: int
    seed: int
    right: bool

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Record:
        """Read back. Raises TypeError or ValueError for values of a wrong kind."""
        record = cls(**value)
        whole = [getattr(record, name) for name in (*COUNTS, "prompt")]
        if any(type(number) is not int or number < 0 for number in whole) or type(record.seed) is not int:
            raise ValueError(f"prompt {record.prompt!r:.20}: a count is not a whole number")
        if type(record.right) is not bool or type(record.text) is not str or type(record.task) is not str:
            raise ValueError(f"prompt {record.prompt}: task, right or text is of a wrong kind")
        return record


@dataclass(frozen=True)
class Run:
    """Answers of one setting, a record per prompt and seed."""

    label: str
    settings: Mapping[str, Any]
    records: Sequence[Record]

    @classmethod
    def read(cls, path: Path, label: str) -> Run:
        """Raises InputError for a file that `--out` did not write."""
        with as_records(path):
            value = json.loads(contents(path))
            require_schema(value, path)
            run = cls(label, value["settings"], [Record.of(record) for record in value["records"]])
            run._require_whole(value["settings"]["examples"])
        return run

    def _require_whole(self, examples: Mapping[str, Any]) -> None:
        """Raise ValueError, TypeError or KeyError for a prompt that does not have all seeds once."""
        count, pairs = len({r.prompt for r in self.records}), {(r.prompt, r.seed) for r in self.records}
        if not count:
            raise ValueError("it holds no answer")
        is_whole = len(pairs) == len(self.records) == count * len(self.seeds) and count == examples["count"]
        if not is_whole or not isinstance(examples["sha256"], str):
            raise ValueError("it does not have every prompt with every seed once")

    def write(self, path: Path) -> None:
        value = {"schema": SCHEMA, "settings": self.settings, "records": [asdict(record) for record in self.records]}
        write_whole(path, json.dumps(value, indent=1) + "\n")

    @property
    def seeds(self) -> list[int]:
        return sorted({record.seed for record in self.records})

    @property
    def tasks(self) -> list[tuple[str | None, Run]]:
        """Task by task, and all of them if there are several, under None: any text may be a task's name."""
        names = list(dict.fromkeys(record.task for record in self.records))
        parts = [(name, [record for record in self.records if record.task == name]) for name in names]
        if len(names) > 1:
            parts.append((None, list(self.records)))
        return [(name, Run(self.label, self.settings, records)) for name, records in parts]

    @property
    def rights(self) -> np.ndarray:
        """(prompts, seeds), in ascending order of both."""
        ordered = sorted(self.records, key=lambda record: (record.prompt, record.seed))
        return np.array([record.right for record in ordered]).reshape(-1, len(self.seeds))

    def total(self, *names: str) -> int:
        return sum(getattr(record, name) for record in self.records for name in names)

    def steps_a_canvas(self) -> str:
        canvases = self.total("canvases")
        return f"{self.total('denoise_forwards') / canvases:.2f}" if canvases else "-"

    def forwards_a_token(self) -> str:
        return f"{self.total('denoise_forwards', 'encode_forwards') / max(1, self.total('tokens')):.3f}"

    def accepted_a_pass(self) -> str:
        passes = self.total("verify_passes")
        return f"{self.total('accepted') / passes:.2f}" if passes else "-"


@contextmanager
def as_records(path: Path) -> Iterator[None]:
    """What comes of values that no record has is an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise InputError(f"{path}: not a file of records ({what}); give one that --out wrote") from None


def require_schema(value: Mapping[str, Any], path: Path) -> None:
    if value["schema"] != SCHEMA:
        raise InputError(f"{path}: records of schema {value['schema']!r:.80}, not {SCHEMA}; record them again")


def require_comparable(run: Mapping[str, Any], other: Mapping[str, Any], path: Path) -> None:
    """Raise InputError if two settings' prompts or judges differ."""
    if run["examples"]["sha256"] != other["examples"]["sha256"]:
        raise InputError(
            f"{path}: has answers to other prompts; use the same --prompts, --task and --count (it has "
            f"{other['examples'].get('count')} prompts of {other['examples'].get('file')})"
        )
    if run.get("checkers") != other.get("checkers"):
        raise InputError(f"{path}: was judged with --checker {other.get('checkers')}, this with {run.get('checkers')}")

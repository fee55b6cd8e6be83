"""A bundle: one recorded run of the reference, as a folder.

    bundle.json         what was run, with what, and the reference's own error in every quantity
    bundle.safetensors  inputs, truth in float64, draws, decisions
    model/              the checkpoint, if it is a tiny one

A quantity is named `<pass>/<what>`: the passes are `encode.<canvas>` and `denoise.<canvas>.<step>`,
and `steps/<what>` holds all denoising steps of all canvases in order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..config import GenerationConfig, read_json
from ..errors import InputError

SCHEMA = 1
SHIPPED = Path(__file__).parent / "bundles"  # recorded once, replayed anywhere
EPSILON = 2.0**-23  # of float32: no error below this share of a quantity's size is held against anyone
DETAILED = ((0, 0), (0, 1), (1, 0))  # (canvas, step) of the denoising passes whose layers are kept
STEP = ("canvas", "token", "renoise", "accepted", "best", "ran", "done")
MAX_COLUMNS = 4096  # ids whose logits are kept


@dataclass(frozen=True)
class Error:
    """How far an array is from the truth: the worst entry and the root mean square."""

    max: float
    rms: float

    @classmethod
    def between(cls, got: np.ndarray, truth: np.ndarray) -> Error:
        difference = np.abs(np.asarray(got, np.float64) - truth)
        return cls(float(difference.max()), float(np.sqrt(np.mean(difference**2))))


@dataclass(frozen=True)
class Bundle:
    folder: Path
    facts: dict[str, Any]  # bundle.json
    arrays: dict[str, np.ndarray]  # bundle.safetensors

    @property
    def sampling(self) -> GenerationConfig:
        options = self.facts["sampling"]
        return GenerationConfig(**options | {"eos_token_ids": tuple(options["eos_token_ids"])})

    def steps(self) -> Iterator[list[dict[str, np.ndarray]]]:
        """Per canvas its denoising steps: canvas, token, renoise, accepted, best (B, C); ran, done (B,)."""
        first = 0
        for count in self.facts["canvases"]:
            numbers = range(first, first + count)
            yield [{name: self.arrays[f"steps/{name}"][number] for name in STEP} for number in numbers]
            first += count

    def blocks(self) -> Iterator[np.ndarray]:
        """The ids (B, L) that are encoded before each canvas."""
        length = self.arrays["steps/canvas"].shape[-1]
        return blocks(self.arrays["prompt"], self.arrays["sequences"], length, len(self.facts["canvases"]))

    def floor(self, quantity: str) -> Error:
        """The error that float32 is allowed to have: the reference's own, but at least one rounding."""
        return self._at_least_one_rounding(quantity, self.own(quantity))

    def floor_of_one_run(self, quantity: str) -> Error:
        """The same from the recorded run alone, without its neighbours: a stricter, luckier measure."""
        return self._at_least_one_rounding(quantity, Error(**self.facts["floors"][quantity]["one_run"]))

    def own(self, quantity: str) -> Error:
        """The error of the reference in float32, the largest of several runs."""
        own = self.facts["floors"][quantity]
        return Error(own["max"], own["rms"])

    def _at_least_one_rounding(self, quantity: str, error: Error) -> Error:
        rounding = EPSILON * self.facts["floors"][quantity]["scale"]
        return Error(max(error.max, rounding), max(error.rms, rounding))


def blocks(prompt: np.ndarray, sequences: np.ndarray, length: int, canvases: int) -> Iterator[np.ndarray]:
    """The prompt, then every canvas of `sequences` (B, prompt + canvases * length) but the last."""
    yield prompt
    for index in range(canvases - 1):
        first = prompt.shape[1] + index * length
        yield sequences[:, first : first + length]


def kept_rows(length: int) -> list[int]:
    """Positions of a pass that are kept: the first two, which see least, and the last four."""
    return sorted({*range(min(2, length)), *range(max(0, length - 4), length)})


def is_judged(name: str) -> bool:
    """Whether an array is a quantity with an error, not a choice, a margin or an input."""
    what = name.partition("/")[2].partition(".")[0]
    return what in ("layer", "norm", "logits", "soft", "entropy", "peak")


def column_step(vocab_size: int) -> int:
    """Every how-many-th id of the vocabulary has its logits kept."""
    return -(-vocab_size // MAX_COLUMNS)


def write(folder: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Put a bundle into an existing folder."""
    data = folder / "bundle.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, data)
    facts = {"schema": SCHEMA, **facts, "sha256": file_hash(data)}
    (folder / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Bundle:
    """Read a bundle. Raises InputError if it is damaged or of another schema."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a bundle is what `parity record --out` wrote")
    facts = read_json(folder / "bundle.json")
    if facts.get("schema") != SCHEMA:
        raise InputError(f"{folder}: schema {facts.get('schema')}, this version reads {SCHEMA}; record it again")
    data = folder / "bundle.safetensors"
    if not data.is_file():
        raise InputError(f"{data}: no such file; record the bundle again")
    if file_hash(data) != facts.get("sha256"):
        raise InputError(f"{data}: is not what was recorded (sha256 differs); record the bundle again")
    try:
        return Bundle(folder, facts, load_file(data))
    except SafetensorError as error:
        raise InputError(f"{data}: cannot be read ({error}); record the bundle again") from None


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoint_hash(folder: Path) -> str:
    """One hash of all weight files of a checkpoint. Raises InputError if there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder}: no .safetensors file; give a checkpoint folder")
    return hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()

"""A bundle: one recorded run of the reference, as a folder.

    bundle.json         what was run, with what, and the reference's own error in every quantity
    bundle.safetensors  inputs, truth in float64, draws, decisions
    model/              the checkpoint, if it is a tiny one

A quantity is named `<pass>/<what>`, the passes in the order they are run:

    encode.<canvas>, denoise.<canvas>.<step>   as `generate` runs them; `steps/<what>` holds all steps in order
    ar       the causal pass over the whole text, prompt and canvases, from scratch
    verify   behind the first row of that text but its last token: [last, d1 .. dk], the first drafts right
    after    the main model's own token behind the drafts that were accepted, the others rolled back
    behind   the first canvas again, behind all that

Of logits there are `logits`, fixed columns at a few rows; `top`, those of the likeliest ids, and
`logsumexp`, at up to 64 rows.

The bundles in `bundles` were written by transformers 5.23.0, `window_5.17` by 5.17.0:

    python -m mlx_dgemma.parity record --model tiny:<name> --out bundles/<name>
    python -m mlx_dgemma.parity record --model nano --prompt "$P" --dtype <dtype> --out bundles/nano...
    P=$(printf '<bos><|turn>user\\ncount 12 to 90<turn|>\\n<|turn>model\\n'; seq -s ' ' 12 39)
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

from ..config import GenerationConfig, ModelConfig, read_json
from ..errors import InputError

SCHEMA = 2
SHIPPED = Path(__file__).parent / "bundles"  # recorded once, replayed anywhere
# one rounding: no error below this share of a quantity's size is held against anyone
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8}
DETAILED = ((0, 0), (0, 1), (1, 0))  # (canvas, step) of the denoising passes whose layers are kept
STEP = ("canvas", "token", "renoise", "accepted", "best", "ran", "done")
WHOLE_VOCABULARY = 4096  # up to this size the logits of all ids are kept
COLUMNS = 1024  # beyond it, those of so many fixed ids
TOP = 64  # likeliest ids whose logits are kept beside them
SPREAD = 64  # rows at which they are
ROWS_AT_ONCE = 64  # positions whose whole logits are looked at together
JUDGED = ("layer", "norm", "logits", "top", "logsumexp", "soft", "entropy", "peak")
FACTS = ("model", "checkpoint", "device", "dtype", "config", "sampling", "canvases", "columns", "agreement", "floors")
ARRAYS = (
    *("prompt", "sequences", "steps/gap", "steps/slack", "ar/best", "ar/gap"),
    *("verify/block", "verify/best", "verify/gap", "verify/accepted"),
)


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
        try:
            return GenerationConfig(**options | {"eos_token_ids": tuple(options["eos_token_ids"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.folder / 'bundle.json'}: sampling: {error}; record the bundle again") from None

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

    @property
    def is_float32(self) -> bool:
        """Whether the reference's error was measured in float32; otherwise in bfloat16."""
        return self.facts.get("dtype") != "bfloat16"

    @property
    def columns(self) -> np.ndarray:
        """The ids whose logits are kept."""
        text = self.facts["config"]["text_config"]
        return columns(self.facts["columns"], text.get("vocab_size", ModelConfig.vocab_size))

    def floor(self, quantity: str) -> Error:
        """The error that this dtype is allowed to have: the reference's own, but at least a rounding."""
        return self._at_least_one_rounding(quantity, self.own(quantity))

    def floor_of_one_run(self, quantity: str) -> Error:
        """The same from the recorded run alone, without its neighbours: a stricter, luckier measure."""
        return self._at_least_one_rounding(quantity, Error(**self.facts["floors"][quantity]["one_run"]))

    def own(self, quantity: str) -> Error:
        """The error of the reference, the largest of several runs: weights a rounding apart, another attention
        kernel, another device.
        """
        own = self.facts["floors"][quantity]
        return Error(own["max"], own["rms"])

    def noise(self, quantity: str) -> Error | None:
        """By how much the reference differs from itself: eager from sdpa, a CPU from a GPU; the larger one."""
        noise = self.facts["floors"][quantity].get("noise", {}).values()
        return Error(*(max(entry[key] for entry in noise) for key in ("max", "rms"))) if noise else None

    def _at_least_one_rounding(self, quantity: str, error: Error) -> Error:
        largest = typical = self.facts["floors"][quantity]["scale"]
        if not self.is_float32:  # judged by its root mean square alone, a rounding is one of a typical entry
            typical = float(np.sqrt(np.mean(self.arrays[quantity] ** 2)))
        one = EPSILON["float32" if self.is_float32 else "bfloat16"]
        return Error(max(error.max, one * largest), max(error.rms, one * typical))


def blocks(prompt: np.ndarray, sequences: np.ndarray, length: int, canvases: int) -> Iterator[np.ndarray]:
    """The prompt, then every canvas of `sequences` (B, prompt + canvases * length) but the last."""
    yield prompt
    for index in range(canvases - 1):
        first = prompt.shape[1] + index * length
        yield sequences[:, first : first + length]


def kept_rows(length: int) -> list[int]:
    """Positions of a pass that are kept: the first two, which see least, and the last four."""
    return sorted({*range(min(2, length)), *range(max(0, length - 4), length)})


def spread_rows(length: int) -> list[int]:
    """Up to `SPREAD` positions of a pass, evenly from the first to the last."""
    count = min(length, SPREAD)
    return [index * (length - 1) // max(1, count - 1) for index in range(count)]


def tiles(length: int) -> list[list[int]]:
    """The positions of a pass, as many at once as may be."""
    return [list(range(first, min(length, first + ROWS_AT_ONCE))) for first in range(0, length, ROWS_AT_ONCE)]


def is_judged(name: str) -> bool:
    """Whether an array is a quantity with an error, not a choice, a margin or an input."""
    return name.partition("/")[2].partition(".")[0] in JUDGED


def column_count(vocab_size: int) -> int:
    """How many ids have their logits kept."""
    return vocab_size if vocab_size <= WHOLE_VOCABULARY else COLUMNS


def columns(count: int, vocab_size: int) -> np.ndarray:
    """`count` ids, evenly over the vocabulary."""
    return np.arange(count) * vocab_size // count


def write(folder: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Put a bundle into an existing folder."""
    data = folder / "bundle.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, data)
    facts = {"schema": SCHEMA, **facts, "sha256": file_hash(data)}
    facts["facts_sha256"] = facts_hash(facts)
    (folder / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Bundle:
    """Read a bundle. Raises InputError if it is damaged or of another schema."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; a bundle is what `parity record --out` wrote")
    facts = read_json(folder / "bundle.json")
    if facts.get("schema") != SCHEMA:
        raise InputError(f"{folder}: schema {facts.get('schema')}, this version reads {SCHEMA}; record it again")
    for name in FACTS:
        if name not in facts:
            raise InputError(f"{folder / 'bundle.json'}: has no {name!r}; record the bundle again")
    if facts_hash(facts) != facts.get("facts_sha256"):
        raise InputError(
            f"{folder / 'bundle.json'}: is not what was recorded (sha256 differs); record the bundle again"
        )
    data = folder / "bundle.safetensors"
    if not data.is_file():
        raise InputError(f"{data}: no such file; record the bundle again")
    if file_hash(data) != facts.get("sha256"):
        raise InputError(f"{data}: is not what was recorded (sha256 differs); record the bundle again")
    try:
        bundle = Bundle(folder, facts, load_file(data))
    except SafetensorError as error:
        raise InputError(f"{data}: cannot be read ({error}); record the bundle again") from None
    for name in _needed(facts):
        if name not in bundle.arrays:
            raise InputError(f"{data}: has no tensor {name!r}; record the bundle again")
    for name in bundle.arrays:
        if is_judged(name) and name not in facts["floors"]:
            raise InputError(f"{folder / 'bundle.json'}: has no error of {name!r}; record the bundle again")
    return bundle


def _needed(facts: dict[str, Any]) -> Iterator[str]:
    """The arrays that a bundle with these facts has; of every layer that has been kept, also its router's."""
    yield from (*ARRAYS, *(f"steps/{name}" for name in STEP))
    for name in facts["floors"]:
        yield name
        if name.endswith("/top"):
            yield f"{name}_ids"
        if "/layer." in name:
            yield name.replace("/layer.", "/router.")
            yield name.replace("/layer.", "/margin.")


def facts_hash(facts: dict[str, Any]) -> str:
    """Of all but itself."""
    rest = {name: value for name, value in facts.items() if name != "facts_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


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

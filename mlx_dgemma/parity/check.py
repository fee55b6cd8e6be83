"""Judge a replay: is this package as near to the truth as the reference in float32 is?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..loading import NANO, load_model, resolve
from ..model import DiffusionGemma
from . import replay
from .bundle import Bundle, Error, checkpoint_hash, read

MAX_RATIO = 4.0  # a port that is right measures 1 to 2
ROUTER_TIE = 1e-4  # experts whose shares differ by less may swap
MAX_TIES = 0.02  # the share of decisions that may be excused as near-ties


@dataclass(frozen=True)
class Measure:
    """A quantity: our error, the reference's own, and the ratio to what is allowed to float32."""

    name: str
    got: Error
    own: Error
    ratio: float

    @property
    def passed(self) -> bool:
        return self.ratio <= MAX_RATIO  # False for nan


@dataclass(frozen=True)
class Count:
    """Decisions: how many differ where they must not, how many are too near to call, of how many."""

    name: str
    wrong: int
    ties: int
    total: int

    @property
    def passed(self) -> bool:
        return self.wrong == 0 and self.ties <= MAX_TIES * self.total


@dataclass
class Report:
    name: str
    measures: list[Measure] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in [*self.measures, *self.counts])

    @property
    def first_failure(self) -> str | None:
        """The quantity, in the order they are computed, or else the decision where the two part."""
        return next((entry.name for entry in [*self.measures, *self.counts] if not entry.passed), None)

    @property
    def worst_ratio(self) -> float:
        return max(measure.ratio for measure in self.measures)

    def table(self) -> str:
        head = f"{'quantity':24} {'worst':>9} {'rms':>9}   {'ref worst':>9} {'ref rms':>9}   {'ratio':>7}"
        lines = [f"{self.name}", head]
        for name, measure in _folded(self.measures):
            errors = (measure.got.max, measure.got.rms, measure.own.max, measure.own.rms)
            got, own = ("{:9.2e} {:9.2e}".format(*pair) for pair in (errors[:2], errors[2:]))
            lines.append(f"{name:24} {got}   {own}   {measure.ratio:7.2f}  {_verdict(measure.passed)}")
        lines.append(f"{'decisions':24} {'wrong':>9} {'near-ties':>9}   {'of':>9}")
        for count in self.counts:
            lines.append(
                f"{count.name:24} {count.wrong:9} {count.ties:9}   {count.total:9} {'':20} {_verdict(count.passed)}"
            )
        if self.passed:
            lines.append(f"passed: the worst ratio is {self.worst_ratio:.2f}, {MAX_RATIO:g} are allowed")
        else:
            lines.append(f"FAILED: first at {self.first_failure}")
        return "\n".join(lines)


def _verdict(passed: bool) -> str:
    return "ok" if passed else "FAILED"


def _folded(measures: list[Measure]) -> Iterator[tuple[str, Measure]]:
    """The layers of a pass in one line, by their worst; the rest as it is."""
    groups: dict[str, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(measure.name.partition("/layer.")[0], []).append(measure)
    for group in groups.values():
        worst = max(group, key=lambda measure: measure.ratio if measure.ratio == measure.ratio else np.inf)
        yield (group[0].name if len(group) == 1 else f"{worst.name} (of {len(group)})"), worst


def check(folder: Path, model: str | None = None) -> Report:
    """Replay the bundle in `folder` on MLX's default device.

    Args:
        model: where its checkpoint is, if that is neither in the bundle nor embedded here.

    Raises:
        InputError: the bundle is damaged, or the checkpoint is missing or another one.
    """
    bundle = read(folder)
    checkpoint = _checkpoint(bundle, model)
    return judge(bundle, load_model(checkpoint, dtype=mx.float32))


def _checkpoint(bundle: Bundle, model: str | None) -> Path:
    inside = bundle.folder / "model"
    name = bundle.facts["model"]
    if model is None and not inside.is_dir() and name != NANO:
        raise InputError(f"{bundle.folder}: was recorded from {name}, which is not here; say where with --model")
    folder = inside if model is None and inside.is_dir() else resolve(model or name)
    if checkpoint_hash(folder) != bundle.facts["checkpoint"]:
        raise InputError(f"{folder}: has other weights than {bundle.folder} was recorded from; give those with --model")
    return folder


def judge(bundle: Bundle, model: DiffusionGemma) -> Report:
    """Levels 2, 3 and 4 of a bundle."""
    report = Report(f"{bundle.folder.name}: {bundle.facts['model']}, recorded on {bundle.facts['device']}")
    got = replay.walk(model, bundle)
    report.measures = measures(bundle, got)
    report.counts = [*_routers(bundle, got), *_decisions(bundle, got)]
    for row in range(len(bundle.arrays["prompt"])):
        report.counts += _trajectory(bundle, row, *replay.free_run(model, bundle, row))
    if len(bundle.arrays["prompt"]) > 1:
        report.counts += _together(bundle, *replay.free_run_together(model, bundle))
    return report


def measures(bundle: Bundle, got: dict[str, np.ndarray]) -> list[Measure]:
    """Level 2: every quantity of a walk against the truth, in the order they are computed."""
    return [_measure(bundle, name, got[name]) for name in bundle.facts["floors"]]


def _measure(bundle: Bundle, name: str, got: np.ndarray) -> Measure:
    truth = bundle.arrays[name]
    if name.startswith("steps/"):
        got, truth = got[bundle.arrays["steps/ran"]], truth[bundle.arrays["steps/ran"]]
    error, floor = Error.between(got, truth), bundle.floor(name)
    return Measure(name, error, bundle.own(name), max(error.max / floor.max, error.rms / floor.rms))


def _routers(bundle: Bundle, got: dict[str, np.ndarray]) -> Iterator[Count]:
    """The experts of every kept token, as sets, pass by pass."""
    names = [name for name in bundle.arrays if "/router." in name]
    for prefix in dict.fromkeys(name.partition(".")[0] for name in names):
        wrong = ties = total = 0
        for name in (name for name in names if name.startswith(prefix)):
            differs = (got[name] != bundle.arrays[name]).any(axis=-1)
            near = bundle.arrays[name.replace("router", "margin")] < ROUTER_TIE
            wrong, ties, total = (
                wrong + int((differs & ~near).sum()),
                ties + int((differs & near).sum()),
                total + differs.size,
            )
        yield Count(f"{prefix}: experts", wrong, ties, total)


def _decisions(bundle: Bundle, got: dict[str, np.ndarray]) -> Iterator[Count]:
    """argmax, acceptance, the next canvas and the stop rule, at every step, from the recorded canvas."""
    arrays, ran = bundle.arrays, bundle.arrays["steps/ran"]
    width = arrays["steps/canvas"].shape[-1]
    of_peak, of_entropy = (MAX_RATIO * bundle.floor(f"steps/{name}").max for name in ("peak", "entropy"))
    near = {
        "best": arrays["steps/gap"] < 2 * of_peak,
        "accepted": arrays["steps/slack"] < width * of_entropy,
    }
    for name, ties in near.items():
        yield _count(name, got[f"steps/{name}"] != arrays[f"steps/{name}"], ties, ran)
    follows = np.diff(np.repeat(np.arange(len(bundle.facts["canvases"])), bundle.facts["canvases"])) == 0
    wrong = (got["steps/next"][:-1] != arrays["steps/canvas"][1:])[follows]
    yield _count("next canvas", wrong, near["accepted"][:-1][follows], ran[1:][follows])
    mean = arrays["steps/entropy"].mean(axis=-1)
    close = abs(mean - bundle.sampling.confidence_threshold) < of_entropy
    yield _count("stop", got["steps/done"] != arrays["steps/done"], close, ran)


def _count(name: str, differs: np.ndarray, near: np.ndarray, ran: np.ndarray) -> Count:
    differs, near = differs[ran], near[ran]
    return Count(f"steps: {name}", int((differs & ~near).sum()), int((differs & near).sum()), differs.size)


def _trajectory(
    bundle: Bundle, row: int, tokens: list[int], canvases: list[np.ndarray], counts: list[int]
) -> Iterator[Count]:
    """A row decoded freely must give the recorded canvases, steps and text."""
    recorded = [steps[-1]["best"][row] for steps in bundle.steps()]
    passes = [sum(int(step["ran"][row]) for step in steps) for steps in bundle.steps()]
    expected = _until_eos(bundle.arrays["sequences"][row, bundle.arrays["prompt"].shape[1] :], bundle)
    wrong = sum(int((a != b).sum()) for a, b in zip(canvases, recorded, strict=False))
    wrong += sum(a != b for a, b in zip(counts, passes, strict=False)) + (tokens != expected)
    yield Count(f"row {row} on its own", wrong, 0, sum(len(canvas) for canvas in canvases))


def _until_eos(ids: np.ndarray, bundle: Bundle) -> list[int]:
    ends = np.flatnonzero(np.isin(ids, bundle.sampling.eos_token_ids))
    return ids[: ends[0] + 1 if len(ends) else None].tolist()


def _together(bundle: Bundle, canvases: list[np.ndarray], counts: list[list[int]]) -> Iterator[Count]:
    recorded = [steps[-1]["best"] for steps in bundle.steps()]
    passes = [np.sum([step["ran"] for step in steps], axis=0) for steps in bundle.steps()]
    wrong = sum(int((a != b).sum()) for a, b in zip(canvases, recorded, strict=True))
    wrong += sum(int((a != b).sum()) for a, b in zip(counts, passes, strict=True))
    yield Count("rows together", wrong, 0, sum(canvas.size for canvas in canvases))

"""Judge a replay: is this package as near to the truth as the reference is, in the same dtype?

In float32 every quantity is judged by its worst error and by its root mean square, and every
decision must be the reference's. In bfloat16 the root mean square alone is judged, and decisions may
differ 4 times as often as the reference's own do from those in float64; what has no such measure (where
a canvas stops, whole texts) is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import ModelConfig
from ..errors import InputError
from ..loading import NANO, load_model, resolve
from ..model import DiffusionGemma
from . import replay
from .bundle import Bundle, Error, checkpoint_hash, read

MAX_RATIO = 4.0  # a port that is right measures 1 to 2
ROUTER_TIE = 1e-4  # experts whose shares differ by less may swap
MAX_TIES = 0.02  # the share of decisions that may be excused as near-ties
OWN_AGREEMENT = {  # decisions -> how often the reference takes them as float64 does, in bundle.json
    "steps: best": "best",
    "steps: accepted": "accepted",
    "ar: next token": "next token",
    "verify: drafts": "drafts",
}
NO_SIZES = ("quantization", "pad_token_id", "bos_token_id", "eos_token_ids", "image_token_ids")


@dataclass(frozen=True)
class Measure:
    """A quantity: our error, the reference's own, and the ratio to what the dtype is allowed.

    Attributes:
        noise: by how much the reference differs from itself, with another attention kernel or device.
        limit: of the ratio; None: MAX_RATIO.
    """

    name: str
    got: Error
    own: Error
    ratio: float
    noise: Error | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool:
        return self.ratio <= limit_of(self.limit)  # False for nan


def limit_of(max_ratio: float | None) -> float:
    return MAX_RATIO if max_ratio is None else max_ratio


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


@dataclass(frozen=True)
class Agreement:
    """Decisions in bfloat16: how many are the reference's.

    Attributes:
        own: the share that the reference takes as float64 does; None: not known, and not judged.
    """

    name: str
    same: int
    total: int
    own: float | None = None

    @property
    def passed(self) -> bool:
        if self.own is None:
            return True
        return self.total - self.same <= (MAX_RATIO * (1 - self.own) + MAX_TIES) * self.total


@dataclass
class Report:
    """Attributes:
    recorded, replayed: dtypes.
    """

    name: str
    measures: list[Measure] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)
    max_ratio: float | None = None
    recorded: str = ""
    replayed: str = ""

    @property
    def passed(self) -> bool:
        return all(entry.passed for entry in [*self.measures, *self.counts, *self.agreements])

    @property
    def first_failure(self) -> str | None:
        """The quantity, in the order they are computed, or else the decision where the two part.

        What comes after the round of verification follows from its decisions, and is named after them.
        """
        entries = [*self.measures, *self.counts, *self.agreements]
        entries = sorted(entries, key=lambda entry: entry.name.startswith(("after", "behind")))
        return next((entry.name for entry in entries if not entry.passed), None)

    @property
    def worst_ratio(self) -> float:
        """nan, if there is one."""
        return float(np.max([measure.ratio for measure in self.measures]))

    def table(self) -> str:
        lines = [self.name, *self._measured(), *self._decided()]
        if self.passed:
            lines.append(f"passed: the worst ratio is {self.worst_ratio:.2f}, {limit_of(self.max_ratio):g} are allowed")
        else:
            lines.append(f"FAILED: first at {self.first_failure}")
        return "\n".join(lines)

    def _measured(self) -> Iterator[str]:
        yield (
            f"{'quantity':26} {'worst':>9} {'rms':>9}   {'ref worst':>9} {'ref rms':>9} {'ref noise':>9}   {'ratio':>7}"
        )
        for name, measure in _folded(self.measures):
            errors = (measure.got.max, measure.got.rms, measure.own.max, measure.own.rms)
            got, own = ("{:9.2e} {:9.2e}".format(*pair) for pair in (errors[:2], errors[2:]))
            noise = f"{measure.noise.rms:9.2e}" if measure.noise else f"{'-':>9}"
            yield f"{name:26} {got}   {own} {noise}   {measure.ratio:7.2f}  {_verdict(measure.passed)}"

    def _decided(self) -> Iterator[str]:
        if self.counts:
            yield f"{'decisions':26} {'wrong':>9} {'near-ties':>9}   {'of':>9}"
        for count in self.counts:
            yield f"{count.name:26} {count.wrong:9} {count.ties:9}   {count.total:9} {'':30} {_verdict(count.passed)}"
        yield from agreement_lines(self.agreements)


def agreement_lines(agreements: list[Agreement]) -> Iterator[str]:
    """A table of shares, the reference's own beside them where they are known."""
    if agreements:
        yield f"{'decisions':26} {'same':>9} {'of':>9}   {'share':>9} {'ref share':>9}"
    for entry in agreements:
        own, verdict = ("-", "") if entry.own is None else (f"{entry.own:.4f}", f"{'':18} {_verdict(entry.passed)}")
        share = entry.same / max(1, entry.total)
        yield f"{entry.name:26} {entry.same:9} {entry.total:9}   {share:9.4f} {own:>9} {verdict}".rstrip()


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


def check(folder: Path, model: str | None = None, max_ratio: float | None = None) -> Report:
    """Replay the bundle in `folder` on MLX's default device.

    Args:
        model: where its checkpoint is, if that is neither in the bundle nor embedded here.
        max_ratio: by default MAX_RATIO; more is for devices that are known to round worse.

    Raises:
        InputError: the bundle is damaged, or the checkpoint is missing or another one.
    """
    bundle = read(folder)
    checkpoint = _checkpoint(bundle, model)
    return judge(bundle, load_model(checkpoint, dtype=replay_dtype(bundle)), max_ratio)


def replay_dtype(bundle: Bundle) -> mx.Dtype:
    """That of the bundle, but float32 on a CPU, where MLX has no product of experts in bfloat16."""
    return mx.float32 if bundle.is_float32 or mx.default_device() == mx.cpu else mx.bfloat16


def _checkpoint(bundle: Bundle, model: str | None) -> Path:
    inside = bundle.folder / "model"
    name = bundle.facts["model"]
    if model is None and not inside.is_dir() and name != NANO:
        raise InputError(f"{bundle.folder}: was recorded from {name}, which is not here; say where with --model")
    folder = inside if model is None and inside.is_dir() else resolve(model or name)
    require_same_sizes(bundle, folder)
    if checkpoint_hash(folder) != bundle.facts["checkpoint"]:
        raise InputError(f"{folder}: has other weights than {bundle.folder} was recorded from; give those with --model")
    return folder


def require_same_sizes(bundle: Bundle, folder: Path) -> None:
    """Raise InputError, naming the first difference, for a checkpoint of another architecture."""
    theirs = ModelConfig.from_dict(bundle.facts["config"], str(bundle.folder / "bundle.json"))
    ours = ModelConfig.read(folder)
    for name, recorded in vars(theirs).items():
        if name in NO_SIZES or (own := getattr(ours, name)) == recorded:
            continue
        if name == "layers" and len(recorded) != len(own):
            name, recorded, own = "number of layers", len(recorded), len(own)
        elif name == "layers":
            number = next(i for i, pair in enumerate(zip(own, recorded, strict=True)) if pair[0] != pair[1])
            name, recorded, own = f"layer {number}", recorded[number], own[number]
        raise InputError(
            f"{folder}: another config than {bundle.folder} was recorded from ({name}: {own}, not {recorded}); "
            "give the model of the bundle, or a quantised one of its sizes, with --model"
        )


def judge(bundle: Bundle, model: DiffusionGemma, max_ratio: float | None = None) -> Report:
    """Levels 2, 3 and 4 of a bundle."""
    facts, dtype = bundle.facts, str(model.dtype).removeprefix("mlx.core.")
    recorded = f"recorded in {facts['dtype']} on {facts['device']}"
    title = f"{bundle.folder.name}: {facts['model']}, {recorded}, replayed in {dtype} on {_device()}"
    report = Report(title, max_ratio=max_ratio, recorded=facts["dtype"], replayed=dtype)
    got = replay.walk(model, bundle)
    report.measures, limit = measures(bundle, got, max_ratio), limit_of(max_ratio)
    counts = [*_routers(bundle, got), *_decisions(bundle, got, limit), *_next_tokens(bundle, got, limit)]
    for row in range(len(bundle.arrays["prompt"])):
        counts += _trajectory(bundle, row, *replay.free_run(model, bundle, row))
    if len(bundle.arrays["prompt"]) > 1:
        counts += _together(bundle, *replay.free_run_together(model, bundle))
    if bundle.is_float32:
        report.counts = counts
    else:
        report.agreements = [_agreement(bundle, count) for count in counts]
    return report


def _device() -> str:
    return "gpu" if mx.default_device() == mx.gpu else "cpu"


def _agreement(bundle: Bundle, count: Count) -> Agreement:
    kind = "experts" if count.name.endswith(": experts") else OWN_AGREEMENT.get(count.name)
    own = None if kind is None else np.divide(*bundle.facts["agreement"][kind])
    return Agreement(count.name, count.total - min(count.total, count.wrong + count.ties), count.total, own)


def measures(bundle: Bundle, got: dict[str, np.ndarray], max_ratio: float | None = None) -> list[Measure]:
    """Level 2: every quantity of a walk against the truth, in the order they are computed."""
    return [_measure(bundle, name, got[name], max_ratio) for name in bundle.facts["floors"]]


def _measure(bundle: Bundle, name: str, got: np.ndarray, max_ratio: float | None) -> Measure:
    truth = bundle.arrays[name]
    if name.startswith("steps/"):
        got, truth = got[bundle.arrays["steps/ran"]], truth[bundle.arrays["steps/ran"]]
    if got.shape != truth.shape:
        raise InputError(f"{bundle.folder}: {name} is {truth.shape}, here it is {got.shape}; record the bundle again")
    error, floor = Error.between(got, truth), bundle.floor(name)
    ratio = error.rms / floor.rms
    if bundle.is_float32:
        ratio = max(error.max / floor.max, ratio)
    return Measure(name, error, bundle.own(name), ratio, bundle.noise(name), max_ratio)


def _routers(bundle: Bundle, got: dict[str, np.ndarray]) -> Iterator[Count]:
    """The experts of every kept token, as sets, pass by pass."""
    names = [name for name in bundle.arrays if "/router." in name]
    for prefix in dict.fromkeys(_kind(name) for name in bundle.facts["floors"] if not name.startswith("steps/")):
        wrong = ties = total = 0
        for name in (name for name in names if _kind(name) == prefix):
            differs = (got[name] != bundle.arrays[name]).any(axis=-1)
            near = bundle.arrays[name.replace("router", "margin")] < ROUTER_TIE
            wrong, ties, total = (
                wrong + int((differs & ~near).sum()),
                ties + int((differs & near).sum()),
                total + differs.size,
            )
        yield Count(f"{prefix}: experts", wrong, ties, total)


def _kind(name: str) -> str:
    """Of the pass that a quantity belongs to: encode, denoise, ar, ..."""
    return name.partition("/")[0].partition(".")[0]


def _decisions(bundle: Bundle, got: dict[str, np.ndarray], limit: float) -> Iterator[Count]:
    """argmax, acceptance, the next canvas and the stop rule, at every step, from the recorded canvas."""
    arrays, ran = bundle.arrays, bundle.arrays["steps/ran"]
    width = arrays["steps/canvas"].shape[-1]
    of_peak, of_entropy = (limit * bundle.floor(f"steps/{name}").max for name in ("peak", "entropy"))
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


def _next_tokens(bundle: Bundle, got: dict[str, np.ndarray], limit: float) -> Iterator[Count]:
    """The likeliest token behind every position of the text, and the round of verification."""
    arrays = bundle.arrays
    for name, label in (("ar", "ar: next token"), ("verify", "verify: drafts")):
        differs = got[f"{name}/best"] != arrays[f"{name}/best"]
        near = arrays[f"{name}/gap"] < 2 * limit * bundle.floor(f"{name}/top").max
        yield Count(label, int((differs & ~near).sum()), int((differs & near).sum()), differs.size)
    accepted = int(arrays["verify/accepted"][0])
    right = [*arrays["verify/block"][1 : 1 + accepted].tolist(), int(arrays["verify/best"][0, accepted])]
    emitted = got["verify/emitted"].tolist()
    yield Count("verify: accepted", int(len(emitted) != len(right)), 0, 1)
    wrong = sum(a != b for a, b in zip(right, emitted, strict=False)) + abs(len(right) - len(emitted))
    yield Count("verify: emitted", wrong, 0, len(right))


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

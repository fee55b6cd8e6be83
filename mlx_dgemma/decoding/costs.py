"""How long passes take on this machine, learnt from the passes that are run anyway.

A table belongs to a device, the shapes and dtypes of a model, and a version of MLX and of this
package. It changes how wide drafts are, so how fast an answer comes; never what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..model import DiffusionGemma
from ..options import WIDEST_DRAFT
from ..version import __version__

DRAFT = "draft "
KEPT = 9  # latest samples of a pass; their median counts
SUSPECT = 4.0
REFRESHED = 16  # samples after which medians are taken again
LARGEST_PASS = WIDEST_DRAFT + 1  # positions: the widest draft and the token before it
SCHEMA = 1
# seconds of a pass over n positions, over one position: what is assumed until it is measured
ASSUMED_POSITIONS, ASSUMED_RATIOS = (1, 4, 16, 65), (1.0, 2.2, 5.1, 12.0)


@dataclass(frozen=True)
class Costs:
    """Seconds of each kind of pass at one length of context; a table that is given, not learnt.

    Args:
        plain: of a step of one token that was launched ahead; None: as verify(1).
        verified: seconds by positions, where they are known.
        drafted: seconds of a draft by its width, where they are known.
        is_measured: they are those of this machine, so that a round can be charged what it took.
    """

    plain: float | None = None
    verified: Mapping[int, float] = field(default_factory=dict)
    drafted: Mapping[int, float] = field(default_factory=dict)
    is_measured: bool = False

    def step(self) -> float:
        """Of one token without a draft."""
        return self.verify(1) if self.plain is None else self.plain

    def verify(self, positions: int) -> float:
        """Of a pass over `positions`, at most 65: between known ones, the assumed ratios are scaled to fit."""
        return self._passes[positions]

    def draft(self, width: int) -> float:
        """Of a draft of `width`, at most 64; 0 if nothing is known."""
        return self._drafts[width]

    @cached_property
    def _passes(self) -> list[float]:
        ratios = np.interp(np.arange(LARGEST_PASS + 1), ASSUMED_POSITIONS, ASSUMED_RATIOS)
        known = sorted(self.verified)
        if not known:
            return (ratios * (self.plain or 1.0)).tolist()
        scales = np.interp(np.arange(len(ratios)), known, [self.verified[n] / ratios[n] for n in known])
        return (ratios * scales).tolist()

    @cached_property
    def _drafts(self) -> list[float]:
        known = sorted(self.drafted) or [0]
        return np.interp(np.arange(LARGEST_PASS), known, [self.drafted.get(n, 0.0) for n in known]).tolist()

    def at(self, context: int, drafter: str) -> Costs:
        return self

    def add(self, context: int, kind: str, number: int, seconds: float) -> None:
        pass


class CostTable:
    """Samples by length of context and kind of pass: "plain", "verify", or DRAFT and the name of a drafter.

    The first pass of each kind and size in a process compiles kernels, and does not count; nor does
    one that took SUSPECT times what was to be expected, unless the next of its kind does too.

    Args:
        path: where it is kept; None: nowhere.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._samples: dict[str, list[float]] = _read(path)  # "<bucket>/<kind>/<number>" -> seconds
        self._met: set[str] = set()
        self._suspects: set[str] = set()
        self._unsaved = 0
        self._known: dict[tuple[int, str], Costs] = {}

    @classmethod
    def of(cls, model: DiffusionGemma) -> CostTable:
        """The stored table of this device, model and version."""
        shapes = [(path, array.shape, str(array.dtype)) for path, array in tree_flatten(model.parameters())]
        device = mx.device_info().get("device_name", "unknown")
        facts = [SCHEMA, mx.default_device().type.name, device, mx.__version__, __version__, shapes]
        name = f"costs-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        if name not in _tables:
            _tables[name] = cls(_file(name))
        return _tables[name]

    def at(self, context: int, drafter: str) -> Costs:
        """Costs behind `context` tokens, or at the nearest length of which anything is known."""
        where = (bucket(context), drafter)
        if where not in self._known:
            self._known[where] = self._costs(*where)
        return self._known[where]

    def _costs(self, wanted: int, drafter: str) -> Costs:
        nearest: dict[tuple[str, int], tuple[int, float]] = {}  # (kind, number) -> distance, seconds
        for key, samples in self._samples.items():
            where, kind, number = _parts(key)
            found = (abs(where - wanted), median(samples))
            nearest[kind, number] = min(found, nearest.get((kind, number), found))
        of = {kind: {n: s for (k, n), (_, s) in nearest.items() if k == kind} for kind, _ in nearest}
        measured = "plain" in of or "verify" in of
        return Costs(of.get("plain", {}).get(1), of.get("verify", {}), of.get(DRAFT + drafter, {}), measured)

    def add(self, context: int, kind: str, number: int, seconds: float) -> None:
        """A pass of `kind` over `number` positions (of a drafter: tokens) took `seconds`."""
        key = f"{bucket(context)}/{kind}/{number}"
        if key not in self._met:
            self._met.add(key)
            return
        if seconds <= 0 or self._is_suspect(key, context, kind, number, seconds):
            return
        is_new = key not in self._samples
        self._samples[key] = [*self._samples.get(key, []), seconds][-KEPT:]
        self._unsaved += 1
        if is_new or self._unsaved % REFRESHED == 0:
            self._known.clear()

    def _is_suspect(self, key: str, context: int, kind: str, number: int, seconds: float) -> bool:
        """Whether a pass took so long (the machine slept, or was busy) that it takes a second one to be believed."""
        costs = self.at(context, kind.removeprefix(DRAFT))
        expected = {"plain": costs.step(), "verify": costs.verify(number)}.get(kind, costs.draft(number))
        if not costs.is_measured or not expected or seconds <= SUSPECT * expected or key in self._suspects:
            self._suspects.discard(key)
            return False
        self._suspects.add(key)
        return True

    def save(self) -> None:
        """Write the table if it has changed, beside what other processes wrote meanwhile.

        A folder that cannot be written is no reason to fail an answer.
        """
        if self._path is None or not self._unsaved:
            return
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"schema": SCHEMA, "samples": _read(self._path) | self._samples}))
            os.replace(temporary, self._path)
            self._unsaved = 0
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


_tables: dict[str, CostTable] = {}  # one per file in a process, which warms up once


def bucket(context: int) -> int:
    """Lengths of context that share their costs: up to 1,023 tokens, then by doubling."""
    return max(0, (context // 512).bit_length() - 1)


def _file(name: str) -> Path | None:
    """In $MLX_DGEMMA_CACHE, or where caches are kept; None for a user without a home."""
    if home := os.environ.get("MLX_DGEMMA_CACHE"):
        return Path(home) / name
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx_dgemma" / name
    except RuntimeError:
        return None


def _read(path: Path | None) -> dict[str, list[float]]:
    """What was stored; nothing if it is missing, damaged or of another version."""
    try:
        stored = json.loads(path.read_text()) if path is not None else {}
        if stored.get("schema") != SCHEMA:
            return {}
        samples = {key: [float(value) for value in values][-KEPT:] for key, values in stored["samples"].items()}
        if all(map(_is_sound, samples, samples.values())):
            return samples
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        pass
    return {}


def _is_sound(key: str, samples: list[float]) -> bool:
    _, _, number = _parts(key)
    return 1 <= number <= LARGEST_PASS and bool(samples) and all(0 < value < inf for value in samples)


def _parts(key: str) -> tuple[int, str, int]:
    """ "<bucket>/<kind>/<number>", taken apart."""
    where, _, rest = key.partition("/")
    kind, _, number = rest.rpartition("/")
    return int(where), kind, int(number)

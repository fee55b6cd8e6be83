"""How long passes take on this machine, learnt from the passes that are run anyway.

A table belongs to a device, the shapes and dtypes of a model, and a version of MLX and of this
package. It changes how wide drafts are, so how fast an answer comes; never what it says.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..model import DiffusionGemma
from ..version import __version__

KEPT = 9  # latest samples of a pass; their median counts
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
    """

    plain: float | None = None
    verified: Mapping[int, float] = field(default_factory=dict)
    drafted: Mapping[int, float] = field(default_factory=dict)

    def verify(self, positions: int) -> float:
        """Of a pass over `positions`: between known ones, the assumed ratios are scaled to fit."""
        known = sorted(self.verified)
        assumed = np.interp([*known, positions], ASSUMED_POSITIONS, ASSUMED_RATIOS)
        if not known:
            return float(assumed[-1]) * (self.plain or 1.0)
        scales = [self.verified[n] / ratio for n, ratio in zip(known, assumed, strict=False)]
        return float(assumed[-1] * np.interp(positions, known, scales))

    def step(self) -> float:
        """Of one token without a draft."""
        return self.verify(1) if self.plain is None else self.plain

    def draft(self, width: int) -> float:
        known = sorted(self.drafted)
        return float(np.interp(width, known, [self.drafted[n] for n in known])) if known else 0.0

    def at(self, context: int, drafter: str) -> Costs:
        return self

    def add(self, context: int, kind: str, number: int, seconds: float) -> None:
        pass


class CostTable:
    """Samples by length of context and kind of pass: "plain", "verify", or the name of a drafter.

    The first pass of each kind and size in a process compiles kernels, and does not count.

    Args:
        path: where it is kept; None: nowhere.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._samples: dict[str, list[float]] = _read(path)  # "<bucket>/<kind>/<number>" -> seconds
        self._met: set[str] = set()
        self._changed = False

    @classmethod
    def of(cls, model: DiffusionGemma) -> CostTable:
        """The stored table of this device, model and version."""
        shapes = [(path, array.shape, str(array.dtype)) for path, array in tree_flatten(model.parameters())]
        device = mx.device_info().get("device_name", "unknown")
        facts = [SCHEMA, mx.default_device().type.name, device, mx.__version__, __version__, shapes]
        path = _folder() / f"costs-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        return _tables.setdefault(path, cls(path))

    def at(self, context: int, drafter: str) -> Costs:
        """Costs behind `context` tokens, or at the nearest length of which anything is known."""
        buckets = {int(key.partition("/")[0]) for key in self._samples}
        if not buckets:
            return Costs()
        nearest = min(buckets, key=lambda known: abs(known - bucket(context)))
        values: dict[str, dict[int, float]] = {}
        for key, samples in self._samples.items():
            where, kind, number = key.split("/")
            if int(where) == nearest:
                values.setdefault(kind, {})[int(number)] = median(samples)
        return Costs(values.get("plain", {}).get(1), values.get("verify", {}), values.get(drafter, {}))

    def add(self, context: int, kind: str, number: int, seconds: float) -> None:
        """A pass of `kind` over `number` positions (of a drafter: tokens) took `seconds`."""
        key = f"{bucket(context)}/{kind}/{number}"
        if key not in self._met:
            self._met.add(key)
            return
        self._samples[key] = [*self._samples.get(key, []), seconds][-KEPT:]
        self._changed = True

    def save(self) -> None:
        """Write the table if it has changed; a folder that cannot be written is no reason to fail an answer."""
        if self._path is None or not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"schema": SCHEMA, "samples": self._samples}, file)
            os.replace(file.name, self._path)
        except OSError:
            return
        self._changed = False


_tables: dict[Path, CostTable] = {}  # one per file in a process, which warms up once


def bucket(context: int) -> int:
    """Lengths of context that share their costs: up to 1,023 tokens, then by doubling."""
    return max(0, (context // 512).bit_length() - 1)


def _folder() -> Path:
    home = os.environ.get("MLX_DGEMMA_CACHE")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mlx_dgemma"


def _read(path: Path | None) -> dict[str, list[float]]:
    """What was stored; nothing if it is missing, damaged or of another version."""
    try:
        stored = json.loads(path.read_text()) if path is not None else {}
        if stored.get("schema") != SCHEMA:
            return {}
        return {_checked_key(key): [float(s) for s in samples] for key, samples in stored["samples"].items() if samples}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _checked_key(key: str) -> str:
    where, _, number = key.split("/")
    int(where), int(number)
    return key

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
from functools import cached_property
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..model import DiffusionGemma
from ..version import __version__

DRAFT = "draft "
KEPT = 9  # latest samples of a pass; their median counts
REFRESHED = 16  # samples after which medians are taken again
LARGEST_PASS = 65  # positions: the widest draft and the token before it
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

    The first pass of each kind and size in a process compiles kernels, and does not count.

    Args:
        path: where it is kept; None: nowhere.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._samples: dict[str, list[float]] = _read(path)  # "<bucket>/<kind>/<number>" -> seconds
        self._met: set[str] = set()
        self._unsaved = 0
        self._known: dict[tuple[int, str], Costs] = {}

    @classmethod
    def of(cls, model: DiffusionGemma) -> CostTable:
        """The stored table of this device, model and version."""
        shapes = [(path, array.shape, str(array.dtype)) for path, array in tree_flatten(model.parameters())]
        device = mx.device_info().get("device_name", "unknown")
        facts = [SCHEMA, mx.default_device().type.name, device, mx.__version__, __version__, shapes]
        path = _folder() / f"costs-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
        if path not in _tables:
            _tables[path] = cls(path)
        return _tables[path]

    def at(self, context: int, drafter: str) -> Costs:
        """Costs behind `context` tokens, or at the nearest length of which anything is known."""
        where = (bucket(context), drafter)
        if where not in self._known:
            self._known[where] = self._costs(*where)
        return self._known[where]

    def _costs(self, wanted: int, drafter: str) -> Costs:
        buckets = {_parts(key)[0] for key in self._samples}
        if not buckets:
            return Costs()
        nearest = min(buckets, key=lambda known: abs(known - wanted))
        values: dict[str, dict[int, float]] = {}
        for key, samples in self._samples.items():
            where, kind, number = _parts(key)
            if where == nearest:
                values.setdefault(kind, {})[number] = median(samples)
        return Costs(values.get("plain", {}).get(1), values.get("verify", {}), values.get(DRAFT + drafter, {}))

    def add(self, context: int, kind: str, number: int, seconds: float) -> None:
        """A pass of `kind` over `number` positions (of a drafter: tokens) took `seconds`."""
        key = f"{bucket(context)}/{kind}/{number}"
        if key not in self._met:
            self._met.add(key)
            return
        is_new = key not in self._samples
        self._samples[key] = [*self._samples.get(key, []), seconds][-KEPT:]
        self._unsaved += 1
        if is_new or self._unsaved % REFRESHED == 0:
            self._known.clear()

    def save(self) -> None:
        """Write the table if it has changed; a folder that cannot be written is no reason to fail an answer."""
        if self._path is None or not self._unsaved:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
                json.dump({"schema": SCHEMA, "samples": self._samples}, file)
            os.replace(file.name, self._path)
        except OSError:
            return
        self._unsaved = 0


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
        samples = {key: [float(value) for value in values] for key, values in stored["samples"].items() if values}
        return {key: values for key, values in samples.items() if _parts(key)}
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return {}


def _parts(key: str) -> tuple[int, str, int]:
    """ "<bucket>/<kind>/<number>", taken apart."""
    where, _, rest = key.partition("/")
    kind, _, number = rest.rpartition("/")
    return int(where), kind, int(number)

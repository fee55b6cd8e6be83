"""A quantised checkpoint beside the reference: no verdict, for no rounding error is promised of it.

The distance of two distributions is KL(reference || quantised) in nats over the reference's 64
likeliest ids, each on its own, and all others together: a little less than over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..config import read_json
from ..loading import load_model, resolve
from ..model import DiffusionGemma
from . import replay
from .bundle import Bundle, read
from .check import Agreement, agreement_lines, require_same_sizes


@dataclass(frozen=True)
class Divergence:
    """KL in nats at so many positions."""

    name: str
    mean: float
    p99: float
    positions: int


@dataclass(frozen=True)
class Comparison:
    name: str
    divergences: list[Divergence]
    agreements: list[Agreement]
    steps: list[tuple[list[int], list[int]]]  # of each row, per canvas: the reference's, ours

    def table(self) -> str:
        lines = [self.name, f"{'KL to the reference, nats':26} {'mean':>9} {'p99':>9}   {'positions':>9}"]
        for entry in self.divergences:
            lines.append(f"{entry.name:26} {entry.mean:9.2e} {entry.p99:9.2e}   {entry.positions:9}")
        lines += agreement_lines(self.agreements)
        for row, (theirs, ours) in enumerate(self.steps):
            lines.append(f"steps to stop, row {row}: {_sum(ours)}, the reference {_sum(theirs)}")
        return "\n".join([*lines, "compared, not judged: quantised"])


def is_quantised(model: str | None) -> bool:
    """Whether the checkpoint at `model` (a folder or a Hub id) says so in config.json."""
    if model is None:
        return False
    config = read_json(resolve(model) / "config.json")
    return bool(config.get("quantization") or config.get("quantization_config"))


def compare(folder: Path, model: str) -> Comparison:
    """Replay a bundle with a quantised checkpoint of the same sizes.

    Raises InputError: the bundle is damaged, or the checkpoint has other sizes.
    """
    bundle, checkpoint = read(folder), resolve(model)
    require_same_sizes(bundle, checkpoint)
    on_cpu = mx.default_device() == mx.cpu
    quantised = load_model(checkpoint, dtype=mx.float32 if on_cpu else None)
    got = replay.walk(quantised, bundle)
    rows = range(len(bundle.arrays["prompt"]))
    return Comparison(
        f"{bundle.folder.name}: {bundle.facts['model']}, recorded in {bundle.facts['dtype']}, beside {checkpoint.name}",
        [_divergence(bundle, got, "causal text", "ar"), _divergence(bundle, got, "noised canvases", "denoise")],
        list(_agreements(bundle, got)),
        [_steps(quantised, bundle, row) for row in rows],
    )


def _divergence(bundle: Bundle, got: dict[str, np.ndarray], name: str, kind: str) -> Divergence:
    """Over all passes of a kind."""
    passes = [key.partition("/")[0] for key in bundle.facts["floors"] if key.endswith("/top")]
    distances = [
        kl(*(arrays[f"{one}/{what}"] for arrays in (bundle.arrays, got) for what in ("top", "logsumexp"))).ravel()
        for one in passes
        if one.partition(".")[0] == kind
    ]
    joined = np.concatenate(distances)
    return Divergence(name, float(joined.mean()), float(np.quantile(joined, 0.99)), joined.size)


def kl(top: np.ndarray, total: np.ndarray, other_top: np.ndarray, other_total: np.ndarray) -> np.ndarray:
    """KL in nats from the logits of the same ids (..., n) and logsumexp over all (...), what is left in one piece."""
    log_p, log_q = top - total[..., None], np.float64(other_top) - other_total[..., None]
    p = np.exp(log_p)
    rest_p, rest_q = (np.maximum(1 - np.exp(logs).sum(axis=-1), 1e-12) for logs in (log_p, log_q))
    return (p * (log_p - log_q)).sum(axis=-1) + rest_p * np.log(rest_p / rest_q)


def _agreements(bundle: Bundle, got: dict[str, np.ndarray]) -> Iterator[Agreement]:
    ran = bundle.arrays["steps/ran"]
    names = {"top-1, causal text": "ar/best", "top-1, noised canvases": "steps/best", "accepted": "steps/accepted"}
    for label, name in names.items():
        same = got[name] == bundle.arrays[name]
        same = same[ran] if name.startswith("steps/") else same
        yield Agreement(label, int(same.sum()), same.size)


def _steps(model: DiffusionGemma, bundle: Bundle, row: int) -> tuple[list[int], list[int]]:
    """Denoising steps of every canvas: the reference's, and ours on the draws that it made."""
    theirs = [sum(int(step["ran"][row]) for step in steps) for steps in bundle.steps()]
    return theirs, replay.free_run(model, bundle, row)[2]


def _sum(counts: list[int]) -> str:
    return " + ".join(map(str, counts))

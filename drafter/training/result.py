"""The folder that a training leaves: a drafter as others publish them, and how it came about."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...version import __version__
from .. import weights
from .curve import svg
from .heldout import Accepted
from .options import Options
from .trainer import Trainer


def versions() -> dict[str, str]:
    return {"mlx_dgemma": __version__, "mlx": version("mlx"), "numpy": version("numpy")}


def write(folder: Path, trainer: Trainer, options: Options, accepted: Accepted | None, about: dict[str, Any]) -> None:
    """config.json, model.safetensors, training.json, curve.svg; `about` stands first in training.json."""
    weights.write_into(trainer.network, folder, getattr(mx, options.dtype))
    progress = trainer.progress
    record = about | {
        "options": vars(options),
        "versions": versions(),
        "steps": progress.step,
        "loss": round(progress.loss, 5),
        "held_out": None if accepted is None else accepted.to_dict(),
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens_per_second, 1),
        "peak_memory_gb": round(progress.peak_gb, 3),
        "history": progress.history,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if accepted is not None:
        (folder / "curve.svg").write_text(curve(accepted, progress.history), encoding="utf-8")


def curve(accepted: Accepted, history: list[dict[str, Any]]) -> str:
    """Accepted length by width: what there could be, what there is, and how it grew."""
    curves = {"a drafter that is always right": accepted.most, "this one": accepted.lengths}
    ways = [entry for entry in history if entry["step"]]
    for index in sorted({0, len(ways) // 2} if ways else ()):
        curves[f"after {ways[index]['step']} steps (fewer answers)"] = ways[index]["accepted"]
    return svg("Drafts accepted on held-out answers", "drafts a round", "accepted a round", curves)

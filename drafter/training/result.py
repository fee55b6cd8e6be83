"""The folder that a training leaves: a drafter as others publish them, and how it came about."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...errors import InputError
from ...version import __version__
from .. import weights
from ..network import BlockNetwork
from .curve import svg
from .heldout import Accepted
from .options import Options
from .trainer import Trainer


def versions() -> dict[str, str]:
    return {"mlx_dgemma": __version__, "mlx": version("mlx"), "numpy": version("numpy")}


def named(place: str) -> str:
    """A Hub id as it is; of a folder, its name alone."""
    folder = os.path.expanduser(place)
    return Path(folder).resolve().name if os.path.isdir(folder) else place


def command(typed: Sequence[str], models: Iterable[str], files: Iterable[str]) -> str:
    """A command as it was typed, but models as `named`, and of files the name alone."""
    names = {place: named(place) for place in models} | {place: Path(place).name for place in files}

    def short(word: str) -> str:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return flag + equals + names.get(value, value)

    return shlex.join(map(short, typed))


def write(folder: Path, trainer: Trainer, options: Options, accepted: Accepted | None, about: dict[str, Any]) -> None:
    """config.json, model.safetensors, training.json, curve.svg; `about` stands first in training.json.

    Raises InputError if a weight is no number, or too large for the dtype it is written in.
    """
    _require_finite(trainer.network, options.dtype)
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
    (folder / "training.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if accepted is not None:
        (folder / "curve.svg").write_text(curve(accepted, progress.history), encoding="utf-8")


def _require_finite(network: BlockNetwork, dtype: str) -> None:
    for path, array in tree_flatten(network.parameters()):
        if not mx.isfinite(array.astype(getattr(mx, dtype))).all().item():
            raise InputError(f"{path} is not finite in {dtype}; lower --lr, or write another --dtype")


def curve(accepted: Accepted, history: list[dict[str, Any]]) -> str:
    """Accepted length by width: what there could be, what there is, and how it grew, on a few of the answers."""
    curves = {"a drafter that is always right": accepted.most, "this one": accepted.lengths}
    ways = [entry for entry in history if entry["step"]]
    for number in sorted({0, (len(ways) - 1) // 2, len(ways) - 1} if ways else ()):
        entry = ways[number]
        curves[f"step {entry['step']:,}, on {entry['places'] / accepted.places:.0%} of the places"] = entry["accepted"]
    return svg("Drafts accepted on held-out answers", "drafts a round", "accepted a round", curves)

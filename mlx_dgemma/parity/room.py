"""Whether a recording fits into this machine, told before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import InputError
from ..memory import GB, host_memory

ITEM = {"float32": 4, "bfloat16": 2, "float64": 4}  # bytes of a weight; the truth is widened from float32
BESIDE_MODEL = 1_000_000_000  # bytes that activations, caches and logits may take


@dataclass(frozen=True)
class Room:
    """Bytes that a recording needs on the host and, if it runs on one, on a CUDA device."""

    host: int
    device: int


def room_needed(folder: Path, dtype: str) -> Room:
    """From the headers of a checkpoint: the model, beside it on the host the largest weight in float64."""
    sizes = [info.size for info in Checkpoint(folder).tensors.values()]
    model = sum(sizes) * ITEM[dtype]
    return Room(model + 8 * max(sizes) + BESIDE_MODEL, model + BESIDE_MODEL)


def require_room(folder: Path, dtype: str, device: int | None) -> None:
    """Raise InputError, with the numbers, where a recording would run out of memory.

    Args:
        device: bytes that are free on the CUDA device it runs on; None: it runs on the CPU.
    """
    need = room_needed(folder, dtype)
    places = [("host memory", need.host, host_memory())]
    places += [] if device is None else [("device memory", need.device, device)]
    for place, needed, there in places:
        if needed > there:
            smaller = "" if dtype == "bfloat16" else ", --dtype bfloat16 needs less"
            raise InputError(
                f"{folder}: recording in {dtype} needs {needed / GB:.1f} GB of {place}, "
                f"this machine has {there / GB:.1f} GB; take a larger one{smaller}"
            )

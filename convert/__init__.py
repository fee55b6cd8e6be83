"""From every format that checkpoints come in to MLX, and from MLX to what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert(hf_path: str | Path, mlx_path: str | Path = "mlx_model", **options: Any) -> Path:
    """Convert a checkpoint; returns the folder it wrote. See `mlx_dgemma.convert.conversion.convert`."""
    from .conversion import convert as run

    return run(hf_path, mlx_path, **options)

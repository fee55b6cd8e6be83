"""The machine at hand: its devices, and what every figure of a report depends on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import mlx.core as mx

from ..memory import GB, machine_memory
from ..version import __version__


def devices() -> list[str]:
    """Those that MLX can run on, the fast one first."""
    return ["gpu", "cpu"] if mx.is_available(mx.gpu) else ["cpu"]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Run the block on "cpu" or "gpu"."""
    before = mx.default_device()
    mx.set_default_device(mx.gpu if device == "gpu" else mx.cpu)
    try:
        yield
    finally:
        mx.set_default_device(before)


def facts() -> dict[str, Any]:
    """Date, chip, system, versions; one line each."""
    versions = [f"{name} {_version(name)}" for name in ("mlx", "mlx-lm", "transformers")]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "chip": f"{chip()}, {os.cpu_count()} CPU cores",
        "memory": f"{machine_memory() / GB:.1f} GB{_working_set()}",
        "system": f"{system()}, Python {platform.python_version()}",
        "versions": ", ".join([f"mlx_dgemma {__version__}", *versions]),
        "device": f"{mx.default_device().type.name} (MLX has {' and '.join(devices())} here)",
    }


def chip() -> str:
    """As MLX names the default device; on a CPU that it does not know, as the system does."""
    name = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    return f"{name} ({platform.machine()})"


def system() -> str:
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else platform.platform(terse=True)


def _working_set() -> str:
    most = mx.device_info().get("max_recommended_working_set_size")
    return f", {most / GB:.1f} GB recommended at most for the GPU" if most else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def process_peak() -> int | None:
    """Bytes of this process that were resident at most; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak  # bytes there, KB elsewhere

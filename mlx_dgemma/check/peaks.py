"""Memory: what was estimated before loading, and what the sections before this one took at most."""

from __future__ import annotations

import mlx.core as mx

from ..memory import GB
from .budget import Budget
from .machine import process_peak
from .report import Column, Section
from .subject import Subject

TITLE = "Memory"
ESTIMATE = "estimated before loading"
COLUMNS = (Column("what", "what"), Column("gb", "GB", ".3f"))


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """Takes no time: it reads what was noted."""
    need = subject.model.memory
    section.add("weights", need.weights / GB)
    section.add(f"{ESTIMATE}, at {need.context} tokens", need.total / GB)
    for label, peak in subject.peaks.items():
        section.add(f"peak: {label}", peak / GB)
    section.add("held now", mx.get_active_memory() / GB)
    section.add("held in MLX's cache of free buffers", mx.get_cache_memory() / GB)
    resident = process_peak()
    if resident is not None:
        section.add("resident in this process at most", resident / GB)
    section.notes.append("Peaks are of MLX's arrays, weights included; resident counts everything, bundles too.")

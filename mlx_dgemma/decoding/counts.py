"""What has been computed so far, prompt included."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Exact counts of one request, and what its drafter took."""

    denoise_forwards: int = 0
    encode_forwards: int = 0  # prefill, canvases and rounds of ar mode
    positions: int = 0  # over all forwards
    rounds: int = 0  # passes of ar mode that had a draft to verify
    drafted: int = 0  # tokens verified in them
    accepted: int = 0
    surplus: int = 0  # drafted tokens ignored because they were more than asked for
    drafter_seconds: float = 0.0
    drafter_failure: str | None = None  # why the drafter was turned off

"""What can be chosen of a training, and what no model makes right."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from ...errors import UsageError
from ...options import WIDEST_DRAFT

FAMILIES = ("dflash", "dspark")
DTYPES = ("bfloat16", "float16", "float32")
SAVE_EVERY = 100  # steps between checkpoints


@dataclass(frozen=True, kw_only=True)
class Options:
    """How is trained.

    Attributes:
        max_tokens: of an answer.
        at_once: answers written side by side, of prompts that are equally long.
        epochs: passes over the answers, unless `steps` is given.
        steps: steps, of `batch` answers each.
        anchors: blocks an answer and step, at random places.
        lr: the highest learning rate, after `warmup` (a share of all steps), before a cosine down to a hundredth.
        held_out: share of the prompts that are never trained on.
        dtype: that the drafter is written in.
        micro_batch_gb: GB for the blocks that are run together.
    """

    max_tokens: int = 512
    at_once: int = 8
    epochs: float = 3.0
    steps: int | None = None
    anchors: int = 512
    batch: int = 4
    lr: float = 6e-4
    warmup: float = 0.04
    held_out: float = 0.05
    seed: int = 0
    dtype: str = "bfloat16"
    micro_batch_gb: float = 2.0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "at_once", "anchors", "batch"):
            _require(name, type(getattr(self, name)) is int and getattr(self, name) > 0, "a whole number above 0", self)
        whole = self.steps is None or (type(self.steps) is int and self.steps > 0)
        _require("steps", whole, "a whole number above 0", self)
        _require("seed", type(self.seed) is int, "a whole number", self)
        for name in ("epochs", "lr", "micro_batch_gb"):
            _require(name, 0 < self._number(name) < math.inf, "a number above 0", self)
        for name in ("warmup", "held_out"):
            _require(name, 0 <= self._number(name) < 1, "at least 0 and below 1", self)
        _require("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}", self)

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        return value if isinstance(value, int | float) else math.nan

    def total_steps(self, answers: int) -> int:
        """Of a training on so many answers."""
        return self.steps or max(1, math.ceil(self.epochs * answers / self.batch))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a new drafter looks like; None: as the published one for Gemma 4, or as the one that is continued.

    Attributes:
        taps: how many layers of the main model it reads, or which ones.
        block: positions that are run for a draft, the last token's among them.
        window: of its sliding layers, in tokens.
    """

    family: str | None = None
    layers: int | None = None
    taps: int | tuple[int, ...] | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    block: int | None = None
    window: int | None = None
    markov_rank: int | None = None
    mask_token: int | None = None

    def __post_init__(self) -> None:
        _require("family", self.family in (None, *FAMILIES), f"one of {', '.join(FAMILIES)}", self)
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int:
                least = 0 if field.name == "mask_token" else 2 if field.name in ("block", "window") else 1
                _require(field.name, value >= least, f"a whole number of {least} at least", self)
        _require("block", self.block is None or self.block <= WIDEST_DRAFT, f"at most {WIDEST_DRAFT}", self)

    def given(self) -> dict[str, Any]:
        """Those that are not left open."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }


def _require(name: str, holds: bool, wanted: str, owner: object) -> None:
    if not holds:
        flag = "--" + name.replace("_", "-")
        raise UsageError(f"{flag} must be {wanted}, not {getattr(owner, name)!r:.80}")

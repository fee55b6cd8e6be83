"""How much memory a model will need, and how much there is."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import mlx.core as mx

from .cache import GROWTH, SLACK
from .config import ModelConfig
from .errors import InputError
from .layers import SCORES_BUDGET
from .model import DiffusionGemma

GB = 1e9


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes needed to run a model, by what they are for."""

    weights: int
    kv: int
    step: int
    context: int  # tokens that `kv` and `step` were computed for
    drafter: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.step + self.drafter

    def __str__(self) -> str:
        drafter = f" + drafter {self.drafter / GB:.2f}" if self.drafter else ""
        parts = f"weights {self.weights / GB:.2f} + KV {self.kv / GB:.2f} + step {self.step / GB:.2f}{drafter} GB"
        return f"{self.total / GB:.2f} GB ({parts} at {self.context} tokens)"


def estimate(config: ModelConfig, weights: int, dtype: mx.Dtype, context: int) -> MemoryEstimate:
    """What `weights` bytes of parameters need beside them to decode behind `context` tokens."""
    wide = [2 * x.num_key_value_heads * x.head_dim * dtype.size for x in config.layers]
    kv = sum(size * rows_kept(window, context) for size, window in zip(wide, config.windows, strict=True))
    canvas = config.canvas_length
    # Vocabulary slices are queued faster than they are computed, so several are alive at once: 0.34 GB in
    # float32 and 0.89 GB in bf16 were measured at 256 x 262,144. Beside them, scores over the prefix.
    vocabulary = canvas * config.vocab_size * 14
    scores = dtype.size * min(SCORES_BUDGET, config.num_attention_heads * canvas * (context + canvas))
    return MemoryEstimate(weights, kv, vocabulary + scores, context)


def rows_kept(window: int | None, context: int) -> int:
    """Of a layer that sees `window` tokens (None: all), behind `context` of them."""
    return context if window is None else min(context, window + SLACK + 2 * GROWTH)


def machine_memory() -> int:
    """Bytes of memory that the default device can use."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        for key in ("memory_size", "total_memory"):
            if key in info:
                return int(info[key])
    return host_memory()


def host_memory() -> int:
    """Bytes of memory that the processor has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_room(model: DiffusionGemma, context: int, drafter: int = 0) -> None:
    """Raise InputError if a loaded model cannot run behind a context longer than the one assumed at loading.

    Args:
        drafter: bytes that its drafter needs beside it there.
    """
    need = replace(estimate(model.config, model.memory.weights, model.dtype, context), drafter=drafter)
    require_fit(need, f"a context of {context} tokens")


def require_fit(need: MemoryEstimate, where: str) -> None:
    """Raise InputError if weights, KV and one step cannot fit in this machine's memory."""
    have = machine_memory()
    if need.total > have:
        raise InputError(
            f"{where}: needs about {need}, this machine has {have / GB:.2f} GB; "
            "take a smaller one, or one that is quantised"
        )

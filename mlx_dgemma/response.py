"""What `stream_generate` yields, and the clock that fills it in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decoding.diffusion import Counts


@dataclass(frozen=True, kw_only=True)
class GenerationResponse:
    """What one step of `stream_generate` made final, or a draft of it. Counters are cumulative.

    `text` and `reasoning` are what became readable with this response; `tokens` are the ids that it
    makes final (every id, eos included, is in exactly one response), `token` the last of them.
    """

    text: str = ""
    reasoning: str = ""
    token: int | None = None
    tokens: tuple[int, ...] = ()
    from_draft: bool = False
    logprobs: None = None  # a denoised position has no next-token distribution
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB
    finish_reason: str | None = None
    mode: str = "diffusion"
    exact: bool = True
    is_draft: bool = False
    draft_text: str | None = None
    draft_tokens: tuple[int, ...] = ()
    draft_accepted: tuple[bool, ...] = ()
    draft_step: int = 0
    canvas_index: int = 0
    denoise_forwards: int = 0
    encode_forwards: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    positions_computed: int = 0


def statistics(last: GenerationResponse) -> str:
    """The lines that mlx_lm prints after a generation, and the forwards that the answer took."""
    forwards = last.denoise_forwards + last.encode_forwards
    return "\n".join(
        [
            f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec",
            f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec",
            f"Forwards: {forwards} ({last.denoise_forwards} denoise + {last.encode_forwards} encode), "
            f"{forwards / max(1, last.generation_tokens):.3f} per token",
            f"Peak memory: {last.peak_memory:.3f} GB",
        ]
    )


class Clock:
    """Times the prompt and the generation."""

    def __init__(self, prompt_tokens: int, counts: Counts):
        self.prompt_tokens, self.counts, self.generated = prompt_tokens, counts, 0
        self._started = self._prefilled = time.perf_counter()

    def watch(self, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """A progress callback that also notes when the prompt is done."""

        def report(done: int, total: int) -> None:
            self._prefilled = time.perf_counter()
            if progress is not None:
                progress(done, total)

        return report

    def readings(self) -> dict[str, Any]:
        import mlx.core as mx

        now = time.perf_counter()
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tps": self.prompt_tokens / max(self._prefilled - self._started, 1e-9),
            "generation_tokens": self.generated,
            "generation_tps": self.generated / max(now - self._prefilled, 1e-9),
            "peak_memory": mx.get_peak_memory() / 1e9,
            "denoise_forwards": self.counts.denoise_forwards,
            "encode_forwards": self.counts.encode_forwards,
            "positions_computed": self.counts.positions,
        }

"""What `stream_generate` yields, and how an answer becomes that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx_lm.tokenizer_utils import TokenizerWrapper


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
    from_draft: bool = False  # the drafter had guessed this token
    logprobs: mx.array | None = None  # ar: (V,), after bias and penalty; a denoised position has none
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float  # GB
    finish_reason: str | None = None
    mode: str = "diffusion"
    exact: bool = True
    # diffusion mode
    is_draft: bool = False
    draft_text: str | None = None
    draft_tokens: tuple[int, ...] = ()
    draft_accepted: tuple[bool, ...] = ()
    draft_step: int = 0
    canvas_index: int = 0
    # what has been computed
    denoise_forwards: int = 0
    encode_forwards: int = 0
    positions_computed: int = 0
    # ar mode with a drafter
    draft_rounds: int = 0  # forwards that verified a draft
    drafted_tokens: int = 0  # verified in them
    accepted_tokens: int = 0
    surplus_tokens: int = 0  # drafted beyond what was asked for, and ignored
    drafter_seconds: float = 0.0
    drafter_failure: str | None = None  # why the drafter was turned off, if it was


def statistics(last: GenerationResponse) -> str:
    """The lines that mlx_lm prints after a generation, and what the answer took."""
    forwards, tokens = last.denoise_forwards + last.encode_forwards, max(1, last.generation_tokens)
    lines = [
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec",
        f"Forwards: {forwards} ({last.denoise_forwards} denoise + {last.encode_forwards} encode), "
        f"{forwards / tokens:.3f} per token, over {last.positions_computed} positions",
    ]
    if last.draft_rounds:
        lines.append(
            f"Drafts: {last.accepted_tokens} of {last.drafted_tokens} tokens accepted in {last.draft_rounds} rounds, "
            f"{last.accepted_tokens / max(1, last.draft_rounds):.2f} a round; drafter {last.drafter_seconds:.3f} s"
        )
    elif last.drafter_seconds:
        lines.append(
            "Drafts: none, as by what passes have cost here none would have saved time; a fixed width always drafts"
        )
    if last.surplus_tokens:
        lines.append(f"Drafts: {last.surplus_tokens} tokens beyond the width asked for were ignored")
    if last.drafter_failure:
        lines.append(f"Drafter turned off (the answer is not affected): {last.drafter_failure}")
    return "\n".join([*lines, f"Peak memory: {last.peak_memory:.3f} GB"])


def heading(draft: GenerationResponse) -> str:
    """How far a canvas has come."""
    accepted, total = sum(draft.draft_accepted), len(draft.draft_accepted)
    return f"canvas {draft.canvas_index} step {draft.draft_step}: {accepted}/{total} accepted"


class Answer:
    """Turns ids that become final into responses, with the time and the work they took so far.

    Args:
        stop: strings that end the answer.
        progress: called with (tokens done, tokens in all) of the prompt.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        stop: Sequence[str],
        prompt_tokens: int,
        mode: str,
        progress: Callable[[int, int], None] | None = None,
    ):
        from .decoding.counts import Counts
        from .transcript import Transcript

        self.counts = Counts()
        self._tokenizer, self._transcript = tokenizer, Transcript(tokenizer, stop)
        self._prompt_tokens, self._mode, self._watcher = prompt_tokens, mode, progress
        self._generated = 0
        self._started: float | None = None
        self._prefilled = 0.0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been met."""
        return self._transcript.stopped

    def progress(self, done: int, total: int) -> None:
        """To be called while the prompt is encoded."""
        self._prefilled = time.perf_counter()
        if self._started is None:
            self._started = self._prefilled
        if self._watcher is not None:
            self._watcher(done, total)

    def final(self, tokens: Sequence[int], reason: str | None, **fields: Any) -> GenerationResponse:
        """Ids that are final, and why they are the last ones (None: they are not)."""
        if self._mode == "ar" and not self._generated:  # the prompt's last token is encoded with the first round
            self._prefilled = time.perf_counter()
        piece = self._transcript.add(tokens)
        text, reasoning = piece.text, piece.reasoning
        if self.stopped:
            reason = "stop"
        elif reason is not None:
            rest = self._transcript.finish()
            text, reasoning = text + rest.text, reasoning + rest.reasoning
        self._generated += len(tokens)
        return GenerationResponse(
            text=text,
            reasoning=reasoning,
            token=tokens[-1],
            tokens=tuple(tokens),
            finish_reason=reason,
            **fields,
            **self._readings(),
        )

    def draft(self, tokens: Sequence[int], accepted: Sequence[bool], step: int, index: int) -> GenerationResponse:
        """A canvas on its way."""
        return GenerationResponse(
            is_draft=True,
            draft_text=self._tokenizer.decode(tokens),
            draft_tokens=tuple(tokens),
            draft_accepted=tuple(accepted),
            draft_step=step,
            canvas_index=index,
            **self._readings(),
        )

    def _readings(self) -> dict[str, Any]:
        import mlx.core as mx

        now, counts = time.perf_counter(), self.counts
        return {
            "mode": self._mode,
            "prompt_tokens": self._prompt_tokens,
            "prompt_tps": self._prompt_tokens / max(self._prefilled - self._started, 1e-9),
            "generation_tokens": self._generated,
            "generation_tps": self._generated / max(now - self._prefilled, 1e-9),
            "peak_memory": mx.get_peak_memory() / 1e9,
            "denoise_forwards": counts.denoise_forwards,
            "encode_forwards": counts.encode_forwards,
            "positions_computed": counts.positions,
            "draft_rounds": counts.rounds,
            "drafted_tokens": counts.drafted,
            "accepted_tokens": counts.accepted,
            "surplus_tokens": counts.surplus,
            "drafter_seconds": counts.drafter_seconds,
            "drafter_failure": counts.drafter_failure,
        }

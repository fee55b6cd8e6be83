"""What is to answer prompts and how, what an answer is, and what every engine offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from mlx_dgemma.check.paths import shown_drafter
from mlx_dgemma.options import MODES, OF_THE_LOOP, sampler_options
from mlx_dgemma.prompt import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_dgemma.config import GenerationConfig
    from mlx_dgemma.model import DiffusionGemma
    from mlx_dgemma.prompt import Prompt


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answer to one prompt, and what it took."""

    text: str  # without thoughts
    tokens: int  # new ids, those of thoughts and eos included
    canvases: int  # 0 in ar mode
    denoise_forwards: int
    encode_forwards: int  # those of the prompt included
    verify_passes: int = 0  # ar mode: forwards that had a draft to verify
    drafted: int = 0
    accepted: int = 0
    drafter_failure: str | None = None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to answer, and how.

    Attributes:
        options: of the mode; None: as the checkpoint says.
        max_tokens: None: as the checkpoint says.
        dtype: None: float32 in transformers, else as stored on a GPU and float32 on a CPU.
        device: "cpu" or "gpu", None: MLX's default, for transformers the CPU.
    """

    model: str = "nano"
    revision: str | None = None
    mode: str = "diffusion"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def given(self) -> dict[str, Any]:
        """Options of the mode that are not left to the checkpoint."""
        return {name: self.options[name] for name in MODES[self.mode] if self.options.get(name) is not None}

    def config(self, own: GenerationConfig) -> GenerationConfig:
        """The checkpoint's sampler options with those that are given."""
        sampler = {name: value for name, value in self.given.items() if name in sampler_options(self.mode)}
        return own.replace(max_new_tokens=self.max_tokens, **sampler)

    def facts(self, config: GenerationConfig) -> dict[str, Any]:
        """Of the decoding, given or the checkpoint's, for people to read and for a file."""
        sampler = {name: getattr(config, name) for name in ("max_new_tokens", *sampler_options(self.mode))}
        loop = {name: value for name, value in self.given.items() if name in OF_THE_LOOP}
        if "drafter" in loop:
            loop["drafter"] = shown_drafter(loop["drafter"])
        return {"mode": self.mode, **loop, "options": sampler}

    def ids(self, tokenizer: TokenizerWrapper, prompt: Prompt, thinking: bool, model: DiffusionGemma) -> list[int]:
        """Of a prompt, by the chat template. Raises InputError if the model cannot answer it."""
        from mlx_dgemma.decoding.prefill import check_prompt

        ids = encode_prompt(tokenizer, prompt, enable_thinking=thinking)
        check_prompt(model, ids, room=model.config.canvas_length if self.mode == "diffusion" else 1)
        return ids


def is_greedy(mode: str, config: GenerationConfig) -> bool:
    """Whether no random draw is made, so that all seeds have the same answer."""
    return mode == "ar" and (config.temperature == 0 or config.top_k == 1)


class Engine(Protocol):
    config: GenerationConfig

    def facts(self) -> dict[str, Any]:
        """What its answers depend on: versions, model, device, dtype."""

    def ids(self, prompt: Prompt, thinking: bool) -> list[int]:
        """A prompt through the chat template. Raises InputError if there is no answering it."""

    def answer(self, ids: list[int], seed: int) -> Answered: ...

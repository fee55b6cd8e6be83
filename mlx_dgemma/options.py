"""Which options each mode has, and what no checkpoint makes right."""

from __future__ import annotations

from typing import Any

from .config import GenerationConfig
from .errors import UsageError

MODES = {
    "diffusion": (
        "max_denoising_steps",
        "entropy_bound",
        "t_min",
        "t_max",
        "stability_threshold",
        "confidence_threshold",
        "drafts",
    ),
    "ar": (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "repetition_context_size",
        "logit_bias",
        "drafter",
        "draft_width",
        "drafter_bits",
        "draft_head_bits",
        "draft_vocab",
    ),
}
OF_A_DRAFTER = ("drafter_bits", "draft_head_bits", "draft_vocab")
OF_THE_LOOP = ("drafts", "drafter", "draft_width", *OF_A_DRAFTER)  # the others are the sampler's, in GenerationConfig
LARGEST_PREFILL_STEP = 4096  # above it MLX has had wrong results on long inputs
WIDEST_DRAFT = 64  # what the cache can roll back


def sampler_options(mode: str) -> tuple[str, ...]:
    """The options of a mode that `GenerationConfig` holds."""
    return tuple(name for name in MODES[mode] if name not in OF_THE_LOOP)


def check_options(mode: str, options: dict[str, Any]) -> None:
    """Raise UsageError for a mode or option that does not exist, or an option of the other mode."""
    if not isinstance(mode, str) or mode not in MODES:
        raise UsageError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    for name, value in options.items():
        owner = next((other for other, names in MODES.items() if name in names), None)
        if owner is None:
            raise UsageError(f"{name} is not an option; {mode} has {', '.join(MODES[mode])}")
        if owner != mode and value is not None and value is not False:
            raise UsageError(f"{name} is an option of {owner} mode; {mode} has {', '.join(MODES[mode])}")


def check_limits(
    max_tokens: int | None, prefill_step_size: int | None, seed: int, drafter: Any = None, draft_width: Any = None
) -> None:
    """Raise UsageError for numbers that no checkpoint makes right."""
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise UsageError(f"max_tokens must be a whole number greater than 0, not {max_tokens!r}")
    step = prefill_step_size
    if step is not None and (type(step) is not int or not 1 <= step <= LARGEST_PREFILL_STEP):
        raise UsageError(f"prefill_step_size must lie in 1-{LARGEST_PREFILL_STEP}, not {step!r}")
    if type(seed) is not int:
        raise UsageError(f"seed must be a whole number, not {seed!r}")
    if draft_width is None:
        return
    if type(draft_width) is not int or not 0 <= draft_width <= WIDEST_DRAFT:
        raise UsageError(f"draft_width must be a whole number in 0-{WIDEST_DRAFT}, not {draft_width!r}")
    if drafter is None:
        raise UsageError("draft_width needs a drafter; name one, or leave it out")


def check_bias(config: GenerationConfig, vocab_size: int) -> None:
    """Raise UsageError for a logit bias of an id that the model does not have."""
    wrong = next((token for token in config.logit_bias if token >= vocab_size), None)
    if wrong is not None:
        raise UsageError(f"logit_bias names the id {wrong}; the vocabulary has ids 0-{vocab_size - 1}")

"""What is checked: a loaded model with its drafters and prompts, and what is noted of it on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ..config import GenerationConfig, ModelConfig
from ..decoding.causal import decode
from ..drafter import make, memory
from ..drafter.protocol import Drafter
from ..draws import Draws
from ..loading import EMBEDDED, load
from ..memory import GB, require_room
from ..model import DiffusionGemma
from ..prompt import encode_prompt
from . import prompts
from .budget import Budget
from .machine import devices
from .paths import shown_drafter, shown_name

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

SEED = 0
DRAFTERS, OF_NANO = ("lookup", "canvas"), "block:nano"
CONTEXT = 2048  # tokens that nothing here goes beyond


@dataclass
class Subject:
    """Attributes:
    drafters: one per name; `fresh()` where they have it.
    prompts: label -> ids.
    peaks: label -> bytes of MLX arrays at most while that was run.
    max_ratio: that bundles may have on a GPU; None: the usual.
    """

    name: str
    model: DiffusionGemma
    drafters: dict[str, Drafter]
    prompts: dict[str, list[int]]
    devices: Sequence[str] = ("cpu",)
    tell: Callable[[str], None] = lambda what: None
    peaks: dict[str, int] = field(default_factory=dict)
    max_ratio: float | None = None
    _pace: float | None = None

    @classmethod
    def load(cls, name: str, drafters: Sequence[str], tell: Callable[[str], None] = lambda what: None) -> Subject:
        """Raises InputError for a model or a drafter that cannot be used."""
        model, tokenizer = load(name)
        is_nano = replace(model.config, quantization=None) == _nano()
        known = dict.fromkeys([*DRAFTERS, *([OF_NANO] if is_nano else []), *drafters])
        made = {shown_drafter(drafter): make(drafter, model) for drafter in known}
        context = min(CONTEXT, model.config.max_position_embeddings)
        require_room(model, context, sum(memory(drafter, context) for drafter in made.values()))
        asked = prompts.NANO if is_nano else prompts.GENERAL
        return cls(shown_name(name), model, made, _encoded(tokenizer, asked), devices(), tell)

    def greedy(self, max_tokens: int) -> GenerationConfig:
        """The most likely token, nothing else: what shows whether two ways give the same answer."""
        plain = {"repetition_penalty": 1.0, "logit_bias": {}}
        return self.model.generation_config.replace(temperature=0.0, max_new_tokens=max_tokens, **plain)

    def draws(self) -> Draws:
        return Draws([SEED], self.model.config.vocab_size)

    def text(self, length: int) -> list[int]:
        """Ids to encode before something is timed: the prompts, again and again."""
        ids = [token for prompt in self.prompts.values() for token in prompt]
        return (ids * (length // len(ids) + 1))[:length]

    def pace(self, clock: Callable[[], float]) -> float:
        """Seconds of an AR step, roughly: between two tokens, the first of which compiled kernels. Kept."""
        if self._pace is None:
            steps = decode(self.model, self.text(8), self.greedy(3), self.draws())
            times = [clock() for _ in _until(3, steps)]
            self._pace = times[1] - times[0] if len(times) > 1 else 0.0
        return self._pace

    @contextmanager
    def watched(self, label: str) -> Iterator[None]:
        """Note the peak memory of the block."""
        mx.reset_peak_memory()
        try:
            yield
        finally:
            self.peaks[label] = max(self.peaks.get(label, 0), mx.get_peak_memory())

    def facts(self) -> dict[str, Any]:
        """What the model is, in lines."""
        config, weights = self.model.config, self.model.memory.weights
        sizes = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, {config.num_experts} experts"
        dtype = str(self.model.dtype).removeprefix("mlx.core.")
        return {
            "model": f"{self.name}: {sizes} (top {config.top_k_experts}), canvas {config.canvas_length}",
            "weights": f"{weights / GB:.3f} GB, activations {dtype}, {quantisation(config)}",
        }


def quantisation(config: ModelConfig) -> str:
    """Bits, group size, and how many modules have others."""
    if config.quantization is None:
        return "not quantised"
    settings = dict(config.quantization)
    own = sum(not isinstance(value, str | int) or isinstance(value, bool) for value in settings.values())
    mode = settings.get("mode", "affine")
    return f"{settings.get('bits')}-bit, groups of {settings.get('group_size')}, {mode}; {own} modules set apart"


def _nano() -> ModelConfig:
    return ModelConfig.read(EMBEDDED)


def _encoded(tokenizer: TokenizerWrapper, texts: dict[str, str]) -> dict[str, list[int]]:
    return {label: encode_prompt(tokenizer, text) for label, text in texts.items()}


def _until(count: int, items: Iterator[Any]) -> Iterator[Any]:
    """The first `count`; the generator is closed afterwards."""
    try:
        for _, item in zip(range(count), items, strict=False):
            yield item
    finally:
        items.close()


def turned_off(name: str, failure: str) -> str:
    """What became of a drafter that raised; `name` stands for its own, which may be a path."""
    call, _, raised = failure.partition(" raised ")
    return f"{name} was turned off: {call.rpartition('.')[2]} raised {raised}"


def seconds_of(run: Callable[[], Any], budget: Budget, most: int) -> list[float]:
    """Seconds of `run`: a warm-up, then at most `most` more, as long as the budget lasts; none if it is over."""
    times: list[float] = []
    while len(times) <= most and budget.has(times[-1] if times else 0.0):
        started = budget.clock()
        run()
        times.append(budget.clock() - started)
    return times

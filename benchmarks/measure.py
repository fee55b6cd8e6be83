"""What benchmarks share: questions, one measured answer, our side of a comparison, and intervals of ratios."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import mlx.core as mx
from mlx.utils import tree_reduce

from mlx_dgemma import __version__
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.diffusion import Block, decode
from mlx_dgemma.draws import Draws
from mlx_dgemma.model import DiffusionGemma

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

FEWEST_PAIRS = 5  # fewer give no interval
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt's ids and the right answer; None if there is none."""

    ids: list[int]
    expected: str | None


def is_right(tokenizer: TokenizerWrapper, tokens: Sequence[int], question: Question, eos: Sequence[int]) -> bool:
    ids = tokens[:-1] if tokens[-1] in eos else tokens
    return tokenizer.decode(list(ids)) == question.expected


def environment(name: str, model: DiffusionGemma) -> dict[str, str]:
    """What the figures of the model that was given as `name` depend on."""
    return {
        "model": name,
        "mlx_dgemma": __version__,
        "mlx": mx.__version__,
        "device": f"{mx.default_device().type.name}, {mx.device_info().get('device_name', 'unknown')}",
        "dtype": str(model.dtype).removeprefix("mlx.core."),
    }


def alternating(items: Sequence[T], number: int) -> Sequence[T]:
    """The order in which pair `number` runs `items`: forwards and backwards in turn."""
    return items if number % 2 == 0 else items[::-1]


def spare_compiler() -> None:
    """mlx-lm and mlx-vlm compile elementwise functions, which on a CPU takes g++: do without it if there is none."""
    if mx.default_device() == mx.cpu and shutil.which("g++") is None:
        mx.disable_compile()


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One prompt answered with one canvas."""

    tokens: list[int]  # eos included
    prompt_tokens: int
    prefill_seconds: float
    denoise_forwards: int
    denoise_seconds: float
    encode_forwards: int
    peak_bytes: int  # the engine's own weights and what the answer took beside them

    @property
    def ms_per_step(self) -> float:
        return 1e3 * self.denoise_seconds / self.denoise_forwards

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.prefill_seconds

    @property
    def forwards_per_token(self) -> float:
        return (self.denoise_forwards + self.encode_forwards) / len(self.tokens)


class PeakMemory:
    """Bytes that an engine needs at most inside the block, whatever else this process holds."""

    def __init__(self, weights: int):
        self._weights = weights

    def __enter__(self) -> PeakMemory:
        mx.clear_cache()
        mx.reset_peak_memory()
        self._before = mx.get_active_memory()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._weights + max(0, mx.get_peak_memory() - self._before)


def weight_bytes(parameters: dict) -> int:
    return tree_reduce(lambda total, array: total + array.nbytes, parameters, 0)


class TimedOurs:
    """This package."""

    name = f"mlx_dgemma {__version__}"

    def __init__(self, model: DiffusionGemma):
        self.model = model
        self._weights = weight_bytes(model.parameters())

    def answer(self, prompt: list[int], config: GenerationConfig, seed: int) -> Timed:
        """Decode one canvas; the clock starts with the prefill and stops when the canvas is on the host."""
        clock = [time.perf_counter()]
        counts, draws = Counts(), Draws([seed], self.model.config.vocab_size)

        def prefilled(done: int, total: int) -> None:
            if done == total:
                clock.append(time.perf_counter())

        with PeakMemory(self._weights) as peak:
            events = decode(self.model, prompt, config, draws, counts=counts, progress=prefilled)
            block = next(event for event in events if isinstance(event, Block))
            start, prefill_end, end = *clock, time.perf_counter()
        return Timed(
            tokens=block.tokens,
            prompt_tokens=len(prompt),
            prefill_seconds=prefill_end - start,
            denoise_forwards=counts.denoise_forwards,
            denoise_seconds=end - prefill_end,
            encode_forwards=counts.encode_forwards,
            peak_bytes=peak.bytes,
        )


@dataclass(frozen=True)
class Ratio:
    """A ratio of paired measurements with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Geometric mean of ours / theirs and its 95 % t-interval, from the log-ratios of the pairs."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(logs)
    half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion in 1 / freedom; within 0.1 % from 4 degrees on."""
    if freedom < 4:
        raise ValueError(f"at least 4 degrees of freedom, not {freedom}: take 5 pairs or more")
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))

"""mlx-vlm on the same weights: its own model classes and its own generation loop, set to the reference sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.config import GenerationConfig, ModelConfig, read_json
from mlx_dgemma.convert.configs import mlx_config
from mlx_dgemma.errors import InputError

from .measure import PeakMemory, Timed, spare_compiler, weight_bytes

TESTED = "0.7.10"


def installed_version() -> str:
    """Raises InputError if mlx-vlm is not installed."""
    try:
        return version("mlx-vlm")
    except PackageNotFoundError:
        raise InputError(
            f"mlx-vlm is not installed: `pip install mlx-vlm=={TESTED}`, or measure this package alone"
        ) from None


class MlxVlm:
    """mlx-vlm's DiffusionGemma.

    Args:
        config: ours, whose defaults for keys that config.json leaves out are transformers'.
        dtype: of the weights; None: as they are stored.
    """

    def __init__(self, folder: Path, config: ModelConfig, dtype: mx.Dtype | None):
        self.name = f"mlx-vlm {installed_version()}"
        if config.quantization is not None:
            raise InputError(f"{folder}: mlx-vlm is run on floats alone here, not on quantised weights; give those")
        spare_compiler()
        from mlx_vlm.models.diffusion_gemma import Model
        from mlx_vlm.models.diffusion_gemma import ModelConfig as TheirConfig
        from mlx_vlm.tokenizer_utils import load_tokenizer

        raw = mlx_config(read_json(folder / "config.json"), config, has_vision=False)
        self._model = Model(TheirConfig.from_dict(raw))
        checkpoint = Checkpoint(folder)
        weights = self._model.sanitize(dict(checkpoint.arrays(checkpoint.text_tensors())))
        cast = {name: array if dtype is None else array.astype(dtype) for name, array in weights.items()}
        self._model.load_weights(list(cast.items()))
        self._model.eval()
        mx.eval(self._model.parameters())
        self._weights = weight_bytes(self._model.parameters())
        self._tokenizer = load_tokenizer(folder)

    def answer(self, prompt: list[int], config: GenerationConfig, seed: int) -> Timed:
        """Denoise one canvas. Times are those of its own statistics, taken when the canvas is on the host."""
        results = self.results(prompt, config, seed)
        with PeakMemory(self._weights) as peak:
            first = next(results)
        tokens, last = emitted(chain([first], results))
        return Timed(
            tokens=tokens,
            prompt_tokens=len(prompt),
            prefill_seconds=first.prompt_tokens / first.prompt_tps,
            denoise_forwards=last.diffusion_denoising_steps,
            denoise_seconds=first.generation_tokens / first.generation_tps,
            encode_forwards=1,
            peak_bytes=peak.bytes,
        )

    def results(self, prompt: list[int], config: GenerationConfig, seed: int) -> Iterator[Any]:
        """Its own results, one per token and one more per canvas, of as many canvases as it takes."""
        from mlx_vlm.generate.diffusion import stream_diffusion_generate
        from mlx_vlm.utils import StoppingCriteria

        self._tokenizer.stopping_criteria = StoppingCriteria(list(config.eos_token_ids), self._tokenizer)
        self._model.config.generation_config = _as_json(config)
        mx.random.seed(seed)
        return stream_diffusion_generate(
            self._model,
            self._tokenizer,
            self._tokenizer,
            mx.array([prompt]),
            None,
            None,
            max_tokens=config.max_new_tokens,
            skip_special_token_ids=[],
            temperature=1.0,  # its default of 0 takes the argmax where the reference draws
            max_denoising_steps=config.max_denoising_steps,
            diffusion_full_canvas=True,  # its default shrinks the canvas to the tokens asked for
            diffusion_sampler="entropy-bound",  # its default reveals by confidence
        )


def emitted(results: Iterable[Any]) -> tuple[list[int], Any]:
    """The ids of an answer, eos included, and the last result, which has the counts."""
    tokens: list[int] = []
    for last in results:
        if last.generation_tokens > len(tokens):
            tokens.append(last.token)
    return tokens, last


def _as_json(config: GenerationConfig) -> dict[str, Any]:
    """generation_config.json, from where mlx-vlm takes what is not an argument."""
    return {
        "eos_token_id": list(config.eos_token_ids),
        "t_min": config.t_min,
        "t_max": config.t_max,
        "stability_threshold": config.stability_threshold,
        "confidence_threshold": config.confidence_threshold,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": config.entropy_bound},
    }

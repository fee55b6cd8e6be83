"""Who answers prompts: this package in both modes, and transformers and mlx-vlm in diffusion mode.

All of them get the same ids for a prompt and have their ids read by the same code, so that nothing but the decoding
is compared. Nothing heavy is imported before an engine is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from mlx_dgemma.check.paths import shown_name
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.options import OF_A_DRAFTER, sampler_options

from .engine import Answered, Engine, Setup

if TYPE_CHECKING:
    from mlx_dgemma.config import ModelConfig
    from mlx_dgemma.prompt import Prompt

OURS = "mlx_dgemma"
DTYPES = ("float32", "bfloat16", "float16")
SAMPLE = 1 << 16  # bytes of a tensor that its fingerprint is of


def fingerprint(folder: Path) -> str:
    """Of tensors' names, kinds and first bytes: other after a training, the same in other shards or another place."""
    from mlx_dgemma.checkpoint import Checkpoint

    digest = hashlib.sha256()
    for name, info in sorted(Checkpoint(folder).text_tensors().items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with info.shard.open("rb") as file:
            file.seek(info.offset)
            digest.update(file.read(min(SAMPLE, info.nbytes)))
    return f"sha256 {digest.hexdigest()[:16]}"


class Ours:
    """This package."""

    def __init__(self, setup: Setup):
        from mlx_dgemma.drafter import make
        from mlx_dgemma.loading import load, resolve

        dtype = _mlx_dtype(setup.dtype)  # what cannot run is not fetched
        self._setup = setup
        self._folder = resolve(setup.model, setup.revision)
        self.model, self.tokenizer = load(self._folder, dtype=dtype)
        self.config = setup.config(self.model.generation_config)
        options = setup.given
        self._drafter = make(options.get("drafter"), self.model, **{n: options.get(n) for n in OF_A_DRAFTER})
        # a drafter's weights are loaded here, once, and not by its name for every prompt
        self._options = {n: v for n, v in options.items() if n not in (*OF_A_DRAFTER, "drafter")}

    def facts(self) -> dict[str, Any]:
        from .measure import environment

        facts = environment(shown_name(self._setup.model), self.model)
        return {"engine": f"{OURS} {facts.pop(OURS)}", **facts, "weights": fingerprint(self._folder)}

    def ids(self, prompt: Prompt, thinking: bool) -> list[int]:
        return self._setup.ids(self.tokenizer, prompt, thinking, self.model)

    def answer(self, ids: list[int], seed: int) -> Answered:
        from mlx_dgemma import stream_generate

        mode, text = self._setup.mode, ""
        drafter = {"drafter": self._drafter} if self._drafter is not None else {}
        for last in stream_generate(
            self.model,
            self.tokenizer,
            ids,
            max_tokens=self._setup.max_tokens,
            mode=mode,
            seed=seed,
            **self._options,
            **drafter,
        ):
            text += last.text
        return Answered(
            text=text,
            tokens=last.generation_tokens,
            canvases=last.canvas_index + 1 if mode == "diffusion" else 0,
            denoise_forwards=last.denoise_forwards,
            encode_forwards=last.encode_forwards,
            verify_passes=last.draft_rounds,
            drafted=last.drafted_tokens,
            accepted=last.accepted_tokens,
            drafter_failure=last.drafter_failure,
            finish_reason=last.finish_reason,
        )


class Other:
    """What transformers and mlx-vlm share here: the checkpoint's settings, and the way from text to ids and back."""

    def __init__(self, setup: Setup):
        from mlx_lm.tokenizer_utils import load

        from mlx_dgemma.config import ModelConfig
        from mlx_dgemma.loading import read_generation_config, resolve

        self._setup = setup
        self.folder: Path = resolve(setup.model, setup.revision)
        self.shape = ModelConfig.read(self.folder)
        own = read_generation_config(self.folder, self.shape)
        self._tokenizer = load(self.folder, eos_token_ids=list(own.eos_token_ids) or None)
        if not own.eos_token_ids:
            own = own.replace(eos_token_ids=tuple(sorted(self._tokenizer.eos_token_ids)))
        self.config = setup.config(own)

    def ids(self, prompt: Prompt, thinking: bool) -> list[int]:
        of_the_model = SimpleNamespace(config=self.shape)  # all that is looked at
        return self._setup.ids(self._tokenizer, prompt, thinking, of_the_model)

    def text(self, ids: Sequence[int]) -> str:
        """As `stream_generate` hands it out."""
        from mlx_dgemma.transcript import Transcript

        transcript = Transcript(self._tokenizer)
        return transcript.add(ids).text + transcript.finish().text


class Transformers(Other):
    """The reference's own `generate`."""

    def __init__(self, setup: Setup):
        super().__init__(setup)
        require_readable(self.shape, setup.model)
        try:
            import torch
            from transformers import DiffusionGemmaForBlockDiffusion
        except ImportError as error:
            raise InputError(
                f"--engine transformers needs torch and transformers ({error}); pip install 'mlx-dgemma[reference]'"
            ) from None
        self._device = "cuda" if setup.device == "gpu" else "cpu"
        if self._device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device gpu: torch sees no CUDA device here; use --device cpu")
        dtype = getattr(torch, setup.dtype or "float32")
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(self.folder, dtype=dtype)
        self._model = model.to(self._device).eval()

    def facts(self) -> dict[str, Any]:
        return {
            "engine": f"transformers {version('transformers')}",
            "model": shown_name(self._setup.model),
            "weights": fingerprint(self.folder),
            "torch": version("torch"),
            "device": self._device,
            "dtype": str(self._model.dtype).removeprefix("torch."),
        }

    def answer(self, ids: list[int], seed: int) -> Answered:
        import torch

        from mlx_dgemma.decoding.diffusion import cut

        torch.manual_seed(seed)
        counter = StepCounter()
        prompt = torch.tensor([ids], device=self._device)
        output = self._model.generate(prompt, generation_config=self._generation_config(), streamer=counter)
        new = output.sequences[0, len(ids) :].tolist()
        tokens, reason = cut(new, self.config.eos_token_ids, self.config.max_new_tokens)
        return Answered(
            text=self.text(tokens),
            tokens=len(tokens),
            canvases=counter.canvases,
            denoise_forwards=counter.steps,
            encode_forwards=counter.canvases,  # the prompt's, and one behind every canvas but the last
            finish_reason=reason,
        )

    def _generation_config(self) -> Any:
        from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

        names = (*sampler_options("diffusion"), "max_new_tokens", "pad_token_id")
        options = {name: getattr(self.config, name) for name in names}
        options["sampler_config"] = generation.EntropyBoundSamplerConfig(float(options.pop("entropy_bound")))
        options["confidence_threshold"] = float(options["confidence_threshold"])
        options["eos_token_id"] = list(self.config.eos_token_ids)
        return generation.DiffusionGemmaGenerationConfig(**options)


class StepCounter:
    """A streamer that counts what transformers' loop streams: the prompt, every step's draft, every canvas."""

    def __init__(self) -> None:
        self.steps, self.canvases = 0, -1

    def put(self, ids: Any) -> None:
        self.canvases += 1

    def put_draft(self, value: Any) -> None:
        self.steps += 1

    def end(self) -> None:
        """Nothing is left to do."""


class Vlm(Other):
    """mlx-vlm, set to the reference sampler."""

    def __init__(self, setup: Setup):
        import mlx.core as mx

        from .vlm import MlxVlm, installed_version

        installed_version()  # this and the dtype are said before anything is loaded
        is_cpu = mx.default_device() == mx.cpu
        dtype = _mlx_dtype(setup.dtype or ("float32" if is_cpu else None))  # what `load` chooses
        super().__init__(setup)
        self._engine = MlxVlm(self.folder, self.shape, dtype)
        self._facts = {
            "engine": self._engine.name,
            "model": shown_name(setup.model),
            "weights": fingerprint(self.folder),
            "mlx": mx.__version__,
            "device": mx.default_device().type.name,
            "dtype": "as stored" if dtype is None else str(dtype).removeprefix("mlx.core."),
        }

    def facts(self) -> dict[str, Any]:
        return self._facts

    def answer(self, ids: list[int], seed: int) -> Answered:
        from .vlm import emitted

        tokens, last = emitted(self._engine.results(ids, self.config, seed))
        canvases = last.diffusion_canvas_tokens // self.shape.canvas_length
        return Answered(
            text=self.text(tokens),
            tokens=len(tokens),
            canvases=canvases,
            denoise_forwards=last.diffusion_denoising_steps,
            encode_forwards=canvases,  # the prompt's, and one behind every canvas but the last
            finish_reason=last.finish_reason,
        )


def require_readable(shape: ModelConfig, name: str) -> None:
    """Raise InputError if transformers cannot read weights of a config.json."""
    if shape.quantization is not None and "quant_method" not in shape.quantization:
        raise InputError(
            f"{name}: its weights are quantised as MLX does, which transformers cannot read; "
            "write floats with mlx_dgemma.convert --dequantize --export hf"
        )


ENGINES: dict[str, Callable[[Setup], Engine]] = {OURS: Ours, "transformers": Transformers, "mlx-vlm": Vlm}


def require_possible(name: str, setup: Setup) -> None:
    """Raise UsageError for what an engine does not have; nothing is loaded for that."""
    if name == OURS:
        return
    if setup.mode != "diffusion":
        raise UsageError(f"--mode {setup.mode} is judged in this package alone (--engine {OURS})")
    for option in setup.given:
        if option not in sampler_options("diffusion"):
            raise UsageError(f"{option} is an option of this package alone (--engine {OURS})")


def _mlx_dtype(name: str | None) -> Any:
    """Raises UsageError for what the default device cannot run."""
    import mlx.core as mx

    if name not in (None, "float32") and mx.default_device().type == mx.DeviceType.cpu:
        raise UsageError(f"--dtype {name}: MLX has no expert matmul of it on a CPU; use float32, or a GPU")
    return None if name is None else getattr(mx, name)

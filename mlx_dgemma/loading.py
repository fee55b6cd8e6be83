"""load(): a checkpoint, from a folder, the Hub, or this package, as a model and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .checkpoint import Checkpoint, TensorInfo, module_name, tensor_name
from .config import GenerationConfig, ModelConfig, read_json
from .errors import InputError, UsageError
from .memory import estimate, require_fit
from .model import DiffusionGemma

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

NANO = "nano"
EMBEDDED = Path(__file__).parent / "nano"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "model*.safetensors", "*.jinja", "tokenizer*", "*.model"]
ESTIMATE_CONTEXT = 8192  # tokens that the memory estimate of load() assumes, if the model has as many
CACHE_LIMIT = 2 << 30  # bytes of freed buffers that MLX may keep on a GPU


def resolve(path_or_repo: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `nano`, an existing folder, or a Hub id (downloaded if need be)."""
    if not str(path_or_repo):
        raise InputError("the name of the model is empty; give a folder, a Hub id, or nano")
    try:
        path = EMBEDDED if str(path_or_repo) == NANO else Path(path_or_repo).expanduser()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{path_or_repo!r}: not a folder or a Hub id ({error})") from None
    if path.is_dir() and revision is not None:
        raise UsageError(f"revision {revision!r} is of a Hub repository; {path_or_repo} is a folder")
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{path}: is a file; give the folder that holds config.json")
    if not HUB_ID.fullmatch(str(path_or_repo)):
        raise InputError(f"{path_or_repo}: no such folder, and not a Hub id (owner/name)")
    return _download(str(path_or_repo), revision)


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise InputError(f"{repo}: no such folder here and no such repository on the Hub (or it is gated)") from None
    except Exception as error:  # the hub client lets through what its HTTP library raises
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(
            f"{repo}: no such folder here, and it cannot be downloaded from the Hub ({reason}); "
            "check the name and the network"
        ) from None


def load(
    path_or_repo: str | Path = NANO,
    *,
    tokenizer_config: dict[str, Any] | None = None,
    dtype: mx.Dtype | None = None,
    lazy: bool = False,
    revision: str | None = None,
) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """Load a checkpoint in the HF layout.

    Args:
        path_or_repo: "nano" (embedded in this package), a folder, or a Hub id.
        tokenizer_config: extra arguments for the tokenizer.
        dtype: of unquantised weights and activations. Default: as stored on a GPU, float32 on a CPU,
            where MLX has no other expert matmul.
        lazy: leave tensors on disk until first used.
        revision: of the Hub repository.

    Raises:
        InputError: one line that names the file, key or tensor that is wrong.
    """
    folder = resolve(path_or_repo, revision)
    model = load_model(folder, dtype=dtype, lazy=lazy)
    tokenizer = load_tokenizer(folder, model, tokenizer_config)
    if not model.generation_config.eos_token_ids:
        model.generation_config = model.generation_config.replace(eos_token_ids=tuple(sorted(tokenizer.eos_token_ids)))
    return model, tokenizer


def load_model(folder: str | Path, *, dtype: mx.Dtype | None = None, lazy: bool = False) -> DiffusionGemma:
    """The model of a checkpoint folder, with its `generation_config`; see `load`."""
    folder = Path(folder)
    config = ModelConfig.read(folder)
    checkpoint = Checkpoint(folder)
    tensors = checkpoint.text_tensors()
    if dtype is None and mx.default_device() == mx.cpu:
        dtype = mx.float32
    model = DiffusionGemma(config)
    _quantize(model, config, {module_name(name) for name in tensors})
    _check_names(model, tensors, folder)
    arrays = checkpoint.arrays(tensors)
    weights = {module_name(name): _laid_out(name, _cast(array, dtype)) for name, array in arrays.items()}
    model.load_weights(list(weights.items()))
    model.eval()
    model.generation_config = read_generation_config(folder, config)
    context = min(ESTIMATE_CONTEXT, config.max_position_embeddings)
    model.memory = estimate(config, sum(w.nbytes for w in weights.values()), model.dtype, context)
    require_fit(model.memory, str(folder))
    if mx.default_device() == mx.gpu:
        mx.set_cache_limit(CACHE_LIMIT)
    if not lazy:
        mx.eval(model.parameters())
    return model


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.astype(dtype) if dtype is not None and is_float else array


def _laid_out(name: str, array: mx.array) -> mx.array:
    """On a CPU, matrices stored by columns: its BLAS multiplies x @ W.T a quarter faster so, bit for bit the same."""
    is_matrix = array.ndim >= 2 and mx.issubdtype(array.dtype, mx.floating) and "embed_tokens" not in name
    if mx.default_device() == mx.gpu or not is_matrix or name.endswith((".scales", ".biases")):
        return array
    return mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2)


def _quantize(model: DiffusionGemma, config: ModelConfig, paths: set[str]) -> None:
    """Give the model the quantised modules that the checkpoint has scales for."""
    if config.quantization is None:
        return
    settings = dict(config.quantization)

    def quantised(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in paths or not hasattr(module, "to_quantized"):
            return False
        own = settings.get(path)
        return own if isinstance(own, dict) else True

    try:
        size, bits, mode = settings["group_size"], settings["bits"], settings.get("mode", "affine")
    except KeyError as error:
        raise InputError(f"config.json: quantization has no {error}; this kind is not supported") from None
    try:
        nn.quantize(model, group_size=size, bits=bits, mode=mode, class_predicate=quantised)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"config.json: quantization {size=} {bits=} {mode=} cannot be used ({error})") from None


def _check_names(model: DiffusionGemma, tensors: dict[str, TensorInfo], folder: Path) -> None:
    """Every tensor of the model is there, with its shape, and no other. Stacks of experts are named either way."""
    expected = dict(tree_flatten(model.parameters()))
    given = {module_name(name): info for name, info in tensors.items()}
    for path in sorted(expected.keys() - given.keys()):
        raise InputError(f"{folder}: tensor {tensor_name(path)} is missing, which config.json calls for")
    for name, info in sorted(tensors.items()):
        path = module_name(name)
        if path not in expected or given[path] is not info:
            raise InputError(f"{info.shard}: tensor {name} has no place in the model of config.json")
        wanted = tuple(expected[path].shape)
        if info.shape != wanted:
            raise InputError(f"{info.shard}: tensor {name} has the shape {info.shape}, config.json calls for {wanted}")
        if mx.issubdtype(expected[path].dtype, mx.floating) and info.dtype not in ("F32", "F16", "BF16"):
            raise InputError(f"{info.shard}: tensor {name} is {info.dtype}; weights must be F32, F16 or BF16")


def read_generation_config(folder: Path, config: ModelConfig) -> GenerationConfig:
    """generation_config.json if there is one; eos and pad from there, else from text_config."""
    path = folder / "generation_config.json"
    generation = GenerationConfig.from_dict(read_json(path), str(path)) if path.exists() else GenerationConfig()
    if not generation.eos_token_ids:
        generation = generation.replace(eos_token_ids=config.eos_token_ids)
    if generation.pad_token_id is None:
        generation = generation.replace(pad_token_id=config.pad_token_id)
    return generation


def load_tokenizer(folder: Path, model: DiffusionGemma, extra: dict[str, Any] | None = None) -> TokenizerWrapper:
    """mlx_lm's wrapper around the checkpoint's tokenizer."""
    from mlx_lm.tokenizer_utils import load as load_wrapped

    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        raise InputError(f"{folder}: no tokenizer.json here; take it from the original checkpoint")
    try:
        return load_wrapped(folder, extra, eos_token_ids=list(model.generation_config.eos_token_ids) or None)
    except Exception as error:  # whatever a broken tokenizer file makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{folder}: the tokenizer cannot be loaded ({reason})") from None

"""DiffusionGemma on MLX.

from mlx_dgemma import load, generate

model, tokenizer = load("nano")
print(generate(model, tokenizer, "json name=Ann age=31 city=Oslo"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `convert` and `generate` are functions and submodules: importing the functions here binds the names to them for good.
from .convert import convert
from .errors import InputError, UsageError
from .generate import generate, stream_generate
from .response import GenerationResponse
from .version import __version__

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .model import DiffusionGemma

__all__ = [
    "GenerationResponse",
    "InputError",
    "UsageError",
    "__version__",
    "convert",
    "generate",
    "load",
    "stream_generate",
]


def load(path_or_repo: str = "nano", **options: Any) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """A checkpoint ("nano", a folder or a Hub id) as (model, tokenizer); see `mlx_dgemma.loading.load`."""
    from .loading import load as load_checkpoint

    return load_checkpoint(path_or_repo, **options)

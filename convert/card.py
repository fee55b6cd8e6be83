"""The model card of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..loading import HUB_ID
from ..version import __version__

if TYPE_CHECKING:
    from .conversion import Conversion, Options

BASE_MODEL = "google/diffusiongemma-26B-A4B-it"
USE = {
    "mlx": "mlx_dgemma.generate --model {name} --prompt ...",
    "gemma4": "mlx_lm.generate --model {name} --prompt ...",
    "hf": "transformers: DiffusionGemmaForBlockDiffusion.from_pretrained('{name}')",
}


def card(conversion: Conversion, source: str, name: str) -> str:
    """README.md: front matter as the Hub reads it, how it was made, and how it is run.

    Args:
        source: what was converted, as it was named; of a path its last part, as nobody else has the others.
        name: of the result.
    """
    options = conversion.options
    if HUB_ID.fullmatch(source) and not Path(source).exists():
        base = shown = source
    else:
        base, shown = BASE_MODEL, Path(source).name
    return f"""---
library_name: {"transformers" if options.export == "hf" else "mlx"}
base_model: {base}
pipeline_tag: text-generation
---

# {name.rsplit("/", 1)[-1]}

DiffusionGemma, export {options.export}, {_made(conversion)}: {conversion.bits_per_weight:.3f} bits per weight.
Made by mlx_dgemma {__version__} from `{shown}` ({conversion.source.form}):

    {_command(options, shown)}

Run it: `{USE[options.export].format(name=name)}`
"""


def _made(conversion: Conversion) -> str:
    if conversion.keeps:
        return "quantised as its source is"
    return f"quantised by {conversion.recipe.name}" if conversion.recipe else "floats"


def _command(options: Options, source: str) -> str:
    words = ["mlx_dgemma.convert", "--hf-path", source]
    words += ["-q"] if options.quantize else []
    for name in ("q_bits", "q_group_size", "q_mode", "quant_recipe", "dtype"):
        value = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    words += ["--dequantize"] if options.dequantize else []
    words += ["--export", options.export] if options.export != "mlx" else []
    return " ".join(words)

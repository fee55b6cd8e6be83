"""The model card of a conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..version import __version__

if TYPE_CHECKING:
    from .conversion import Conversion

BASE_MODEL = "google/diffusiongemma-26B-A4B-it"
USE = {
    "mlx": "mlx_dgemma.generate --model PATH --prompt ...",
    "gemma4": "mlx_lm.generate --model PATH --prompt ...",
    "hf": "transformers: DiffusionGemmaForBlockDiffusion.from_pretrained('PATH')",
}


def card(conversion: Conversion) -> str:
    """README.md: front matter as the Hub reads it, how it was made, and how it is run."""
    options, source, recipe = conversion.options, conversion.source, conversion.recipe
    library = "transformers" if options.export == "hf" else "mlx"
    made = f"recipe {recipe.name}" if recipe else "floats"
    return f"""---
library_name: {library}
base_model: {BASE_MODEL}
pipeline_tag: text-generation
---

# DiffusionGemma, {options.export}, {made}

{conversion.bits_per_weight:.3f} bits per weight.
Made by mlx_dgemma {__version__} from `{source.folder.name}` ({source.form}):

    {_command(conversion)}

Run it: `{USE[options.export]}`
"""


def _command(conversion: Conversion) -> str:
    options = conversion.options
    words = ["mlx_dgemma.convert", "--hf-path", conversion.source.folder.name]
    words += ["-q"] if options.quantize else []
    for name in ("q_bits", "q_group_size", "q_mode", "quant_recipe", "dtype"):
        value = getattr(options, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    words += ["--dequantize"] if options.dequantize else []
    words += ["--export", options.export] if options.export != "mlx" else []
    return " ".join(words)

"""The model card of a conversion."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..loading import HUB_ID
from ..version import __version__

if TYPE_CHECKING:
    from .conversion import Conversion, Options

BASE_MODEL = "google/diffusiongemma-26B-A4B-it"
USE = {
    "mlx": "mlx_dgemma.generate --model {name} --prompt ...",
    "gemma4": """mlx_lm.generate --model {name} --chat-template-config '{{"enable_thinking": false}}' --prompt ...""",
    "hf": "transformers: DiffusionGemmaForBlockDiffusion.from_pretrained('{name}')",
}


@dataclass(frozen=True)
class Origin:
    """What was converted, as it was named, and its revision."""

    place: str
    revision: str | None = None

    @property
    def is_hub_id(self) -> bool:
        return HUB_ID.fullmatch(self.place) is not None and not Path(self.place).exists()

    @property
    def name(self) -> str:
        """A Hub id whole; of a path the last part, as nobody else has the others."""
        return self.place if self.is_hub_id else Path(self.place).expanduser().resolve().name


def card(conversion: Conversion, origin: Origin, name: str) -> str:
    """README.md: front matter as the Hub reads it, how it was made, and how it is run.

    Args:
        name: of the result, a folder's or a Hub id.
    """
    options, last = conversion.options, name.rsplit("/", 1)[-1]
    return f"""---
library_name: {"transformers" if options.export == "hf" else "mlx"}
base_model: {origin.name if origin.is_hub_id else BASE_MODEL}
pipeline_tag: text-generation
---

# {last}

DiffusionGemma, export {options.export}, {_made(conversion)}: {conversion.bits_per_weight:.3f} bits per weight.
Made by mlx_dgemma {__version__} from `{origin.name}` ({conversion.source.form}):

    {_command(options, origin, last)}
{_rules(conversion)}
Run it: `{USE[options.export].format(name=shlex.quote(name))}`
"""


def _made(conversion: Conversion) -> str:
    if conversion.keeps:
        return "quantised as its source is"
    recipe = conversion.recipe
    return f"quantised by {recipe.name}" if recipe and recipe.rules else "floats"


def _command(options: Options, origin: Origin, name: str) -> str:
    words = ["mlx_dgemma.convert", "--hf-path", origin.name, "--mlx-path", name]
    words += [] if origin.revision is None else ["--revision", origin.revision]
    words += ["-q"] if options.quantize else []
    for option in ("q_bits", "q_group_size", "q_mode", "quant_recipe", "dtype"):
        value = getattr(options, option)
        value = Path(value).name if option == "quant_recipe" and value is not None else value
        words += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
    words += ["--dequantize"] if options.dequantize else []
    words += ["--export", options.export] if options.export != "mlx" else []
    return shlex.join(words)


def _rules(conversion: Conversion) -> str:
    """What stands in a recipe of one's own."""
    recipe = conversion.recipe
    if recipe is None or recipe.where is None:
        return ""
    settings = [(rule.pattern, rule.scheme.settings() if rule.scheme else {"bits": False}) for rule in recipe.rules]
    lines = ",\n".join(f"     {json.dumps({'pattern': pattern} | values)}" for pattern, values in settings)
    return f"\nwith {Path(recipe.where).name}:\n\n    [{lines.lstrip()}]\n"

"""Which modules are quantised, and how: recipes, the plan a recipe makes for a model, and config.json's block.

    recipe: rules, the first that matches a module decides --plan--> a scheme, or none, for each module
                                                          --block--> config.json's `quantization`

Modules of the vision tower are never quantised, as in mlx-vlm.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from .names import is_vision, module_of

DEFAULTS = {"affine": (4, 64), "mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}  # mode: bits, group size
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised: groups of `group_size` along a row share a scale (and, in affine mode, a bias)."""

    bits: int
    group_size: int
    mode: str = "affine"

    @classmethod
    def of(cls, mode: str | None = None, bits: int | None = None, group_size: int | None = None) -> Scheme:
        """A scheme of which some is given; the rest is mlx_lm's default of the mode. Raises UsageError."""
        mode = "affine" if mode is None else mode
        if not isinstance(mode, str) or mode not in DEFAULTS:
            raise UsageError(f"mode must be one of {', '.join(DEFAULTS)}, not {mode!r}")
        usual = DEFAULTS[mode]
        scheme = cls(usual[0] if bits is None else bits, usual[1] if group_size is None else group_size, mode)
        allowed = (AFFINE_BITS, AFFINE_GROUPS) if mode == "affine" else tuple((value,) for value in usual)
        for name, value, values in zip(("bits", "group_size"), (scheme.bits, scheme.group_size), allowed, strict=True):
            if type(value) is not int or value not in values:
                raise UsageError(f"{name} in mode {mode} must be {' or '.join(map(str, values))}, not {value!r}")
        return scheme

    def divides(self, shape: Sequence[int]) -> bool:
        return shape[-1] % self.group_size == 0

    def nbytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes of weight, scales and biases of a matrix of this shape; `itemsize` of its float values."""
        groups = prod(shape) // self.group_size
        return prod(shape) * self.bits // 8 + groups * (2 * itemsize if self.mode == "affine" else 1)

    def settings(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


@dataclass(frozen=True)
class Rule:
    """A pattern of modules and their scheme; None: leave them as they are.

    The pattern is a glob of the whole path, or, after `re:`, a regular expression found anywhere in it.
    """

    pattern: str
    scheme: Scheme | None

    def matches(self, module: str) -> bool:
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], module) is not None
        return fnmatchcase(module, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """A function from a module's path to its scheme, None for what stays as it is.

    Args:
        where: of a recipe that somebody wrote, its file: each rule must then match some module.
        dtype: of what is not quantised, as `--dtype` spells it; None: as it is.
    """

    name: str
    rules: tuple[Rule, ...]
    where: str | None = None
    dtype: str | None = None

    def __call__(self, module: str) -> Scheme | None:
        return next((rule.scheme for rule in self.rules if rule.matches(module)), None)


def _recipe(name: str, rules: Mapping[str, Scheme]) -> Recipe:
    return Recipe(name, tuple(Rule(pattern, scheme) for pattern, scheme in rules.items()))


def uniform(
    name: str = "-q", *, bits: int | None = None, group_size: int | None = None, mode: str | None = None
) -> Recipe:
    """What -q alone means, as in mlx_lm: every module alike, but for Gemma 4's routers at 8 bits in groups of 64.

    Raises UsageError for settings that MLX does not have.
    """
    return _recipe(name, {"*.router.proj": Scheme(8, 64), "*": Scheme.of(mode, bits, group_size)})


_DENSE = {"*.self_attn.*": Scheme(8, 64), "*.layers.*.mlp.*": Scheme(8, 64)}


def _careful(name: str, mode: str) -> Recipe:
    """Experts in a mode's 4 bits, attention and dense MLP in 8 bits, what every token passes through as it is."""
    return _recipe(name, {"*.experts.*": Scheme.of(mode), **_DENSE})


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _careful("default", "affine"),
        # self-conditioning is what mlx-vlm's predicate leaves at the global 4 bits
        _recipe(
            "mlx-community-4bit",
            {"*.embed_tokens": Scheme(8, 64), "*.router.proj": Scheme(8, 64), **_DENSE, "*": Scheme(4, 64)},
        ),
        uniform("8bit", bits=8),
        Recipe("bf16", (), dtype="bfloat16"),
        _careful("mxfp4", "mxfp4"),
        _careful("nvfp4", "nvfp4"),
    )
}


FLOATS = Recipe("floats", ())


def get_recipe(name_or_file: str | Path) -> Recipe:
    """A built-in recipe, or one from a file of rules (see `read_recipe`)."""
    if str(name_or_file) in RECIPES:
        return RECIPES[str(name_or_file)]
    path = Path(name_or_file).expanduser()
    if not path.is_file():
        raise UsageError(f"{name_or_file}: no such recipe ({', '.join(RECIPES)}) and no such file")
    return read_recipe(path)


def read_recipe(path: Path) -> Recipe:
    """A JSON list of rules in order, the first that matches a module decides, none: it stays as it is.

        [{"pattern": "*.experts.*", "bits": 4, "group_size": 64, "mode": "affine"},
         {"pattern": "re:layers\\.(0|29)\\.self_attn", "bits": false}]

    What a rule leaves out is the mode's default; `"bits": false` leaves the modules as they are.
    Raises InputError naming file and rule.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a recipe in JSON ({error})") from None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: must hold a JSON list of rules")
    rules = []
    for number, entry in enumerate(entries, 1):
        try:
            rules.append(_rule(entry))
        except (UsageError, re.error) as error:
            raise InputError(f"{path}: rule {number}: {error}") from None
    return Recipe(path.stem, tuple(rules), str(path))


def _rule(entry: Any) -> Rule:
    """One entry of a recipe file. Raises UsageError, and re.error for a pattern that is no regular expression."""
    if not isinstance(entry, dict) or not isinstance(entry.get("pattern"), str):
        raise UsageError(f'must be an object with a "pattern", not {entry!r:.80}')
    settings = {key: value for key, value in entry.items() if key != "pattern"}
    for key in settings.keys() - {"bits", "group_size", "mode"}:
        raise UsageError(f"unknown key {key!r}")
    pattern = entry["pattern"]
    if pattern.startswith("re:"):
        re.compile(pattern[3:])
    if settings.get("bits") is False:
        if len(settings) > 1:
            raise UsageError('"bits": false goes with nothing else')
        return Rule(pattern, None)
    if not settings:
        raise UsageError('says nothing: give "bits", "group_size" or "mode", or "bits": false')
    for key, value in settings.items():
        if value is None:
            raise UsageError(f"{key} must not be null")
    return Rule(pattern, Scheme.of(**settings))


def modules(tensors: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes by HF's names -> shapes of the modules that can be quantised: the matrices outside of vision."""
    return {module_of(name): tuple(s) for name, s in tensors.items() if len(s) > 1 and not is_vision(name)}


@dataclass(frozen=True)
class Plan:
    """What becomes of each module.

    Args:
        modules: shapes by path.
        schemes: by path; None: stays as it is.
    """

    modules: Mapping[str, tuple[int, ...]]
    schemes: Mapping[str, Scheme | None]

    def block(self, rename: Callable[[str], Sequence[str]] = lambda path: (path,)) -> dict[str, Any] | None:
        """config.json's `quantization`: the scheme of most weights, then other modules by path, false: not quantised.

        Args:
            rename: a path -> the paths of the modules it becomes in another tree.

        Returns:
            None if nothing is quantised.
        """
        sizes: Counter[Scheme] = Counter()
        for path, scheme in self.schemes.items():
            if scheme is not None:
                sizes[scheme] += prod(self.modules[path])
        if not sizes:
            return None
        usual = max(sizes, key=lambda scheme: sizes[scheme])
        own = {path: scheme.settings() if scheme else False for path, scheme in self.schemes.items() if scheme != usual}
        return usual.settings() | {new: value for path, value in own.items() for new in rename(path)}

    def nbytes(self, tensors: Mapping[str, Sequence[int]], itemsize: int = 2) -> int:
        """Bytes of all tensors once converted.

        Args:
            tensors: shapes by HF's names.
            itemsize: bytes of a float that is not quantised.
        """
        total = 0
        for name, shape in tensors.items():
            scheme = self.schemes.get(module_of(name))
            total += scheme.nbytes(shape, itemsize) if scheme else prod(shape) * itemsize
        return total

    def bits_per_weight(self, tensors: Mapping[str, Sequence[int]], itemsize: int = 2) -> float:
        """All bits, those of scales included, over all numbers; arguments as in `nbytes`.

        mlx_lm's figure is larger by less than 0.1 %: it leaves numbers such as `router.scale` out of the count.
        """
        return 8 * self.nbytes(tensors, itemsize) / sum(prod(shape) for shape in tensors.values())


def plan(recipe: Recipe, modules: Mapping[str, Sequence[int]]) -> Plan:
    """Apply a recipe to modules, by path and shape.

    Raises:
        InputError: a group does not divide a module's width (mlx_lm would leave that module out without a word),
            or a rule of a file matches no module.
    """
    for number, rule in enumerate(recipe.rules if recipe.where else (), 1):
        if not any(map(rule.matches, modules)):
            raise InputError(f"{recipe.where}: rule {number}: {rule.pattern!r} matches no module that can be quantised")
    schemes = {path: recipe(path) for path in modules}
    unfit = [path for path, scheme in schemes.items() if scheme and not scheme.divides(modules[path])]
    if unfit:
        path, others = unfit[0], f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
        raise InputError(
            f"quantised by {recipe.where or recipe.name}: groups of {schemes[path].group_size} do not divide the width "
            f"{modules[path][-1]} of {path}{others}; choose another group size, or leave such modules as they are "
            'by a rule with "bits": false'
        )
    return Plan({path: tuple(shape) for path, shape in modules.items()}, schemes)

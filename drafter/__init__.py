"""Drafters by name. To add one, give `DRAFTERS` its name and the place of its factory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .protocol import Draft, DraftContext, Drafter

if TYPE_CHECKING:
    from ..model import DiffusionGemma

__all__ = ["DRAFTERS", "Draft", "DraftContext", "Drafter", "check", "check_name", "make"]


@dataclass(frozen=True)
class Entry:
    """Where a drafter is made.

    Attributes:
        module: has `make(model, argument, **options)`, which returns a Drafter, and may have `check(argument,
            **options)`, which raises what can be said without the model; imported when it is asked for.
        argument: what follows the name after a colon, None: nothing does; in brackets: it may be left out.
        options: keywords of `make`.
    """

    module: str
    argument: str | None = None
    options: tuple[str, ...] = ()


DRAFTERS = {
    "lookup": Entry(".lookup"),
    "canvas": Entry(".canvas", "[POSITIONSxSTEPS]"),
    "block": Entry(".block", "FOLDER", ("drafter_bits", "draft_head_bits", "draft_vocab")),
}


def make(drafter: str | Drafter | None, model: DiffusionGemma, **options: Any) -> Drafter | None:
    """A drafter for one request, from its name ("lookup", "block:FOLDER") or an object that follows the protocol.

    Args:
        options: of the drafter that is named; None: not given.

    Raises UsageError for an unknown name or option, or an object that is no drafter of this model.
    """
    check_spelling(drafter, options)
    if drafter is None:
        return None
    if isinstance(drafter, str):
        name, argument = check_name(drafter)
        given = {key: value for key, value in options.items() if value is not None}
        return import_module(DRAFTERS[name].module, __name__).make(model, argument, **given)
    check_object(drafter, len(model.layers))
    if not callable(getattr(drafter, "fresh", None)):
        return drafter
    try:
        fresh = drafter.fresh()
    except Exception as error:
        raise UsageError(f"drafter {drafter!r:.80}: fresh() raised {type(error).__name__}: {error}") from None
    check_object(fresh, len(model.layers))
    return fresh


def memory(drafter: Drafter | None, context: int) -> int:
    """Bytes that it says it needs beside the main model, behind `context` tokens; 0 if it says nothing.

    Raises UsageError if what it says is no number of bytes.
    """
    says = getattr(drafter, "memory", None)
    if not callable(says):
        return 0
    try:
        return range(says(context) + 1)[-1]  # fails for what is no whole number, or below 0
    except Exception as error:
        raise UsageError(f"drafter {drafter!r:.80}: memory({context}) says no number of bytes ({error})") from None


def check(drafter: str | None, options: Mapping[str, Any]) -> None:
    """Raise what `make` would of a drafter by name, as far as it does not depend on the model."""
    check_spelling(drafter, options)
    if drafter is not None:
        name, argument = check_name(drafter)
        checked = getattr(import_module(DRAFTERS[name].module, __name__), "check", None)
        if checked is not None:
            checked(argument, **{key: value for key, value in options.items() if value is not None})


def check_spelling(drafter: str | Drafter | None, options: Mapping[str, Any]) -> None:
    """Raise UsageError for a name that does not exist, or an option that the drafter does not have."""
    known = DRAFTERS[check_name(drafter)[0]].options if isinstance(drafter, str) else ()
    for key, value in options.items():
        if value is not None and key not in known:
            owners = ", ".join(name for name, entry in DRAFTERS.items() if key in entry.options)
            this = "name it as drafter" if drafter is None else f"this is {drafter!r:.80}"
            raise UsageError(f"{key} is an option of the drafter {owners}; {this}")


def check_name(drafter: str) -> tuple[str, str | None]:
    """ "name" or "name:argument", taken apart. Raises UsageError if there is no such drafter."""
    name, colon, argument = drafter.partition(":")
    if name not in DRAFTERS:
        raise UsageError(f"drafter {drafter!r} does not exist; there are {', '.join(map(_spelled, DRAFTERS))}")
    wanted = DRAFTERS[name].argument
    needed = wanted is not None and not wanted.startswith("[")
    if (wanted is None and colon) or (colon and not argument) or (needed and not colon):
        raise UsageError(f"drafter {drafter!r}: write {_spelled(name)}")
    return name, argument or None


def check_object(drafter: object, layers: int) -> None:
    """Raise UsageError for an object that lacks what `Drafter` asks for."""
    if isinstance(drafter, type):
        raise UsageError(f"drafter {drafter!r:.80} is a class; give an object of it")
    for method in ("reset", "propose"):
        if not callable(getattr(drafter, method, None)):
            raise UsageError(f"drafter {drafter!r:.80} has no method {method}(); see mlx_dgemma.drafter.Drafter")
    taps = getattr(drafter, "taps", None)
    if not isinstance(taps, (tuple, list)) or any(type(tap) is not int or not 0 <= tap < layers for tap in taps):
        raise UsageError(f"drafter {drafter!r:.80}: taps must be a tuple of layers 0-{layers - 1}, not {taps!r:.80}")
    if taps and not callable(getattr(drafter, "extend", None)):
        raise UsageError(f"drafter {drafter!r:.80} has taps but no method extend() to give them to")


def _spelled(name: str) -> str:
    argument = DRAFTERS[name].argument or ""
    return f"{name}[:{argument[1:]}" if argument.startswith("[") else f"{name}:{argument}".rstrip(":")

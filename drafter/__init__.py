"""Drafters by name. To add one, give `DRAFTERS` its name and the place of its factory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UsageError
from .protocol import Draft, DraftContext, Drafter

if TYPE_CHECKING:
    from ..model import DiffusionGemma

__all__ = ["DRAFTERS", "Draft", "DraftContext", "Drafter", "check_name", "make"]

# name -> (module, factory, what follows the name after a colon, or None)
# a factory takes (model, argument) and returns a Drafter; its module is imported when it is asked for
DRAFTERS: dict[str, tuple[str, str, str | None]] = {
    "lookup": (".lookup", "make", None),
}


def make(drafter: str | Drafter | None, model: DiffusionGemma) -> Drafter | None:
    """A drafter for one request, from its name ("lookup") or an object that follows the protocol.

    Raises UsageError for an unknown name, or an object that is no drafter of this model.
    """
    if drafter is None:
        return None
    if isinstance(drafter, str):
        name, argument = check_name(drafter)
        module, factory, _ = DRAFTERS[name]
        return getattr(import_module(module, __name__), factory)(model, argument)
    check_object(drafter, len(model.layers))
    if not callable(getattr(drafter, "fresh", None)):
        return drafter
    try:
        fresh = drafter.fresh()
    except Exception as error:
        raise UsageError(f"drafter {drafter!r:.80}: fresh() raised {type(error).__name__}: {error}") from None
    check_object(fresh, len(model.layers))
    return fresh


def check_name(drafter: str) -> tuple[str, str | None]:
    """ "name" or "name:argument", taken apart. Raises UsageError if there is no such drafter."""
    name, colon, argument = drafter.partition(":")
    if name not in DRAFTERS:
        raise UsageError(f"drafter {drafter!r} does not exist; there are {', '.join(_spelled())}")
    wanted = DRAFTERS[name][2]
    if (wanted is None) == bool(colon) or (wanted and not argument):
        raise UsageError(f"drafter {drafter!r}: write {_spelled()[list(DRAFTERS).index(name)]}")
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


def _spelled() -> list[str]:
    return [name if argument is None else f"{name}:{argument}" for name, (_, _, argument) in DRAFTERS.items()]

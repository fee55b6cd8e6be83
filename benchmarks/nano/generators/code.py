"""Small Python functions: from a line of English, and a removed line put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..example import Example, split_of

TRANSFORMS = {
    "the {item}s": "{v}",
    "the squares of the {item}s": "{v} * {v}",
    "twice the {item}s": "2 * {v}",
    "the negated {item}s": "-{v}",
    "the {item}s plus {n}": "{v} + {n}",
    "the {item}s times {n}": "{v} * {n}",
}
FILTERS = {
    "": None,
    " above {m}": "{v} > {m}",
    " below {m}": "{v} < {m}",
    " equal to {m}": "{v} == {m}",
    " divisible by {m}": "{v} % {m} == 0",
    " that are odd": "{v} % 2 == 1",
    " that are even": "{v} % 2 == 0",
}
# how a value is folded into the result: request words -> (first value, update)
FOLDS = {
    "sum": ("0", "result += {e}"),
    "multiply": ("1", "result *= {e}"),
    "collect": ("[]", "result.append({e})"),
    "count": ("0", "result += 1"),
    "maximum of": ("None", "result = {e} if result is None else max(result, {e})"),
}
FUNCTIONS = ["total", "combine", "gather", "tally", "measure", "fold", "reduce", "pick", "compute", "solve"]
COLLECTIONS = {"values": "value", "items": "item", "numbers": "number", "scores": "score", "prices": "price"}
COUNTED = "the {item}s"  # all that counting can tell apart
NS, MS = range(2, 31), range(2, 61)  # {n} and {m}
REMOVED = "___"


@dataclass(frozen=True)
class Loop:
    """What a function does, whatever its names: a request in words, and a body."""

    fold: str
    transform: str
    condition: str
    n: int
    m: int

    def request(self, name: str, collection: str) -> str:
        said = f"{self.fold} {self.transform}{self.condition}".format(**self._slots(collection))
        return f"{name}({collection}): {said}"

    def code(self, name: str, collection: str) -> str:
        return f"def {name}({collection}):\n{self.body(collection)}"

    def body(self, collection: str) -> str:
        slots, (first, update), condition = self._slots(collection), FOLDS[self.fold], FILTERS[self.condition]
        update = update.format(e=TRANSFORMS[self.transform].format(**slots))
        lines = [f"    result = {first}", f"    for {slots['item']} in {collection}:"]
        if condition:
            lines += [f"        if {condition.format(**slots)}:", f"            {update}"]
        else:
            lines += [f"        {update}"]
        return "\n".join([*lines, "    return result"])

    def _slots(self, collection: str) -> dict[str, Any]:
        item = COLLECTIONS[collection]
        return {"item": item, "v": item, "n": self.n, "m": self.m}


def _drawn(rng: random.Random) -> tuple[str, str, Loop]:
    """A function's name, its collection's, and what it does."""
    name, collection, fold = rng.choice(FUNCTIONS), rng.choice(list(COLLECTIONS)), rng.choice(list(FOLDS))
    transform = rng.choice(list(TRANSFORMS)) if fold != "count" else COUNTED
    condition = rng.choice(list(FILTERS))
    return name, collection, Loop(fold, transform, condition, rng.choice(NS), rng.choice(MS))


def _key(body: str) -> str:
    return f"function {body}"


def _function(task: str, name: str, collection: str, loop: Loop) -> Example:
    request, code = loop.request(name, collection), loop.code(name, collection)
    return Example(task=task, prompt=f"python {request}", answer=code, keys=(_key(loop.body(collection)),))


def function(rng: random.Random) -> Example:
    """One line of English -> a small Python function with a loop."""
    return _function("function", *_drawn(rng))


def composed(rng: random.Random) -> Example:
    """The same of a loop that is held out of training under every name of its collection."""
    return _function("composed", rng.choice(FUNCTIONS), rng.choice(list(COLLECTIONS)), rng.choice(_never_trained_on()))


@cache
def _never_trained_on() -> tuple[Loop, ...]:
    return tuple(
        loop for loop in _loops() if all(split_of(_key(loop.body(collection))) != "train" for collection in COLLECTIONS)
    )


def _loops() -> Iterator[Loop]:
    for fold in FOLDS:
        for transform in TRANSFORMS if fold != "count" else (COUNTED,):
            for condition in FILTERS:
                for n in NS if "{n}" in transform else NS[:1]:
                    for m in MS if "{m}" in condition else MS[:1]:
                        yield Loop(fold, transform, condition, n, m)


def infill(rng: random.Random) -> Example:
    """A described function of which one to three lines are gone -> those lines."""
    name, collection, loop = _drawn(rng)
    lines = loop.code(name, collection).split("\n")
    start = rng.randint(1, len(lines) - 1)
    end = rng.randint(start + 1, min(start + 3, len(lines)))
    shown = "\n".join([*lines[:start], REMOVED, *lines[end:]])
    answer = "\n".join(lines[start:end])
    request, keys = loop.request(name, collection), (_key(loop.body(collection)),)
    return Example(task="infill", prompt=f"fill {request}\n{shown}", answer=answer, keys=keys)

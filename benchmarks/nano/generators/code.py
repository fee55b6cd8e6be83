"""Small Python functions: from a line of English, and a removed line put back."""

from __future__ import annotations

import random

from ..example import Example

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
REMOVED = "___"


def _described(rng: random.Random) -> tuple[str, str]:
    """A request and its function."""
    name, (collection, item) = rng.choice(FUNCTIONS), rng.choice(list(COLLECTIONS.items()))
    fold = rng.choice(list(FOLDS))
    transform = rng.choice(list(TRANSFORMS)) if fold != "count" else "the {item}s"
    condition = rng.choice(list(FILTERS))
    slots = {"item": item, "v": item, "n": rng.randint(2, 30), "m": rng.randint(2, 60)}
    first, update = FOLDS[fold]
    update = update.format(e=TRANSFORMS[transform].format(**slots))
    lines = [f"def {name}({collection}):", f"    result = {first}", f"    for {item} in {collection}:"]
    if FILTERS[condition]:
        lines += [f"        if {FILTERS[condition].format(**slots)}:", f"            {update}"]
    else:
        lines += [f"        {update}"]
    request = f"{name}({collection}): {fold} {transform}{condition}".format(**slots)
    return request, "\n".join([*lines, "    return result"])


def _body(code: str) -> str:
    return "function " + code.partition("\n")[2]


def function(rng: random.Random) -> Example:
    """One line of English -> a small Python function with a loop."""
    request, code = _described(rng)
    return Example(task="function", prompt=f"python {request}", answer=code, keys=(_body(code),))


def infill(rng: random.Random) -> Example:
    """A described function of which one to three lines are gone -> those lines."""
    request, code = _described(rng)
    lines = code.split("\n")
    start = rng.randint(1, len(lines) - 1)
    end = rng.randint(start + 1, min(start + 3, len(lines)))
    shown = "\n".join([*lines[:start], REMOVED, *lines[end:]])
    answer = "\n".join(lines[start:end])
    return Example(task="infill", prompt=f"fill {request}\n{shown}", answer=answer, keys=(_body(code),))

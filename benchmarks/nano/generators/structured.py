"""JSON: from pairs, from sentences, from a table, and one field changed."""

from __future__ import annotations

import json
import random

from ..example import Example
from .words import FIELDS, NAMES, plain


def random_object(rng: random.Random) -> dict[str, object]:
    keys = rng.sample(list(FIELDS), rng.randint(2, 6))
    return {key: FIELDS[key](rng) for key in keys}


def object_key(fields: dict[str, object]) -> str:
    """The same for an object whatever the order of its fields."""
    return "object " + json.dumps(fields, sort_keys=True)


def changed_object(rng: random.Random, fields: dict[str, object]) -> tuple[str, dict[str, object]]:
    """The name of a field, and the object with another value of it."""
    name, changed = rng.choice(list(fields)), fields
    while changed == fields:
        changed = fields | {name: FIELDS[name](rng)}
    return name, changed


def json_pairs(rng: random.Random) -> Example:
    """`json name=Ann age=31` -> the JSON object."""
    fields = random_object(rng)
    request = "json " + " ".join(f"{key}={plain(value)}" for key, value in fields.items())
    return Example(task="json", prompt=request, answer=json.dumps(fields), keys=(object_key(fields),))


def edit(rng: random.Random) -> Example:
    """A JSON object and one field to change -> the changed object."""
    fields = random_object(rng)
    name, changed = changed_object(rng, fields)
    request = f"set {name}={plain(changed[name])} in {json.dumps(fields)}"
    keys = (object_key(changed), object_key(fields))
    return Example(task="edit", prompt=request, answer=json.dumps(changed), keys=keys)


CLAUSES = {
    "age": "is {age} years old",
    "city": "lives in {city}",
    "job": "works as a {job}",
    "year": "was born in {year}",
    "color": "likes {color}",
    "item": "owns a {item}",
}


def extract(rng: random.Random) -> Example:
    """Names of fields and a sentence in another order -> the JSON object of those fields."""
    said = rng.sample(list(CLAUSES), rng.randint(2, 4))
    person = {"name": rng.choice(NAMES)} | {key: FIELDS[key](rng) for key in said}
    *first, last = (CLAUSES[key].format(**person) for key in said)
    sentence = f"{person['name']} {', '.join(first)} and {last}."
    asked = rng.sample(list(person), rng.randint(2, min(4, len(person))))
    fields = {key: person[key] for key in asked}
    request = f"extract {', '.join(asked)}: {sentence}"
    return Example(task="extract", prompt=request, answer=json.dumps(fields), keys=(object_key(fields),))


def table(rng: random.Random) -> Example:
    """Rows of values under their names -> a JSON array, one object a line: up to three canvases."""
    names = rng.sample([key for key in FIELDS if key not in ("active", "score")], rng.randint(2, 3))
    rows = [{name: FIELDS[name](rng) for name in names} for _ in range(rng.randint(2, 9))]
    said = "; ".join(" ".join(plain(value) for value in row.values()) for row in rows)
    answer = "[" + ",\n ".join(json.dumps(row) for row in rows) + "]"
    keys = (f"table {answer}", *map(object_key, rows))
    return Example(task="table", prompt=f"table {' '.join(names)}: {said}", answer=answer, keys=keys)

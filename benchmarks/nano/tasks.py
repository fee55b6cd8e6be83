"""The six tasks nano is trained on, and what is held out of them.

    text request  ->  chat prompt  ->  canvas: answer, <turn|>, pads

Every task is a function of a `random.Random` that returns an `Example`; its `key` is the
answer in the form that must not be shared between training and test (see `held_out`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

NAMES = (
    "Ann Bob Carla Dmitri Elena Farid Grace Hugo Ines Jonas Keiko Liam Mona Nils Olga Pablo Rosa Sven Tara Yusuf"
).split()
CITIES = "Oslo Lima Cairo Kyoto Paris Quito Rome Seoul Turin Vienna Boston Delhi Geneva Havana Lagos Madrid".split()
COLORS = "red green blue amber violet black white teal".split()
JOBS = "baker pilot nurse farmer painter tailor judge miner".split()
WORDS = (
    "apple river stone cloud tiger lemon piano chair grape horse bread candle door eagle forest garden "
    "hammer island jacket kettle ladder mirror needle orange pencil rabbit silver table window yellow"
).split()

FIELDS: dict[str, Callable[[random.Random], object]] = {
    "name": lambda r: r.choice(NAMES),
    "city": lambda r: r.choice(CITIES),
    "color": lambda r: r.choice(COLORS),
    "job": lambda r: r.choice(JOBS),
    "item": lambda r: r.choice(WORDS),
    "age": lambda r: r.randint(10, 99),
    "size": lambda r: r.randint(1, 99),
    "year": lambda r: r.randint(1950, 2049),
    "active": lambda r: r.random() < 0.5,
    "score": lambda r: r.randint(0, 999),
}


@dataclass(frozen=True, kw_only=True)
class Example:
    task: str
    prompt: str
    answer: str
    key: str  # what makes it "the same" as another one, for holding out
    thought: str | None = None  # said in the thinking channel when thinking is on


def _object(rng: random.Random) -> dict[str, object]:
    keys = rng.sample(list(FIELDS), rng.randint(2, 6))
    return {key: FIELDS[key](rng) for key in keys}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def json_task(rng: random.Random) -> Example:
    """`json name=Ann age=31` -> the JSON object."""
    fields = _object(rng)
    answer = json.dumps(fields)
    request = "json " + " ".join(f"{key}={_plain(value)}" for key, value in fields.items())
    return Example(task="json", prompt=request, answer=answer, key=answer)


def edit_task(rng: random.Random) -> Example:
    """A JSON object and one field to change -> the changed object."""
    fields = _object(rng)
    name, changed = rng.choice(list(fields)), fields
    while changed == fields:
        changed = fields | {name: FIELDS[name](rng)}
    request = f"set {name}={_plain(changed[name])} in {json.dumps(fields)}"
    return Example(task="edit", prompt=request, answer=json.dumps(changed), key=json.dumps(changed))


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


def function_task(rng: random.Random) -> Example:
    """One line of English -> a small Python function with a loop."""
    name, (collection, item) = rng.choice(FUNCTIONS), rng.choice(list(COLLECTIONS.items()))
    fold = rng.choice(list(FOLDS))
    transform = rng.choice(list(TRANSFORMS)) if fold != "count" else "the {item}s"
    condition = rng.choice(list(FILTERS))
    slots = {"item": item, "v": item, "n": rng.randint(2, 30), "m": rng.randint(2, 60)}
    first, update = FOLDS[fold]
    update = update.format(e=TRANSFORMS[transform].format(**slots))
    lines = [f"    result = {first}", f"    for {item} in {collection}:"]
    if FILTERS[condition]:
        lines += [f"        if {FILTERS[condition].format(**slots)}:", f"            {update}"]
    else:
        lines += [f"        {update}"]
    body = "\n".join([*lines, "    return result"])
    request = f"python {name}({collection}): {fold} {transform}{condition}".format(**slots)
    return Example(task="function", prompt=request, answer=f"def {name}({collection}):\n{body}", key=body)


def _grids() -> list[tuple[str, ...]]:
    """All 288 valid 4x4 Sudoku grids, as four strings each."""
    rows = ["".join(p) for p in permutations("1234")]

    def valid(grid: tuple[str, ...]) -> bool:
        columns = ["".join(row[c] for row in grid) for c in range(4)]
        boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r, c in product((0, 2), (0, 2))]
        return all(len(set(unit)) == 4 for unit in columns + boxes)

    pairs = [(a, b) for a, b in product(rows, rows) if len(set(a[:2] + b[:2])) == 4 and len(set(a[2:] + b[2:])) == 4]
    return [top + bottom for top, bottom in product(pairs, pairs) if valid(top + bottom)]


GRIDS = _grids()


def _solutions(puzzle: str) -> int:
    return sum(all(p in (".", g) for p, g in zip(puzzle, "".join(grid), strict=True)) for grid in GRIDS)


def sudoku_task(rng: random.Random) -> Example:
    """A 4x4 Sudoku with one solution -> its grid."""
    grid = rng.choice(GRIDS)
    cells = list("".join(grid))
    order, blanks = rng.sample(range(16), 16), rng.randint(4, 9)
    for cell in order:
        if cells.count(".") == blanks:
            break
        kept, cells[cell] = cells[cell], "."
        if _solutions("".join(cells)) > 1:
            cells[cell] = kept
    rows = ["".join(cells[i : i + 4]) for i in range(0, 16, 4)]
    return Example(task="sudoku", prompt="sudoku " + " ".join(rows), answer="\n".join(grid), key="".join(grid))


def reverse_task(rng: random.Random) -> Example:
    """Three to six words -> the same words from last to first."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    answer = " ".join(reversed(words))
    return Example(task="reverse", prompt="reverse " + " ".join(words), answer=answer, key=answer)


def arithmetic_task(rng: random.Random) -> Example:
    """Two-digit sums and differences; held out by question, since answers are few."""
    a, b, sign = rng.randint(0, 99), rng.randint(0, 99), rng.choice("+-")
    if sign == "-" and b > a:
        a, b = b, a
    question = f"{a} {sign} {b}"
    (tens_a, ones_a), (tens_b, ones_b) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        thought = f"{ones_a} + {ones_b} = {ones_a + ones_b}, {tens_a} + {tens_b} = {tens_a + tens_b}"
    else:
        thought = f"{ones_a} - {ones_b} = {ones_a - ones_b}, {tens_a} - {tens_b} = {tens_a - tens_b}"
    answer = str(a + b if sign == "+" else a - b)
    return Example(task="arithmetic", prompt=question, answer=answer, key=question, thought=thought)


# task -> (generator, share of the training data)
TASKS: dict[str, tuple[Callable[[random.Random], Example], float]] = {
    "json": (json_task, 0.22),
    "edit": (edit_task, 0.24),
    "function": (function_task, 0.18),
    "sudoku": (sudoku_task, 0.16),
    "reverse": (reverse_task, 0.10),
    "arithmetic": (arithmetic_task, 0.10),
}
TEST_SEED = 2026


@cache
def held_out(count: int = 200, seed: int = TEST_SEED) -> dict[str, list[Example]]:
    """`count` test examples a task, with distinct prompts; 48 of the 288 grids serve Sudoku alone."""
    rng = random.Random(seed)
    grids = {"".join(grid) for grid in rng.sample(GRIDS, 48)}
    tests: dict[str, list[Example]] = {}
    for task, (make, _) in TASKS.items():
        chosen: dict[str, Example] = {}
        while len(chosen) < count:
            example = make(rng)
            if task != "sudoku" or example.key in grids:
                chosen[example.prompt] = example
        tests[task] = list(chosen.values())
    return tests


def training_stream(seed: int, shares: Mapping[str, float] | None = None) -> Iterator[Example]:
    """Endless training examples, none with the key of a test example.

    Args:
        shares: of each task; those left out have the share of `TASKS`.
    """
    tests = held_out()
    forbidden = {task: {example.key for example in examples} for task, examples in tests.items()}
    objects = forbidden["json"] | forbidden["edit"]  # json and edit answer with the same kind of object
    forbidden["json"] = forbidden["edit"] = objects
    rng = random.Random(seed)
    names, weights = list(TASKS), [(shares or {}).get(task, share) for task, (_, share) in TASKS.items()]
    while True:
        task = rng.choices(names, weights)[0]
        example = TASKS[task][0](rng)
        shown = example.prompt.partition(" in ")[2] if task == "edit" else None
        if example.key not in forbidden[task] and shown not in objects:
            yield example

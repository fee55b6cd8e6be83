"""What nano is trained on, rung by rung, and what is held out of it.

    request or conversation  ->  answer, <turn|>

A task is a function of a `random.Random` that returns an `Example`. The hash of an object, a function's body, a grid, a
question says which of training, validation and test it belongs to (see `Example.split`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from .example import Example
from .generators.arithmetic import arithmetic
from .generators.chat import chat
from .generators.code import composed, function, infill
from .generators.lists import count, reverse, sort
from .generators.questions import question, recall
from .generators.stories import story
from .generators.structured import edit, extract, json_pairs, table
from .generators.sudoku import minimal, sudoku, sudoku9


@dataclass(frozen=True)
class Task:
    make: Callable[[random.Random], Example]
    rung: int  # of the ladder by which training adds tasks
    share: float  # of the training data of its rung and those above, before they add up to 1; 0: never trained on
    may_repeat: bool = False  # a sampled text has no answer to be held out


TASKS: dict[str, Task] = {
    "json": Task(json_pairs, 1, 0.14),
    "extract": Task(extract, 1, 0.12),
    "edit": Task(edit, 1, 0.14),
    "function": Task(function, 1, 0.14),
    "sudoku": Task(sudoku, 1, 0.20),
    "minimal": Task(minimal, 1, 0.0),
    "arithmetic": Task(arithmetic, 1, 0.14),
    "reverse": Task(reverse, 1, 0.04),
    "sort": Task(sort, 1, 0.04),
    "count": Task(count, 1, 0.04),
    "composed": Task(composed, 2, 0.0),
    "question": Task(question, 2, 0.10),
    "infill": Task(infill, 2, 0.08),
    "recall": Task(recall, 2, 0.06),
    "table": Task(table, 2, 0.08),
    "story": Task(story, 3, 0.08, may_repeat=True),
    "chat": Task(chat, 3, 0.10),
    "sudoku9": Task(sudoku9, 4, 0.60),
}
RUNGS = (1, 2, 3, 4)
EMBEDDED_TASKS = ("json", "extract", "edit", "function", "sudoku", "reverse")  # diffusion gets 0.95 of them right
MOST_HELD_OUT = 200  # a task: `count` has hardly more in validation
EVALUATION_SEEDS = {"test": 2026, "validation": 2027}


def tasks_to(rung: int) -> list[str]:
    """Those of a rung and of all below it."""
    return [name for name, task in TASKS.items() if task.rung <= rung]


def in_split(task: str, split: str, rng: random.Random) -> Example:
    """The next example of a task that belongs to a split."""
    while True:
        example = TASKS[task].make(rng)
        if TASKS[task].may_repeat or example.split == split:
            return example


@cache
def held_out(task: str, count: int = 200, split: str = "test") -> tuple[Example, ...]:
    """So many examples with distinct prompts (a story has one prompt); more begin with the same ones."""
    rng = random.Random(f"{task} {EVALUATION_SEEDS[split]}")
    chosen: dict[object, Example] = {}
    while len(chosen) < count:
        example = in_split(task, split, rng)
        chosen.setdefault(example.answer if TASKS[task].may_repeat else str(example.prompt), example)
    return tuple(chosen.values())


def training_stream(seed: int, shares: Mapping[str, float]) -> Iterator[Example]:
    """Endless training examples.

    Args:
        shares: of each task; one that is not named does not occur.
    """
    rng = random.Random(seed)
    while True:
        (task,) = rng.choices(list(shares), list(shares.values()))
        yield in_split(task, "train", rng)

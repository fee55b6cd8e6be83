"""Examples: a prompt a JSON line, with what is expected of the answer to it.

    {"prompt": "json name=Ann", "answer": "{\"name\": \"Ann\"}", "task": "json", "checker": "json"}

    prompt            text, or chat messages (also as "messages")
    answer            the text that is right, or a list of texts; `sudoku` and `story` need none
    task              what it is counted under (default: all)
    checker           of benchmarks/checkers.py, or a name that the command gives a function (default: exact)
    enable_thinking   overrides the command's option; true if there is a "thought", as in data to be learnt

Further keys are left alone; a checker of one's own may look at them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_dgemma.drafter.training.prompts import read as read_prompts
from mlx_dgemma.errors import InputError, UsageError

Fields = Mapping[str, Any]  # of an example's line
ALL = "all"
LONGEST_NAME = 40  # of a task: there is room for it in a table and a plot


@dataclass(frozen=True)
class Example:
    """A line.

    Attributes:
        where: file and line, for messages.
        number: among the file's, from 0 on, whichever of them are used.
        prompt: text or chat messages.
        checker: its name.
        enable_thinking: None: as the command says.
        fields: all that the line holds.
    """

    where: str
    number: int
    task: str
    prompt: str | list[Any]
    checker: str
    enable_thinking: bool | None
    fields: Fields

    @classmethod
    def of(cls, where: str, number: int, prompt: str | list[Any], fields: Any) -> Example:
        """Of a line's keys and values. Raises InputError if they are none of an example."""
        if not isinstance(fields, dict):
            raise InputError(f'{where}: a prompt alone; write {{"prompt": "...", "answer": "..."}}')
        checker, task, thinking = fields.get("checker", "exact"), fields.get("task", ALL), fields.get("enable_thinking")
        if thinking is None and fields.get("thought") is not None:
            thinking = True
        for key, name in (("checker", checker), ("task", task)):
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"{where}: {key} must be a name, not {name!r:.80}")
        if not task.isprintable() or len(task) > LONGEST_NAME:
            raise InputError(f"{where}: task must be at most {LONGEST_NAME} printable letters, not {task!a:.80}")
        if not isinstance(thinking, bool | None):
            raise InputError(f"{where}: enable_thinking must be true or false, not {thinking!r:.80}")
        return cls(where, number, task, prompt, checker, thinking, fields)


def read(path: Path) -> list[Example]:
    """The examples of a file. Raises InputError naming the line that is none."""
    return [Example.of(line.where, number, line.prompt, line.value) for number, line in enumerate(read_prompts(path))]


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of what examples say and of their places."""
    said = json.dumps([[example.number, example.fields] for example in examples], sort_keys=True)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


def chosen(examples: Sequence[Example], tasks: Sequence[str] | None, count: int | None) -> list[Example]:
    """The first `count` of each of `tasks`, None: of all. Raises UsageError for a task that is not there."""
    known = list(dict.fromkeys(example.task for example in examples))
    for task in tasks or ():
        if task not in known:
            raise UsageError(f"--task {task}: there are {', '.join(known)}")
    kept = []
    for task in known if tasks is None else [task for task in known if task in tasks]:
        kept += [example for example in examples if example.task == task][:count]
    return kept

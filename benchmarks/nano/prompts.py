"""Prompts of nano's tasks with their answers, as JSON lines: to score checkpoints, to train drafters, to look at.

    python -m benchmarks.nano.prompts --split test --rung 2 --count 200 --out test.jsonl
    python -m benchmarks.nano.prompts --count 800 --leave-out edit --out prompts.jsonl

`test` and `validation` are held out of training, task by task, and the same whenever they are written:
`benchmarks.quality --prompts test.jsonl` scores a checkpoint. `train` is drawn from what nano was trained on, in a
random order: `mlx_dgemma.train_drafter --prompts prompts.jsonl` trains on it, and a task that is left out shows what
a drafter does with what it has not seen. A line has task, prompt, answer, checker, and if thinking is asked for
enable_thinking and thought.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.errors import UsageError
from mlx_dgemma.files import require_place, write_whole

from .example import Example
from .tasks import EVALUATION_SEEDS, MOST_HELD_OUT, RUNGS, TASKS, held_out, tasks_to, training_stream

TRAIN = "train"
SEED, ORDER = 77, 7
USUAL = 800
MOST_REPEATS = 2000  # drawn one after the other: there is nothing new


def prompts(split: str, tasks: Sequence[str], count: int) -> list[Example]:
    """`count` examples of each task with different prompts, or all that a task has for training."""
    if split != TRAIN:
        return [example for task in tasks for example in held_out(task, count, split)]
    found = [example for task in tasks for example in _trained_on(task, count)]
    random.Random(ORDER).shuffle(found)
    return found


def _trained_on(task: str, count: int) -> list[Example]:
    found: dict[str, Example] = {}
    repeats = 0
    for example in training_stream(SEED, {task: 1.0}):
        repeats = repeats + 1 if str(example.prompt) in found else 0
        found.setdefault(str(example.prompt), example)
        if len(found) == count or repeats == MOST_REPEATS:
            break
    return list(found.values())


def as_line(example: Example) -> dict[str, Any]:
    """What benchmarks/examples.py reads."""
    line = {name: getattr(example, name) for name in ("task", "prompt", "answer", "checker")}
    return line if example.thought is None else line | {"enable_thinking": True, "thought": example.thought}


def _command(args: argparse.Namespace) -> None:
    tasks, count = _tasks(args), _count(args)
    require_place(args.out)
    found = prompts(args.split, tasks, count)
    write_whole(args.out, "".join(json.dumps(as_line(example)) + "\n" for example in found))
    for task in tasks:
        number = sum(example.task == task for example in found)
        if number < count:
            print(f"{task}: {number} different prompts are all there are", file=sys.stderr)


def _count(args: argparse.Namespace) -> int:
    is_training = args.split == TRAIN
    if args.count is None:
        return USUAL if is_training else MOST_HELD_OUT
    if args.count < 1 or (args.count > MOST_HELD_OUT and not is_training):
        limits = "at least 1" if is_training else f"in 1-{MOST_HELD_OUT}: no more are held out of every task"
        raise UsageError(f"--count {args.count}: must be {limits}")
    return args.count


def _tasks(args: argparse.Namespace) -> list[str]:
    """Raises UsageError for one that is not there or not trained on, and if none is left."""
    for flag, names in (("--task", args.task or ()), ("--leave-out", args.leave_out)):
        unknown = next((name for name in names if name not in TASKS), None)
        if unknown is not None:
            raise UsageError(f"{flag} {unknown}: there are {', '.join(TASKS)}")
    is_asked = {task for task, its in TASKS.items() if its.share or args.split != TRAIN}
    if args.task and (never := next((task for task in args.task if task not in is_asked), None)):
        raise UsageError(f"--task {never}: is never trained on; say --split test or validation")
    wanted = is_asked.intersection(args.task or tasks_to(args.rung or RUNGS[0]))
    tasks = [task for task in TASKS if task in wanted and task not in args.leave_out]
    if not tasks:
        raise UsageError("--leave-out leaves no task")
    return tasks


def argument_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmarks.nano.prompts", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--split", choices=(*EVALUATION_SEEDS, TRAIN), default=TRAIN, help="(default: train)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--task", nargs="+", metavar="NAME", help=f"of {', '.join(TASKS)}")
    which.add_argument("--rung", type=int, choices=RUNGS, help="tasks up to this rung of nano's ladder (default: 1)")
    add("--leave-out", nargs="+", action="extend", default=[], metavar="NAME", help="not these tasks (default: none)")
    add("--count", type=int, help=f"prompts a task (default: {USUAL}; held out: {MOST_HELD_OUT}, the most there are)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

"""Prompts of nano's tasks for `mlx_dgemma.train_drafter`, none of which is held out.

    python -m benchmarks.nano.prompts --count 800 --leave-out edit --out prompts.jsonl

Drawn from the distribution that nano was trained on; a task that is left out shows what a drafter does with
what it has not seen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.errors import UsageError

from .tasks import TASKS, training_stream

SEED, ORDER = 77, 7


def prompts(count: int, tasks: Sequence[str]) -> list[str]:
    """`count` different prompts of each task, in a random order."""
    found: dict[str, dict[str, None]] = {task: {} for task in tasks}
    for example in training_stream(SEED, {task: float(task in tasks) for task in TASKS}):
        if len(found[example.task]) < count:
            found[example.task][example.prompt] = None
        if all(len(kept) == count for kept in found.values()):
            break
    lines = [prompt for kept in found.values() for prompt in kept]
    random.Random(ORDER).shuffle(lines)
    return lines


def _command(args: argparse.Namespace) -> None:
    unknown = next((task for task in args.leave_out if task not in TASKS), None)
    if unknown is not None:
        raise UsageError(f"--leave-out {unknown}: there are {', '.join(TASKS)}")
    tasks = [task for task in TASKS if task not in args.leave_out]
    if args.count < 1 or not tasks:
        raise UsageError("--count must be 1 at least, and a task must be left")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(args.count, tasks)]
    args.out.write_text("".join(lines), encoding="utf-8")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.nano.prompts", description="Write prompts of nano's tasks to train a drafter on.")
    add = parser.add_argument
    add("--count", type=int, default=800, help="prompts a task (default: 800)")
    add("--leave-out", action="append", default=[], metavar="TASK", help="may be repeated (default: none)")
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

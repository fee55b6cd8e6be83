"""How many answers are right, of any checkpoint, mode, drafter, sampler setting and quantisation, and what they took.

    python -m benchmarks.quality --prompts tasks.jsonl --out floats.json
    python -m benchmarks.quality --prompts tasks.jsonl --model q4 --out q4.json --against floats.json --plot q4.svg
    python -m benchmarks.quality --prompts tasks.jsonl --engine transformers --against floats.json
    python -m benchmarks.quality --prompts tasks.jsonl --mode ar --temp 0 --drafter lookup
    python -m benchmarks.quality --records floats.json q4.json --plot both.svg

Prompts are JSON lines, {"prompt": ..., "answer": ..., "task": ..., "checker": ...}; see benchmarks/examples.py. Prompt
i of the file and seed s are answered with the request's seed 1,000,003 s + i, whichever prompts are chosen: each pair
draws other noise, and two runs of this package draw the same. With --out FILE, every answer goes into FILE.part as it
comes; an interrupted run goes on with the same command, and starts anew if FILE.part is deleted. A row of the table is
a task, the last one all of them; several runs (--records) stand side by side in it:

    exact               share of right answers [95 % interval]; seeds of a prompt are not taken for further prompts
    steps a canvas      denoising passes per canvas (diffusion)
    forwards a token    all passes, the prompt's included, per new token, eos and thoughts included
    accepted a pass     drafts kept per pass that had some to verify (drafters)
    difference          to --against, prompt by prompt [95 % interval], and p of an exact test (benchmarks/intervals.py)
    verdict             "no damage > 1 point": the interval excludes a loss of the margin or more; "damage": it excludes
                        that there is none; else about how many prompts would tell, if answers differ as often as here
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mlx_dgemma.command import Parser, run_command, use_device
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.drafter import check as check_drafter
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.files import require_place, write_whole
from mlx_dgemma.generate import add_sampler_options
from mlx_dgemma.options import MODES, OF_A_DRAFTER, check_limits, check_options, sampler_options

from .checkers import CHECKERS, Judges
from .engine import Engine, Setup, is_greedy
from .engines import DTYPES, ENGINES, OURS, require_possible
from .examples import Example, chosen, digest, read
from .part import Part, part_of
from .quality_plot import MOST_RUNS
from .quality_report import plot, report
from .records import Record, Run, require_comparable

STRIDE = 1_000_003  # between the requests' seeds of one prompt
MOST_SEEDS = 1000
LAST_SEED = 10**12  # no engine takes a request's seed of more than 64 bits
OPTIONS = tuple(name for names in MODES.values() for name in names if name != "drafts")
OF_A_RUN = ("engine", "device", "dtype", "model", "revision", "mode", "max_tokens", "enable_thinking", *OPTIONS)
OF_A_RUN += ("seeds", "seed", "count", "task", "checker", "out")


def request_seed(number: int, seed: int) -> int:
    """Of the file's prompt `number` with seed `seed`."""
    return seed * STRIDE + number


def answers(
    engine: Engine,
    examples: Sequence[Example],
    seeds: Sequence[int],
    judges: Judges,
    thinking: bool = False,
    part: Part | None = None,
) -> list[Record]:
    """Answer every example with every seed, and judge.

    Args:
        part: has the records of an interrupted run, which are not made again, and is given the new ones.

    Raises:
        InputError: a line cannot be answered or judged.
    """
    from tqdm import tqdm

    prompts = [
        _of(example, engine.ids, example.prompt, thinking if (own := example.enable_thinking) is None else own)
        for example in examples
    ]  # all before the first answer: a mistake is said at once
    known = {(record.prompt, record.seed): record for record in (part.records if part is not None else ())}
    todo = [(example, ids, seed) for example, ids in zip(examples, prompts, strict=True) for seed in seeds]
    records: list[Record] = []
    with tqdm(total=len(todo), unit="answer", leave=False, disable=None) as bar:
        for example, ids, seed in todo:
            record = known.get((example.number, seed))
            if record is None:
                record = _answered(engine, example, ids, seed, judges)
                if part is not None:
                    part.add(record)
            records.append(record)
            bar.set_postfix_str(f"{sum(record.right for record in records)} right", refresh=False)
            bar.update()
    return records


def _answered(engine: Engine, example: Example, ids: list[int], seed: int, judges: Judges) -> Record:
    answer = _of(example, engine.answer, ids, request_seed(example.number, seed))
    right = judges.is_right(example, answer.text)
    return Record(**asdict(answer), task=example.task, prompt=example.number, seed=seed, right=right)


def _of(example: Example, function: Any, *arguments: Any) -> Any:
    """Call it, and have errors name the example, but those of options."""
    try:
        return function(*arguments)
    except UsageError:
        raise
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from None


def _measured(args: argparse.Namespace, label: str, against: Run | None) -> Run:
    """Answer the prompts. What is wrong is said before a model is loaded, as far as it can be."""
    setup = _setup(args)
    require_possible(args.engine, setup)
    judges = Judges.named(args.checker)
    examples = chosen(read(args.prompts), args.task, args.count)
    judges.require_judged(examples)
    settings: dict[str, Any] = {
        "examples": {"file": args.prompts.name, "count": len(examples), "sha256": digest(examples)},
        "checkers": args.checker,
    }
    if against is not None:
        require_comparable(settings, against.settings, args.against)
    use_device(args.device if args.engine != "transformers" else None)
    engine = ENGINES[args.engine](setup)
    seeds = list(range(args.seed, args.seed + args.seeds))
    if is_greedy(args.mode, engine.config) and len(seeds) > 1:
        print("greedy: one seed is all there is", flush=True)
        seeds = seeds[:1]
    settings = engine.facts() | setup.facts(engine.config) | {"enable_thinking": args.enable_thinking} | settings
    settings["seeds"] = seeds
    part = Part(args.out, settings) if args.out is not None else None
    if part is not None and part.records:
        print(f"goes on: {len(part.records)} answers are in {part.path}", flush=True)
    try:
        records = answers(engine, examples, seeds, judges, args.enable_thinking, part)
    except KeyboardInterrupt:
        if part is not None and part.records:
            print(f"{len(part.records)} answers are in {part.path}: say it again to go on", file=sys.stderr)
        raise
    return Run(label, settings, records)


def _setup(args: argparse.Namespace) -> Setup:
    """Raises UsageError for options that no checkpoint makes right."""
    options = {name: getattr(args, name) for name in OPTIONS}
    check_options(args.mode, options)
    check_limits(args.max_tokens, None, args.seed, args.drafter, args.draft_width)
    check_drafter(args.drafter, {name: options[name] for name in OF_A_DRAFTER})
    alone = ("t_min", "t_max") if None in (args.t_min, args.t_max) else ()  # their order is the checkpoint's matter
    GenerationConfig().replace(**{name: options[name] for name in sampler_options(args.mode) if name not in alone})
    names = {field.name for field in fields(Setup)} - {"options"}
    return Setup(options=options, **{name: getattr(args, name) for name in names})


def _command(args: argparse.Namespace) -> None:
    _require_sound(args)
    *labels, label = _labels([*(args.records or [args.out]), args.against])
    against = Run.read(args.against, label) if args.against is not None else None
    if args.records is None:
        runs = [_measured(args, labels[0], against)]
    else:
        runs = [Run.read(*named) for named in zip(args.records, labels, strict=True)]
        for path, run in zip(args.records, runs, strict=True):
            require_comparable(runs[0].settings, run.settings, path)
        if against is not None:
            require_comparable(runs[0].settings, against.settings, args.against)
    shown = [*runs, *([against] if against is not None else [])]
    if args.plot is not None and len(shown) > MOST_RUNS:
        raise UsageError(f"--plot shows {MOST_RUNS} runs at most, not {len(shown)}")
    try:
        if args.out is not None:
            runs[0].write(args.out)
            part_of(args.out).unlink(missing_ok=True)
    finally:
        print(report(runs, against, args.margin), end="")
    if args.markdown is not None:
        write_whole(args.markdown, report(runs, against, args.margin, markdown=True))
    if args.plot is not None:
        write_whole(args.plot, plot(shown))


def _labels(paths: Sequence[Path | None]) -> list[str]:
    """Names of files without folder and ending, unless two have the same."""
    named = [path for path in paths if path is not None]
    is_short = len({path.stem for path in named}) == len(named)
    return ["this run" if path is None else path.stem if is_short else str(path) for path in paths]


def _require_sound(args: argparse.Namespace) -> None:
    """Raise UsageError for options that contradict each other, or files that cannot be written."""
    for name, least, most in (("seeds", 1, MOST_SEEDS), ("count", 1, None), ("seed", 0, LAST_SEED)):
        number = getattr(args, name)
        if number is not None and not least <= number <= (most or number):
            allowed = f"at least {least}" if most is None else f"in {least}-{most}"
            raise UsageError(f"--{name} must be {allowed}, not {number}")
    if not 0 < args.margin < 1:
        raise UsageError(f"--margin is a share of the answers, between 0 and 1, not {args.margin:g}")
    if args.records is not None:
        default = argument_parser().get_default
        given = next((name for name in OF_A_RUN if getattr(args, name) != default(name)), None)
        if given is not None:
            raise UsageError(f"{given} is an option of a run; --records runs nothing")
    written = [path for path in (args.out, args.plot, args.markdown) if path is not None]
    for path in written:
        require_place(path)
    inputs = [path for path in (args.prompts, args.against, *(args.records or ())) if path is not None]
    read_from, *places = {os.path.realpath(path) for path in inputs}, *map(os.path.realpath, written)
    if len(set(places)) < len(places) or read_from.intersection(places):
        raise UsageError("--out, --plot and --markdown must name different files, and none that is read")
    if len(read_from) < len(inputs):
        raise UsageError("--prompts, --records and --against must name different files")


def argument_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmarks.quality", description=__doc__, formatter_class=raw)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="what to answer, JSON lines")
    source.add_argument("--records", type=Path, nargs="+", metavar="FILE", help="run nothing, show what --out wrote")
    add = parser.add_argument
    add("--count", type=int, metavar="N", help="the first N prompts a task (default: all)")
    add("--task", nargs="+", metavar="NAME", help="these tasks alone (default: all)")
    add("--seeds", type=int, default=3, help="answers a prompt, each with a seed of its own (default: 3)")
    add("--seed", type=int, default=0, help="the first of them; the next ones follow (default: 0)")
    names = f"{', '.join(CHECKERS)} or MODULE:FUNCTION, called as function(text, line) -> bool"
    named = "NAME=MODULE:FUNCTION is for prompts that say NAME; may be repeated"
    add("--checker", action="append", default=[], metavar="NAME", help=f"in place of prompts' own: {names}; {named}")
    add("--out", type=Path, metavar="FILE", help="write the records, as JSON")
    add("--against", type=Path, metavar="FILE", help="compare with these records, prompt by prompt")
    add("--margin", type=float, default=0.01, metavar="SHARE", help="of answers that may be lost (default: 0.01)")
    add("--plot", type=Path, metavar="FILE", help="draw shares and intervals, as SVG")
    add("--markdown", type=Path, metavar="FILE", help="write what is printed")
    add("--debug", action="store_true", help="show a traceback if something fails")
    group = parser.add_argument_group("who answers")
    add = group.add_argument
    add("--engine", choices=ENGINES, default=OURS, help="(default: %(default)s, this package)")
    add("--device", choices=("cpu", "gpu"), help="(default: MLX's own; transformers: cpu)")
    add("--dtype", choices=DTYPES, help="of weights (default: the engine's own)")
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    add("--revision", help="of the Hub repository (default: its main branch)")
    add("--mode", default="diffusion", help="diffusion or ar (default: diffusion)")
    add("--max-tokens", "-m", type=int, help="new tokens at most (default: the checkpoint's, else 256)")
    add("--enable-thinking", action="store_true", help="let the model think first, if a prompt says nothing of it")
    add_sampler_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

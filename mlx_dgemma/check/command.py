"""The command `mlx_dgemma.check`: a report on this machine and model, within a few minutes."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..command import FAILED, Parser, run_command, use_device
from ..drafter import check as check_drafter
from ..errors import InputError, UsageError
from ..files import require_place, write_whole
from . import plan, text
from .paths import shown_command, shown_name
from .report import Report, Section

SECONDS = 180.0
LEAST = 1.0
DESCRIPTION = """\
Show whether this package computes what the reference computes on this machine, whether drafts leave
answers as they are, and how fast a model runs here, pass by pass and mode by mode. Every figure is
measured in the run. Costs of passes are kept for the choice of draft widths. Ctrl-C ends it with what
there is. Exit status: 0 nothing wrong, 1 something is, 2 bad usage, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command `mlx_dgemma.check`."""
    typed = list(sys.argv[1:] if argv is None else argv)
    run_command(lambda args: _command(args, typed), argument_parser(), typed)


def argument_parser() -> argparse.ArgumentParser:
    sections = "\n".join(f"  {name:8} {entry.does}" for name, entry in plan.PLAN.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("mlx_dgemma.check", description=DESCRIPTION, epilog=f"sections:\n{sections}", formatter_class=raw)
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    names = "block:FOLDER, block:HUB_ID, canvas:64x2; may be repeated"
    ours = "default: lookup and canvas, for nano block:nano"
    add("--drafter", action="append", default=[], metavar="NAME", help=f"time this one too: {names} ({ours})")
    add("--device", choices=("cpu", "gpu"), help="where the model runs (default: MLX's; bundles run on both)")
    add("--seconds", type=float, default=SECONDS, metavar="S", help=f"at most, loading apart (default: {SECONDS:g})")
    add("--only", nargs="+", metavar="SECTION", help=f"of {', '.join(plan.PLAN)} (default: all)")
    more = "of bundles on the GPU: allow more than 4, on one known to round worse (default: 4)"
    add("--max-ratio", type=float, metavar="R", help=more)
    add("--json", type=Path, metavar="FILE", help="write the report as JSON (default: none)")
    add("--markdown", type=Path, metavar="FILE", help="write it as Markdown, to paste into an issue (default: none)")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def _command(args: argparse.Namespace, typed: Sequence[str]) -> int:
    names, files, model = _names(args.only), _files(args), shown_name(args.model)
    _require_sound(args)
    use_device(args.device)
    print(f"mlx_dgemma.check: {', '.join(names)}; {args.seconds:g} s at most after loading {model}", flush=True)
    known = {"command": f"mlx_dgemma.check {shown_command(typed)}".rstrip(), "model": f"{model}, not loaded"}
    report = _begun(known, names, args.seconds)
    if any(path.exists() for path in files):
        print(f"{' and '.join(str(path) for path in files if path.exists())}: will be replaced", flush=True)
    try:
        _run(args, report)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut off what is being written
        report.was_interrupted = True
        _finish(args, report)
        raise
    _finish(args, report)
    return FAILED if report.faults else 0


def _require_sound(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be told before a model is loaded."""
    if not (math.isfinite(args.seconds) and args.seconds >= LEAST):
        raise UsageError(f"--seconds must be a number of at least {LEAST:g}, not {args.seconds:g}")
    if args.max_ratio is not None and not (math.isfinite(args.max_ratio) and args.max_ratio > 0):
        raise UsageError(f"--max-ratio must be a number above 0, not {args.max_ratio:g}")
    for drafter in args.drafter:
        check_drafter(drafter, {})


def _files(args: argparse.Namespace) -> list[Path]:
    """Those to write. Raises UsageError if that cannot be."""
    files = [path for path in (args.json, args.markdown) if path is not None]
    for path in files:
        require_place(path)
    if len({os.path.realpath(path) for path in files}) < len(files):
        raise UsageError(f"--json and --markdown both name {files[0]}; give them files of their own")
    return files


def _begun(known: dict[str, str], names: Sequence[str], seconds: float) -> Report:
    """Before the model is loaded; imports MLX."""
    from .machine import facts

    return Report(facts() | known, plan.sections(names), seconds)


def _run(args: argparse.Namespace, report: Report) -> None:
    """Load, measure, show."""
    from mlx_lm.generate import wired_limit

    from .budget import Budget
    from .subject import Subject

    started = time.perf_counter()
    subject = Subject.load(args.model, args.drafter)
    subject.max_ratio = args.max_ratio
    report.facts |= subject.facts() | {"loading": f"{time.perf_counter() - started:.1f} s, drafters included"}
    print(f"\n{text.facts(report)}\n", flush=True)
    budget = Budget(args.seconds)
    with _progress(budget, args.seconds) as (tell, show), wired_limit(subject.model):
        subject.tell = tell
        plan.fill(subject, report.sections, budget, show, args.debug)


def _finish(args: argparse.Namespace, report: Report) -> None:
    print(report.verdict(), flush=True)
    if args.json is not None:
        _write(args.json, json.dumps(report.as_dict(), indent=1, allow_nan=False) + "\n")
    if args.markdown is not None:
        _write(args.markdown, text.markdown(report))


@contextmanager
def _progress(budget: Any, seconds: float) -> Iterator[tuple[Callable[[str], None], Callable[[Section], None]]]:
    """(say what is being done, show a section that is done): a bar of seconds on stderr if that is a terminal."""
    from tqdm import tqdm

    form = "{l_bar}{bar}| {n:.0f} of {total:.0f} s"
    with tqdm(total=seconds, bar_format=form, leave=False, disable=None, file=sys.stderr) as bar:

        def tell(what: str) -> None:
            bar.n = min(seconds, seconds - budget.left)
            bar.set_description_str(what)

        def show(section: Section) -> None:
            bar.clear()
            print(f"{text.table(section)}\n", flush=True)

        yield tell, show


def _names(only: Sequence[str] | None) -> list[str]:
    wrong = next((name for name in only or () if name not in plan.PLAN), None)
    if wrong is not None:
        raise UsageError(f"--only: there is no section {wrong!r}; there are {', '.join(plan.PLAN)}")
    return [name for name in plan.PLAN if only is None or name in only]


def _write(path: Path, content: str) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; the report is above") from None
    print(f"written: {path}", flush=True)


if __name__ == "__main__":
    main()

"""The command: `record` on a machine with torch, `check` wherever MLX runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..command import Parser, run_command, use_device
from ..errors import InputError, UsageError
from ..options import check_limits

if TYPE_CHECKING:
    from .shapes import Shape

EDIT = 'set age=44 in {"name": "Bob", "age": 31, "city": "Oslo", "job": "baker", "active": true}'
DESCRIPTION = """\
Show that this package computes what the reference computes.

`record` runs transformers' DiffusionGemma in torch and writes a bundle: what it computed, in
float64, in both passes, in ar mode and in a round of verification; its own error in float32 or
bfloat16; what it drew and decided. `check` replays a bundle on MLX, without torch: every layer must
be as near to float64 as the reference is, within a factor of 4, and every decision and token equal;
a quantised checkpoint is compared, not judged. `widths` shows whether this device chooses the same
tokens when drafts are verified many positions at a time. Exit status: 0 the same, 1 not, 2 bad usage."""


def main(argv: Sequence[str] | None = None) -> None:
    run_command(lambda args: args.run(args), _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("mlx_dgemma.parity", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{record,check,widths}")
    _add_record(commands.add_parser("record", help="run the reference and write a bundle (needs torch)"))
    _add_check(commands.add_parser("check", help="replay a bundle on MLX and judge it"))
    _add_widths(commands.add_parser("widths", help="compare verifying many positions at once with one at a time"))
    return parser


def _add_record(parser: argparse.ArgumentParser) -> None:
    from .shapes import SHAPES

    parser.set_defaults(run=_record)
    add = parser.add_argument
    shapes = ", ".join(SHAPES)
    add("--model", default="nano", help=f"nano, tiny:<shape> ({shapes}), a folder or a Hub id (%(default)s)")
    add("--out", type=Path, required=True, help="the folder to write; must not exist")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where torch runs (%(default)s)")
    add(
        "--dtype",
        choices=("float64", "float32", "bfloat16"),
        default="float32",
        help="what it generates in, and has its error measured in (float64: in float32); the truth is float64 "
        "always. Say bfloat16 for trained weights alone: a random model's errors say something in float32 only "
        "(%(default)s)",
    )
    add("--seed", type=int, help="of the draws, and of a tiny model's weights (0; a tiny shape has its own)")
    add("--prompt", help="text, encoded without a chat template (random ids; not for tiny shapes)")
    add("--prompt-length", type=int, help="how many random ids (one and a half windows; not for tiny shapes)")
    add("--max-new-tokens", type=int, help="rounded up to whole canvases (two canvases; not for tiny shapes)")
    add("--max-denoising-steps", type=int, help="(the checkpoint's; not for tiny shapes)")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_check)
    add = parser.add_argument
    add("bundle", type=Path, nargs="+", metavar="BUNDLE", help="folders that record wrote")
    add("--model", help="the checkpoint, if it is neither in the bundle nor embedded here; or a quantised one")
    add("--device", choices=("cpu", "gpu"), help="where MLX runs (its default device)")
    add("--max-ratio", type=float, metavar="R", help="allow more than 4, on a device known to round worse (4)")
    add("--debug", action="store_true", help="show the traceback of an error")


def _add_widths(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_widths)
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (%(default)s)')
    add("--prompt", default=EDIT, help="what to answer (a JSON edit)")
    add("--max-tokens", type=int, default=128, help="length of the answer (%(default)s)")
    add("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="drafts a pass (1 2 4 8 16)")
    add("--temp", type=float, nargs="+", default=[0.0, 1.0], metavar="T", help="temperatures (0 1)")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--device", choices=("cpu", "gpu"), help="where MLX runs (its default device)")
    add("--debug", action="store_true", help="show the traceback of an error")


def _record(args: argparse.Namespace) -> int:
    for name in ("prompt_length", "max_new_tokens", "max_denoising_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be greater than 0, not {value}")
    if args.prompt is not None and not args.prompt.strip():
        raise UsageError("--prompt is empty; give it some text, or leave it out for random ids")
    if args.dtype == "float64" and args.device != "cpu":
        raise UsageError("--dtype float64: float64 is the host's work; use --device cpu")
    tiny = _tiny_shape(args) if args.model.startswith("tiny:") else None
    from . import record  # torch: what can be told without it has been told

    if tiny is not None:
        facts = record.record_tiny(tiny, args.model, args.out, args.device, args.seed, args.dtype)
    else:
        facts = record.record_checkpoint(
            args.model,
            args.out,
            device=args.device,
            dtype=args.dtype,
            seed=args.seed or 0,
            prompt=args.prompt,
            prompt_length=args.prompt_length,
            max_new_tokens=args.max_new_tokens,
            max_denoising_steps=args.max_denoising_steps,
        )
    steps = " + ".join(map(str, facts["canvases"]))
    print(f"{args.out}: {len(facts['canvases'])} canvases of {steps} steps, {len(facts['floors'])} quantities")
    if facts["device_bytes_beside_model"] is not None:
        said = (f"{size / 1e9:.2f} GB in {what}" for what, size in facts["device_bytes_beside_model"].items())
        print(f"{facts['device']}: beside the model at most {', '.join(said)}")
    return 0


def _tiny_shape(args: argparse.Namespace) -> Shape:
    from .shapes import shape

    for name in ("prompt", "prompt_length", "max_new_tokens", "max_denoising_steps"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')}: a tiny shape has its own; leave it out or use --model FOLDER"
            )
    return shape(args.model.removeprefix("tiny:"))


def _check(args: argparse.Namespace) -> int:
    if args.max_ratio is not None and not 0 < args.max_ratio < math.inf:
        raise UsageError(f"--max-ratio must be a number above 0, not {args.max_ratio:g}")
    use_device(args.device)
    from .check import check
    from .compare import compare, is_quantised

    if is_quantised(args.model):
        if args.max_ratio is not None:
            raise UsageError(f"--max-ratio: {args.model} is quantised, which is compared and not judged; leave it out")
        for folder in args.bundle:
            print(compare(folder, args.model).table(), end="\n\n", flush=True)
        return 0
    failed = []
    for folder in args.bundle:
        report = check(folder, args.model, args.max_ratio)
        print(report.table(), end="\n\n", flush=True)
        failed += [] if report.passed else [f"{folder} at {report.first_failure}"]
    if failed:
        raise InputError(f"not the same as the reference: {'; '.join(failed)}")
    return 0


def _widths(args: argparse.Namespace) -> int:
    for width in args.widths:
        check_limits(args.max_tokens, None, args.seed, "oracle", width)
    use_device(args.device)
    from ..decoding.prefill import check_prompt
    from ..loading import load
    from ..prompt import encode_prompt
    from .widths import HEAD, compare, plain_options

    model, tokenizer = load(args.model)
    ids = encode_prompt(tokenizer, args.prompt)
    check_prompt(model, ids, room=1)
    faults = []
    for temperature in args.temp:
        config = plain_options(model.generation_config, temperature, args.max_tokens)
        print(f"{args.model}, {str(model.dtype).removeprefix('mlx.core.')}, temperature {temperature:g}\n{HEAD}")
        for result in compare(model, ids, config, args.seed, args.widths):
            print(result.line(), flush=True)
            faults += [] if result.passed else [f"{result.width} drafts at temperature {temperature:g}"]
        print()
    if faults:
        raise InputError(f"not the same tokens, and no rounding explains it: {'; '.join(faults)}")
    return 0

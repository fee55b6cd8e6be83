"""The command `mlx_dgemma.train_drafter`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from ...command import Parser, run_command
from .options import DTYPES, FAMILIES, SAVE_EVERY, Options, Sizes
from .prompts import FORMS


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    run_command(lambda args: _command(args, words), argument_parser(), argv)


def argument_parser() -> argparse.ArgumentParser:
    default = Options()
    parser = Parser(
        prog="mlx_dgemma.train_drafter",
        description="Train a block drafter for the weights that are served: the model answers prompts in ar mode, "
        "and the drafter learns to foresee it. Interrupted, the same command goes on.",
    )
    add = parser.add_argument
    add("--model", default="nano", help='whom it drafts for: a folder, a Hub id, or "nano" (default: nano)')
    add("--revision", help="of the Hub repository (default: its main branch)")
    add("--prompts", required=True, metavar="FILE", help=f"a JSON line each: {FORMS}")
    add("--out", required=True, metavar="FOLDER", help="to write the drafter to; must not exist")
    add("--init", metavar="DRAFTER", help='continue this one: a folder, a Hub id, or "nano" (default: a new one)')
    group = parser.add_argument_group("answers")
    add = group.add_argument
    add("--max-tokens", type=int, default=default.max_tokens, help="of an answer (default: 512)")
    add("--at-once", type=int, default=default.at_once, help="answers written side by side (default: 8)")
    add("--held-out", type=float, default=default.held_out, help="share never trained on, to measure (default: 0.05)")
    add(
        "--answers",
        metavar="FILE",
        help="take the answers from here if it exists, else keep them here, for trainings with other options",
    )
    group = parser.add_argument_group("a new drafter; defaults are the published one's for Gemma 4")
    add = group.add_argument
    add("--family", help=f"{' or '.join(FAMILIES)} (default: dflash)")
    add("--layers", type=int, help="all sliding but the last (5)")
    add("--taps", type=_taps, help="layers of the model that it reads: how many, or which, as 1,6,11 (6)")
    add("--heads", type=int, help="query heads (32)")
    add("--kv-heads", type=int, help="key and value heads (8)")
    add("--head-dim", type=int, help="of a head (128)")
    add("--intermediate-size", type=int, help="of the MLP (twice the model's hidden size)")
    add("--block", type=int, help="positions run for a draft; dflash drafts one fewer (16)")
    add("--window", type=int, help="tokens that sliding layers see (2048)")
    add("--markov-rank", type=int, help="of dspark's correction by the token before (256)")
    add("--mask-token", type=int, help="id that stands for a token to guess (4)")
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=float, default=default.epochs, help="passes over the answers (default: 3)")
    add("--steps", type=int, help="instead of --epochs: steps")
    add("--batch", type=int, default=default.batch, help="answers a step (default: 4)")
    add("--anchors", type=int, default=default.anchors, help="blocks an answer and step, at random (default: 512)")
    add("--lr", type=float, default=default.lr, help="highest learning rate (default: 6e-4)")
    add("--warmup", type=float, default=default.warmup, help="share of the steps (default: 0.04)")
    add("--seed", type=int, default=default.seed, help="of everything random (default: 0)")
    add("--dtype", default=default.dtype, help=f"to write: {', '.join(DTYPES)} (default: bfloat16)")
    add(
        "--micro-batch-gb",
        type=float,
        default=default.micro_batch_gb,
        help="memory for blocks that are run together (default: 2)",
    )
    add("--save-every", type=int, default=SAVE_EVERY, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def _taps(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or layers as 1,6,11, not {text!r}") from None
    return numbers if "," in text else numbers[0]


def _command(args: argparse.Namespace, words: Sequence[str]) -> None:
    given = vars(args)
    options = Options(**{field.name: given[field.name] for field in fields(Options)})
    sizes = Sizes(**{field.name: given[field.name] for field in fields(Sizes)})
    from .pipeline import train_drafter

    out = train_drafter(
        args.model,
        args.prompts,
        args.out,
        init=args.init,
        sizes=sizes,
        options=options,
        revision=args.revision,
        save_every=args.save_every,
        answers_file=args.answers,
        typed=["mlx_dgemma.train_drafter", *words],
    )
    print(out)


if __name__ == "__main__":
    main()

"""Train nano, or fine-tune a DiffusionGemma on one's own data, with transformers' own class.

    python -m benchmarks.nano.train --rung 1 --steps 6000 --out rung1                  # nano, from random weights
    python -m benchmarks.nano.train --rung 2 --steps 3000 --init rung1 --out rung2     # and on
    python -m benchmarks.nano.train --rung 1 --steps 6000 --out rung1 --minutes 9      # in parts: say it again to go on
    python -m benchmarks.nano.train --init PATH_OR_HUB_ID --data own.jsonl --steps 500 --lr 2e-5 --matrix-lr 2e-5 \\
        --freeze router experts embed_tokens --out tuned                                # fine-tuning

Own data are JSON lines {"prompt": text or chat messages, "answer": text, "thought": text if there is one}. Losses:
cross-entropy of one random block of the answer as a noised canvas, and of the next token, see objective.py. Muon
trains matrices, AdamW the rest. The folder holds the state of the training (state.pt, which may be deleted), its
log and the checkpoint, after Ctrl-C as well.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.drafter.training.prompts import contents
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.folders import resumable

from .tasks import RUNGS, TASKS, tasks_to, training_stream

if TYPE_CHECKING:
    from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase

    from ..examples import Example
    from .rows import Row
    from .trainer import Plan

TOKENIZER_SAMPLE = 20_000  # examples
VOCAB_SIZE = 1024
LAST_SEED = 10**12  # torch takes 64 bits, of which a step of a training needs some
FEW_EXPERTS = 8  # up to so many, computing all of them is faster than choosing


def _command(args: argparse.Namespace) -> None:
    _require_sound(args)
    try:
        import torch

        from .faster import faster_layers
        from .own import read
        from .rows import batches
        from .trainer import Trainer, read_state
    except ImportError as error:
        raise InputError(f"training needs torch and transformers ({error}); pip install -e '.[reference]'") from None

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch has no CUDA here; use --device cpu")
    _require_new(args.out)
    torch.manual_seed(args.seed)
    plan = _plan(args)
    state = read_state(args.out, plan)  # of another run is said before anything is loaded
    own = read(args.data) if args.data is not None else None
    model, tokenizer = _initial(args, plan)
    if model.config.text_config.num_experts <= FEW_EXPERTS:
        faster_layers(model)
    is_half = args.device == "cuda" if args.autocast is None else args.autocast == "bfloat16"
    trainer = Trainer(model.to(args.device), tokenizer, plan, args.out, args.device, is_half)
    if state is not None:
        trainer.resume(state)
        del state
    seed = args.seed * 1_000_003 + trainer.step  # a training that goes on meets new examples
    rows = _rows(own, plan, tokenizer, seed)
    canvas, pad = args.canvas or model.config.canvas_length, model.generation_config.pad_token_id
    args.out.mkdir(parents=True, exist_ok=True)
    with resumable(args.out, args.out):
        trainer.run(batches(rows, args.batch, canvas, pad, seed), args.minutes * 60, args.save_every)


def _require_new(out: Path) -> None:
    """Raise UsageError for a file, or a folder with a checkpoint that no training here would go on from."""
    from .trainer import STATE

    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is not a folder; name another --out")
    if (out / "config.json").exists() and not (out / STATE).exists():
        raise UsageError(f"{out}: holds a checkpoint, and no {STATE} of a training; name another --out")


def _plan(args: argparse.Namespace) -> Plan:
    from .trainer import Plan

    is_own = args.data is not None
    return Plan(
        init=args.init,
        data=hashlib.sha256(contents(args.data)).hexdigest() if is_own else None,
        shares=None if is_own else args.shares or {name: TASKS[name].share for name in tasks_to(args.rung)},
        batch=args.batch,
        canvas=args.canvas,
        dtype=args.dtype or "float32",
        steps=args.steps,
        decay=args.steps // 4 if args.decay is None else args.decay,
        lr=args.lr,
        matrix_lr=args.matrix_lr,
        self_conditioning=args.self_conditioning,
        stepped=args.stepped,
        freeze=tuple(args.freeze),
        seed=args.seed,
    )


def _require_sound(args: argparse.Namespace) -> None:
    """Raise UsageError for what cannot be done, or would be ignored."""
    is_own, is_random = args.data is not None, args.init is None
    counts = args.steps, args.batch, args.save_every, 1 if args.canvas is None else args.canvas
    above = [task for task in args.shares or () if args.rung is not None and TASKS[task].rung > args.rung]
    wrong = {
        "say what to train on: --rung N (nano's tasks) or --data FILE (your own)": (args.rung is None) != is_own,
        "--data fine-tunes a checkpoint: say which one (--init)": is_own and is_random,
        "--shares is of nano's tasks (--rung), not of --data": is_own and args.shares is not None,
        f"--shares {', '.join(above)}: of a rung above --rung {args.rung}": bool(above),
        "--minutes must be more than 0": not args.minutes > 0,
        f"--seed must be in 0-{LAST_SEED}": not 0 <= args.seed <= LAST_SEED,
        "--dtype is of the weights of --init; random ones are float32": is_random and args.dtype is not None,
        "--steps, --batch, --save-every and --canvas must be 1 at least": min(counts) < 1,
        "--decay is some of --steps, from 0 to all": not 0 <= (args.decay or 0) <= args.steps,
        "--lr and --matrix-lr must be 0 at least": not (0 <= args.lr < math.inf and 0 <= args.matrix_lr < math.inf),
        "--self-conditioning and --stepped are shares, from 0 to 1": not (
            0 <= args.self_conditioning <= 1 and 0 <= args.stepped <= 1
        ),
        "--stepped is a share of the rows that --self-conditioning feeds": args.stepped > 0
        and not args.self_conditioning,
    }
    if said := next((said for said, is_wrong in wrong.items() if is_wrong), None):
        raise UsageError(said)


def _initial(args: argparse.Namespace, plan: Plan) -> tuple[DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase]:
    """What a training begins with, or goes on with: its own checkpoint, but for the weights, which its state has."""
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    from mlx_dgemma.config import ModelConfig
    from mlx_dgemma.loading import resolve

    from ..engines import require_readable

    if (args.out / "config.json").exists():
        folder = args.out
    elif args.init is not None:
        folder = resolve(args.init)
    else:
        return _random_nano(args.seed)
    require_readable(ModelConfig.read(folder), str(folder))
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=getattr(torch, plan.dtype))
    needed = ["pad_token_id", "eos_token_id", *(["sampler_config"] if plan.stepped else [])]
    if missing := next((name for name in needed if getattr(model.generation_config, name) is None), None):
        raise InputError(f"{folder / 'generation_config.json'} has no {missing}, which training needs")
    return model, AutoTokenizer.from_pretrained(folder)


def _random_nano(seed: int) -> tuple[DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase]:
    """nano with random weights and a tokenizer for the tasks of all rungs."""
    from transformers import DiffusionGemmaForBlockDiffusion

    from .shape import generation_config, nano_config
    from .tokenizer import build, texts

    shares = {name: task.share for name, task in TASKS.items() if name != "sudoku9"}  # whose digits others have
    tokenizer = build(texts(islice(training_stream(seed, shares), TOKENIZER_SAMPLE)), VOCAB_SIZE)
    model = DiffusionGemmaForBlockDiffusion(nano_config(len(tokenizer)))
    model.generation_config = generation_config()
    return model, tokenizer


def _rows(own: Sequence[Example] | None, plan: Plan, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[Row]:
    """Endless rows of nano's tasks or of the user's own data."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from .own import encoded, endless
    from .rows import encode
    from .tokenizer import TURN_END

    (end,) = tokenizer.convert_tokens_to_ids([TURN_END])
    wrapped = TokenizerWrapper(tokenizer)
    if own is not None:
        return endless(encoded(own, wrapped, end), seed)
    return (
        encode(wrapped, end, example.prompt, example.answer, example.thought)
        for example in training_stream(seed, plan.shares)
    )


def parse_shares(text: str) -> dict[str, float]:
    """`json=0.2,sudoku=0.4` -> shares by task."""
    try:
        shares = {task: float(share) for task, _, share in (part.partition("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"write json=0.2,sudoku=0.4, not {text!r:.80}") from None
    if unknown := next((task for task in shares if task not in TASKS), None):
        raise argparse.ArgumentTypeError(f"no task {unknown}: there are {', '.join(TASKS)}")
    if never := next((task for task in shares if not TASKS[task].share), None):
        raise argparse.ArgumentTypeError(f"{never} is never trained on")
    if min(shares.values()) < 0 or not 0 < sum(shares.values()) < math.inf:
        raise argparse.ArgumentTypeError(f"shares are numbers from 0 on, not all 0, not {text!r:.80}")
    return shares


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.nano.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the checkpoint; one begun before goes on")
    add("--init", metavar="MODEL", help="start from this checkpoint, folder or Hub id (default: random weights)")
    add("--rung", type=int, choices=RUNGS, help="train on nano's tasks up to this rung of its ladder")
    add("--shares", type=parse_shares, metavar="TASK=SHARE,...", help="of these tasks alone")
    add("--data", type=Path, metavar="FILE", help="fine-tune on these JSON lines")
    add("--steps", type=int, required=True, help="of the whole run")
    add("--decay", type=int, help="the last steps, over which the learning rates fall to 0 (default: a quarter)")
    add("--minutes", type=float, default=math.inf, help="stop after so long; the same command goes on (default: no)")
    add("--batch", type=int, default=32, help="rows of up to 96 ids; fewer of longer ones (default: 32)")
    add("--canvas", type=int, help="positions of a canvas, fewer of which are faster to begin with (the model's own)")
    add("--autocast", choices=("none", "bfloat16"), help="dtype of products (default: none on cpu, bfloat16 on cuda)")
    add("--lr", type=float, default=3e-3, help="of AdamW (default: 3e-3)")
    add("--matrix-lr", type=float, default=1e-2, help="of Muon (default: 1e-2)")
    add("--self-conditioning", type=float, default=0.4, help="share of rows fed a first pass (default: 0.4)")
    add("--stepped", type=float, default=0.0, help="share of those that go on from the sampler's own next canvas (0)")
    add("--freeze", nargs="+", default=[], metavar="NAME", help="keep parameters with this in their name as they are")
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights of --init (float32)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--save-every", type=int, default=500, metavar="STEPS", help="(default: 500)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

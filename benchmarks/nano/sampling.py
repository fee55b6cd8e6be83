"""Does sampling follow the distribution that was learnt? Stories of nano beside the grammar they come from.

    python -m benchmarks.nano.sampling --model RUNG3 [--count 100] [--mode ar|diffusion] [--temp 1]

Of texts drawn from a grammar, the mean of -log p is its entropy, which is known. So it is for a model that has
learnt the grammar and is sampled in ar mode at temperature 1, with nothing cut off: a lower mean says that likely
texts come too often (as at a lower temperature), a higher one that unlikely ones do. Diffusion mode draws at
temperatures of 0.4 to 0.8 and promises no distribution. Texts that the grammar does not have are counted apart.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from math import sqrt

from tqdm import trange

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.errors import UsageError

from ..intervals import Z, wilson
from .generators.stories import entropy, is_story, log_probability

FEWEST, LONGEST = 20, 400  # stories; tokens of one


def sampled(model_path: str, count: int, seed: int, **options) -> list[str]:
    """So many stories; `options` are those of generate."""
    from mlx_dgemma import generate, load

    model, tokenizer = load(model_path)
    return [generate(model, tokenizer, "story", seed=seed + number, **options) for number in trange(count)]


def report(texts: Sequence[str]) -> str:
    """Two lines: how many are of the grammar, and what those have for a mean of -log p."""
    found = [-log_probability(text.strip()) for text in texts if is_story(text)]
    low, high = wilson(len(found) / len(texts), len(texts))
    lines = [f"of the grammar: {len(found)} of {len(texts)} ({len(found) / len(texts):.3f} [{low:.3f}, {high:.3f}])"]
    if len(found) > 1:
        mean, half = statistics.fmean(found), Z * statistics.stdev(found) / sqrt(len(found))
        far = "the entropy lies within" if abs(mean - entropy()) <= half else "the entropy lies outside"
        lines.append(f"mean of -log p: {mean:.2f} ± {half:.2f} nats, entropy {entropy():.2f}: {far}")
    return "\n".join(lines)


def _command(args: argparse.Namespace) -> None:
    if args.count < FEWEST:
        raise UsageError(f"--count {args.count}: fewer than {FEWEST} stories say nothing")
    if args.temp is not None and args.mode != "ar":
        raise UsageError("--temp is an option of ar mode; diffusion mode has the temperatures of its checkpoint")
    plain = {"temperature": 1.0 if args.temp is None else args.temp, "top_p": 1.0, "top_k": 0}
    options = plain if args.mode == "ar" else {}
    print(report(sampled(args.model, args.count, args.seed, mode=args.mode, max_tokens=LONGEST, **options)))


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.nano.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a nano that has learnt stories (rung 3), as the embedded one has not")
    add("--count", type=int, default=100, help="stories (default: 100)")
    add("--mode", choices=("ar", "diffusion"), default="ar", help="(default: ar)")
    add("--temp", type=float, help="temperature in ar mode (1)")
    add("--seed", type=int, default=0, help="of the first story (default: 0)")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

"""AR mode without a drafter beside mlx-lm's Gemma 4: same weights, device and process, in interleaved pairs.

    python -m benchmarks.causal_speed [--model nano] [--pairs 20] [--tokens 128] [--json FILE]

The checkpoint's causal pass is written as a plain Gemma 4 into a temporary
folder, for mlx-lm's own model. A pair is one of nano's held-out prompts continued greedily by both,
eos being a token like any other, the order alternating from pair to pair. Compared are the loops:
`mlx_lm.generate.generate_step` and ours, without detokenising. Ratios are ours / theirs with a 95 %
t-interval over the pairs' log-ratios. Where texts part, the margin is printed: small at a tie.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import generate_step, generation_stream

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.convert import convert
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.draws import Draws
from mlx_dgemma.errors import UsageError
from mlx_dgemma.files import require_place, write_whole
from mlx_dgemma.loading import load, resolve
from mlx_dgemma.model import DiffusionGemma

from .diffusion import held_out_questions
from .measure import FEWEST_PAIRS, alternating, environment, paired_ratio, spare_compiler

FEWEST_TOKENS = 2
Loop = Callable[[list[int]], Iterator[int]]  # prompt -> the tokens that follow


@dataclass(frozen=True)
class Text:
    """What one loop wrote, and when."""

    tokens: list[int]
    prompt_seconds: float  # to the first token
    seconds: float  # from the first token to the last

    @property
    def rate(self) -> float:
        return (len(self.tokens) - 1) / self.seconds

    @property
    def whole_rate(self) -> float:
        return len(self.tokens) / (self.prompt_seconds + self.seconds)


QUANTITIES: dict[str, Callable[[Text], float]] = {
    "tokens per second": lambda text: text.rate,
    "tokens per second, prompt included": lambda text: text.whole_rate,
}


def our_loop(model: DiffusionGemma, count: int) -> Loop:
    config = model.generation_config.replace(temperature=0.0, eos_token_ids=(), max_new_tokens=count)
    draws = Draws([0], model.config.vocab_size)
    return lambda prompt: (token.id for token in decode(model, prompt, config, draws))


def their_loop(folder: Path, dtype: mx.Dtype, count: int) -> Loop:
    spare_compiler()
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return lambda prompt: (int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count))


def timed(loop: Loop, prompt: list[int]) -> Text:
    """The clock stops at the last token; what was launched beyond it is waited for afterwards."""
    clock, tokens = [time.perf_counter()], []
    for token in loop(prompt):
        tokens.append(token)
        clock.append(time.perf_counter())
    for stream in (mx.default_stream(mx.default_device()), generation_stream):
        mx.synchronize(stream)
    return Text(tokens, clock[1] - clock[0], clock[-1] - clock[1])


def run(loops: Sequence[Loop], prompts: Sequence[list[int]]) -> list[list[Text]]:
    """The texts of each loop, one a prompt; the first prompt is run once before, unmeasured."""
    from tqdm import tqdm

    texts: list[list[Text]] = [[] for _ in loops]
    for loop in loops:
        timed(loop, prompts[0])
    for number, prompt in enumerate(tqdm(prompts, unit="pair")):
        for loop, column in alternating(list(zip(loops, texts, strict=True)), number):
            column.append(timed(loop, prompt))
    return texts


def margins(model: DiffusionGemma, prompts: Sequence[list[int]], texts: Sequence[Sequence[Text]]) -> list[float]:
    """For every pair that parts, how far our logits of the two tokens are from each other there."""
    found = []
    for prompt, ours, theirs in zip(prompts, *texts, strict=True):
        pairs = zip(ours.tokens, theirs.tokens, strict=True)
        parting = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if parting is not None:
            known = mx.array([[*prompt, *ours.tokens[:parting]]])
            logits = model.logits(model.encode(known, model.make_cache())[:, -1:])[0, 0]
            found.append((logits[ours.tokens[parting]] - logits[theirs.tokens[parting]]).item())
    return found


def _command(args: argparse.Namespace) -> None:
    if args.json:
        require_place(args.json)
    if args.pairs < FEWEST_PAIRS:
        raise UsageError(f"--pairs must be at least {FEWEST_PAIRS}; fewer give no interval")
    if args.tokens < FEWEST_TOKENS:
        raise UsageError(f"--tokens must be at least {FEWEST_TOKENS}, not {args.tokens}")
    folder = resolve(args.model)
    model, tokenizer = load(folder)
    with tempfile.TemporaryDirectory() as work:
        convert(folder, Path(work) / "gemma4", export="gemma4", progress=False)
        loops = [our_loop(model, args.tokens), their_loop(Path(work) / "gemma4", model.dtype, args.tokens)]
    prompts = [question.ids for question in held_out_questions(tokenizer, args.pairs)]
    names = ["mlx_dgemma", f"mlx-lm {version('mlx-lm')}"]
    result: dict[str, Any] = environment(args.model, model) | {
        "pairs": f"{args.pairs}, {args.tokens} tokens each, greedy",
        "prompts": f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens",
    }
    print("\n".join(f"{key}: {value}" for key, value in result.items()))
    texts = run(loops, prompts)
    print(f"\n{'':36}" + "".join(name.rjust(16) for name in names) + "   ratio, 95 % interval")
    for name, of in QUANTITIES.items():
        values = [[of(text) for text in column] for column in texts]
        means, ratio = [statistics.fmean(column) for column in values], paired_ratio(*values)
        print(f"{name:36}" + "".join(f"{mean:16.1f}" for mean in means) + f"   {ratio}")
        result[name] = {"means": means, "ratio": asdict(ratio)}
    parted = margins(model, prompts, texts)
    at = (
        f"; our logits where the others part: {', '.join(f'{margin:.1e}' for margin in parted)} apart" if parted else ""
    )
    print(f"same tokens in {args.pairs - len(parted)} of {args.pairs} pairs{at}")
    result |= {"margins": parted, "texts": dict(zip(names, [[asdict(text) for text in c] for c in texts], strict=True))}
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.causal_speed", description="Measure ar mode beside mlx-lm's Gemma 4 on the same weights."
    )
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    add("--pairs", type=int, default=20, help="prompts continued by both (default: 20)")
    add("--tokens", type=int, default=128, help="that each writes (default: 128)")
    add("--json", type=Path, metavar="FILE", help="write every text and the summary")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

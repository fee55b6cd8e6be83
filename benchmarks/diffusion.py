"""Diffusion mode beside mlx-vlm: same weights, device, process and options, in interleaved pairs.

    python -m benchmarks.diffusion [--model nano] [--pairs 20] [--json FILE] [--no-mlx-vlm]

Three settings. `natural`: the checkpoint's options, until the stop rule fires. `fixed`: the same
prompts, every step run. `prefill`: a long prompt and one step, for the prefill alone. A pair is one
prompt and seed answered by both, one canvas each, the order alternating from pair to pair. Ratios
are ours / theirs with a 95 % t-interval over the pairs' log-ratios. Prompts are nano's held-out
ones, so that an answer is right or wrong; the engines draw different noise from the same seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.errors import UsageError
from mlx_dgemma.files import require_place, write_whole

from .measure import FEWEST_PAIRS, Question, Timed, TimedOurs, alternating, environment, is_right, paired_ratio

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_dgemma.config import GenerationConfig
    from mlx_dgemma.model import DiffusionGemma

# name -> (what it is of an answer, decimals, whether a pair's ratio means something)
QUANTITIES: dict[str, tuple[Callable[[Timed], float], int, bool]] = {
    "ms per denoising step": (lambda answer: answer.ms_per_step, 2, True),
    "forwards per canvas": (lambda answer: answer.denoise_forwards, 2, False),
    "forwards per token": (lambda answer: answer.forwards_per_token, 3, False),
    "prefill tokens per second": (lambda answer: answer.prefill_rate, 0, True),
    "peak memory, MB": (lambda answer: answer.peak_bytes / 1e6, 1, False),
}


class TimedEngine(Protocol):
    name: str

    def answer(self, prompt: list[int], config: GenerationConfig, seed: int) -> Timed: ...


@dataclass(frozen=True)
class Setting:
    """One way of running: the quantities that it is there for, the options, one question a pair."""

    name: str
    quantities: tuple[str, ...]
    config: GenerationConfig
    questions: list[Question]


def held_out_questions(tokenizer: TokenizerWrapper, count: int) -> list[Question]:
    """Held-out prompts of the embedded nano's tasks, taking turns."""
    from mlx_dgemma.prompt import encode_prompt

    from .nano.tasks import EMBEDDED_TASKS, held_out

    tasks = [held_out(task, math.ceil(count / len(EMBEDDED_TASKS))) for task in EMBEDDED_TASKS]
    examples = [tasks[i % len(tasks)][i // len(tasks)] for i in range(count)]
    return [Question(encode_prompt(tokenizer, example.prompt), example.answer) for example in examples]


def settings(model: DiffusionGemma, tokenizer: TokenizerWrapper, args: argparse.Namespace) -> list[Setting]:
    canvas, longest = model.config.canvas_length, model.config.max_position_embeddings
    if args.prefill_tokens > longest - canvas:
        raise UsageError(f"--prefill-tokens must be at most {longest - canvas} with this model")
    questions = held_out_questions(tokenizer, args.pairs)
    natural = model.generation_config.replace(max_new_tokens=canvas)
    steps = args.fixed_steps
    # more equal canvases than there are steps: the rule cannot fire, and both engines have the option
    fixed = natural.replace(max_denoising_steps=steps, stability_threshold=steps)
    words = [token for question in questions for token in question.ids] * args.prefill_tokens
    long = Question(words[: args.prefill_tokens], None)
    decoding = tuple(name for name in QUANTITIES if not name.startswith("prefill"))
    return [
        Setting("natural", decoding, natural, questions),
        Setting(f"fixed, {steps} steps", decoding, fixed, questions),
        Setting(
            f"prefill, {args.prefill_tokens} tokens",
            ("prefill tokens per second", "peak memory, MB"),
            natural.replace(max_denoising_steps=1),
            [long] * args.pairs,
        ),
    ]


def run_setting(engines: Sequence[TimedEngine], setting: Setting, seed: int) -> list[list[Timed]]:
    """The answers of each engine, one a pair; the first pair is run once before, unmeasured."""
    from tqdm import tqdm

    for engine in engines:
        engine.answer(setting.questions[0].ids, setting.config, seed)
    answers: list[list[Timed]] = [[] for _ in engines]
    for number, question in enumerate(tqdm(setting.questions, desc=setting.name, unit="pair")):
        for engine, column in alternating(list(zip(engines, answers, strict=True)), number):
            column.append(engine.answer(question.ids, setting.config, seed + number))
    return answers


def summary(setting: Setting, answers: list[list[Timed]], tokenizer: TokenizerWrapper) -> dict[str, dict[str, Any]]:
    """quantity -> {"means": one per engine, "ratio": of the first two, where pairs can be compared}."""
    rows: dict[str, dict[str, Any]] = {}
    for name in setting.quantities:
        of, _, is_paired = QUANTITIES[name]
        values = [[of(answer) for answer in column] for column in answers]
        rows[name] = {"means": [statistics.fmean(column) for column in values]}
        if is_paired and len(values) == 2:
            rows[name]["ratio"] = asdict(paired_ratio(*values))
    if setting.questions[0].expected is not None:
        eos = setting.config.eos_token_ids
        right = [
            [
                is_right(tokenizer, answer.tokens, question, eos)
                for answer, question in zip(column, setting.questions, strict=True)
            ]
            for column in answers
        ]
        rows["exact answers, %"] = {"means": [100 * statistics.fmean(column) for column in right]}
    return rows


def table(setting: Setting, names: Sequence[str], rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{setting.name} ({len(setting.questions)} pairs)".ljust(36) + "".join(name.rjust(20) for name in names)]
    if len(names) == 2:
        lines[0] += "   ratio, 95 % interval"
    for name, row in rows.items():
        decimals = QUANTITIES[name][1] if name in QUANTITIES else 0
        line = f"  {name:34}" + "".join(f"{mean:20.{decimals}f}" for mean in row["means"])
        if "ratio" in row:
            line += "   {mean:.3f} [{low:.3f}, {high:.3f}]".format(**row["ratio"])
        lines.append(line)
    return "\n".join(lines)


def _options(config: GenerationConfig) -> str:
    names = "max_denoising_steps entropy_bound t_min t_max stability_threshold confidence_threshold".split()
    return ", ".join(f"{name} {getattr(config, name)}" for name in names)


def _command(args: argparse.Namespace) -> None:
    if args.json:
        require_place(args.json)
    if args.pairs < FEWEST_PAIRS:
        raise UsageError(f"--pairs must be at least {FEWEST_PAIRS}; fewer give no interval")
    for name in ("fixed_steps", "prefill_tokens"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
    from mlx_dgemma.loading import load, resolve

    from .vlm import MlxVlm, installed_version

    if not args.no_mlx_vlm:
        installed_version()  # said before anything is loaded
    folder = resolve(args.model)
    model, tokenizer = load(folder)
    engines: list[TimedEngine] = [TimedOurs(model)]
    if not args.no_mlx_vlm:
        engines.append(MlxVlm(folder, model.config, model.dtype))
    names = [engine.name for engine in engines]
    result = environment(args.model, model) | {
        "canvas_length": model.config.canvas_length,
        "sampler": "entropy-bound",
        "seeds": f"{args.seed} to {args.seed + args.pairs - 1}, one a pair",
        "engines": names,
        "settings": {},
    }
    print("\n".join(f"{key}: {value}" for key, value in result.items() if key not in ("engines", "settings")))
    for setting in settings(model, tokenizer, args):
        answers = run_setting(engines, setting, args.seed)
        rows = summary(setting, answers, tokenizer)
        print(f"\n{table(setting, names, rows)}\n  {_options(setting.config)}", flush=True)
        result["settings"][setting.name] = {
            "options": asdict(setting.config),
            "summary": rows,
            "answers": [[asdict(answer) for answer in column] for column in answers],
        }
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.diffusion", description="Measure diffusion mode beside mlx-vlm on the same weights."
    )
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    add("--pairs", type=int, default=20, help="prompts answered by both, per setting (default: 20)")
    add("--fixed-steps", type=int, default=16, help="steps of the setting that runs them all (default: 16)")
    add("--prefill-tokens", type=int, default=512, help="of the long prompt (default: 512)")
    add("--seed", type=int, default=0, help="of the first pair; the next have the next ones (default: 0)")
    add("--no-mlx-vlm", action="store_true", help="measure this package alone")
    add("--json", type=Path, metavar="FILE", help="write every answer and the summary")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

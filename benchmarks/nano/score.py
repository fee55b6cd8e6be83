"""Exact-match scores of a nano checkpoint on held-out prompts, in this package and in transformers.

    python -m benchmarks.nano.score                                  # this package, 200 prompts a task
    python -m benchmarks.nano.score --engine transformers --out t.json
    python -m benchmarks.nano.score --out m.json --against t.json    # paired difference, 95 % interval
    python -m benchmarks.nano.score --mode ar --against m.json       # ar mode, greedy, beside diffusion

The checkpoint's own sampler settings; in ar mode `--temp`, and what else it says or Gemma 4's. The two
engines draw different random numbers, so answers differ where the model is unsure; scores of one
mode must agree within the interval.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.config import read_json
from mlx_dgemma.errors import InputError, UsageError

from .tasks import TASKS, Example, held_out

Answer = Callable[[Example, int], tuple[str, int, int]]  # -> text, forwards after the prompt's, new tokens
LONGEST_COUNT = 200


def with_mlx(model_path: str, **options: Any) -> Answer:
    from mlx_dgemma import load, stream_generate

    model, tokenizer = load(model_path)

    def answer(example: Example, seed: int) -> tuple[str, int, int]:
        responses = list(stream_generate(model, tokenizer, example.prompt, seed=seed, **options))
        text, last = "".join(response.text for response in responses), responses[-1]
        return text, last.denoise_forwards + last.encode_forwards - 1, last.generation_tokens

    return answer


def with_transformers(model_path: str) -> Answer:
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    from mlx_dgemma.loading import resolve

    folder = resolve(model_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    ends = set(model.generation_config.eos_token_id)

    def answer(example: Example, seed: int) -> tuple[str, int, int]:
        torch.manual_seed(seed)
        messages = [{"role": "user", "content": example.prompt}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        output = model.generate(prompt)
        ids = output.sequences[0, prompt.shape[1] :].tolist()
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        forwards = round(sum(token != tokenizer.pad_token_id for token in ids) / float(output.tokens_per_forward))
        return tokenizer.decode(ids[:length], skip_special_tokens=True), forwards, length

    return answer


ENGINES = {"mlx": with_mlx, "transformers": with_transformers}


def score(answer: Answer, count: int, seed: int) -> dict[str, list[dict]]:
    """Task -> one record per prompt."""
    records: dict[str, list[dict]] = {}
    tests = held_out()
    for task in tqdm(TASKS, unit="task"):
        records[task] = []
        for number, example in enumerate(tqdm(tests[task][:count], desc=task, leave=False)):
            text, forwards, tokens = answer(example, seed + number)
            right = text == example.answer
            records[task].append({"right": right, "forwards": forwards, "tokens": tokens, "text": text})
    return records


def paired(ours: list[dict], theirs: list[dict]) -> tuple[float, float]:
    """Mean difference of right answers, and the half-width of its 95 % interval."""
    differences = [a["right"] - b["right"] for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1)
    return mean, 1.96 * math.sqrt(variance / len(differences))


def table(records: dict[str, list[dict]], against: dict[str, list[dict]] | None) -> str:
    lines = ["| task | exact | forwards after the prompt | forwards a token |", "|---|---|---|---|"]
    if against:
        lines = [line + end for line, end in zip(lines, (" other | difference |", "---|---|"), strict=True)]
    for task, rows in records.items():
        exact = sum(row["right"] for row in rows) / len(rows)
        forwards, tokens = (sum(row[key] for row in rows) for key in ("forwards", "tokens"))
        line = f"| {task} | {exact:.3f} | {forwards / len(rows):.2f} | {(forwards + len(rows)) / tokens:.3f} |"
        if against:
            mean, half = paired(rows, against[task])
            other = sum(row["right"] for row in against[task]) / len(rows)
            line += f" {other:.3f} | {mean:+.3f} ± {half:.3f} |"
        lines.append(line)
    return "\n".join(lines)


def _command(args: argparse.Namespace) -> None:
    if not 1 <= args.count <= LONGEST_COUNT:
        raise UsageError(f"--count must lie in 1-{LONGEST_COUNT}, not {args.count}")
    is_ar = args.mode == "ar"
    if is_ar and args.engine != "mlx":
        raise UsageError("--mode ar is scored in this package alone (--engine mlx)")
    if args.temp is not None and not is_ar:
        raise UsageError("--temp is an option of ar mode (--mode ar)")
    against = read_json(args.against) if args.against else None
    if against is not None and any(len(against.get(task, ())) != args.count for task in TASKS):
        raise InputError(f"{args.against}: must hold {args.count} records a task, as --count says")
    options = {"mode": "ar", "temperature": args.temp or 0.0} if is_ar else {}
    records = score(ENGINES[args.engine](args.model, **options), args.count, args.seed)
    if args.out:
        args.out.write_text(json.dumps(records, indent=1))
    print(table(records, against))


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.nano.score", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="nano", help="a nano checkpoint (default: the embedded one)")
    add("--engine", choices=ENGINES, default="mlx", help="(default: mlx, which is this package)")
    add("--mode", choices=("diffusion", "ar"), default="diffusion", help="(default: diffusion)")
    add("--temp", type=float, help="temperature in ar mode; 0 takes the most likely token (0)")
    add("--count", type=int, default=200, help=f"prompts a task, at most {LONGEST_COUNT} (default: 200)")
    add("--seed", type=int, default=0, help="of the first prompt; the next has the next (default: 0)")
    add("--out", type=Path, metavar="FILE", help="write the records here, as JSON")
    add("--against", type=Path, metavar="FILE", help="records of the other engine or mode, same count")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

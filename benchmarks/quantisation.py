"""What quantisation costs: each of the converter's recipes beside the floats that it was made from.

    python -m benchmarks.quantisation [--model nano] [--recipe NAME|FILE ...] [--q-mode MODE ...] [--count 200]
                                      [--seed 0] [--json FILE]

Every recipe, and every mode of -q, is converted into a temporary folder and loaded; a row tells, of nano's held-out
prompts:

    bits            per weight, those of scales included
    KL causal       KL(original || quantised) of next-token distributions, mean nats per position of prompt + answer
    KL 25/50/75 %   the same of one denoising pass behind the prompt, without self-conditioning, over a canvas
                    (answer, end, pads) of which so many positions are uniform ids, the same ids for all models;
                    the mean is over the positions of the answer and its end, pads would dilute it
    steps           denoising passes until the stop rule fires, mean per answer
    diffusion, ar   exact match in %, the checkpoint's own sampler and greedy decoding, all tasks together; each
                    with the difference to the original, in points, and its 95 % interval, paired by prompt

Both modes answer the first `--count` held-out prompts a task, as `benchmarks.quality` does, with `--seed`; KL takes at
most 10 texts a task. A second table has the exact match of each task. Intervals are those of benchmarks/intervals.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_dgemma import convert
from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.convert.conversion import Conversion, Options
from mlx_dgemma.convert.recipes import DEFAULTS, RECIPES, Scheme, get_recipe
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.files import require_place, write_whole
from mlx_dgemma.loading import resolve
from mlx_dgemma.prompt import encode_prompt

from .checkers import Judges
from .engine import Setup
from .engines import Ours
from .examples import ALL, Example
from .intervals import Interval, Paired
from .measure import environment
from .nano.prompts import as_line
from .nano.tasks import EMBEDDED_TASKS as TASKS
from .nano.tasks import MOST_HELD_OUT, held_out
from .quality import answers
from .records import Run

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_dgemma.model import DiffusionGemma

MODES: dict[str, dict[str, Any]] = {"diffusion": {}, "ar": {"temperature": 0.0}}
NOISE = (0.25, 0.5, 0.75)
MOST_TEXTS = 10  # a task, for KL: their positions are thousands
KINDS = ("causal", *(f"{level:.0%}" for level in NOISE))
Logs = tuple[mx.array, ...]  # log-probabilities (positions, V) of each of KINDS


@dataclass(frozen=True)
class Text:
    """A prompt, its right answer with the end, and canvases of the answer, one a level of noise."""

    prompt: list[int]
    answer: list[int]
    canvases: np.ndarray

    def logs(self, model: DiffusionGemma) -> Logs:
        """What the model says of it."""
        cache, counted = model.make_cache(), len(self.answer)
        hidden = [model.encode(mx.array([self.prompt]), cache)]
        noised = [model.denoise(mx.array(canvas[None]), cache)[0, :counted] for canvas in self.canvases]
        hidden.append(model.encode(mx.array([self.answer]), cache))
        causal = model.logits(mx.concatenate(hidden, axis=1))[0]
        logs = tuple(z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (causal, *noised))
        mx.eval(logs)
        return logs


def texts(model: DiffusionGemma, tokenizer: TokenizerWrapper, count: int, seed: int) -> list[Text]:
    """`count` held-out texts a task, and their noise."""
    length, vocab = model.config.canvas_length, model.config.vocab_size
    made, chance = [], np.random.default_rng(seed % (1 << 64))
    for example in (example for task in TASKS for example in held_out(task, count)):
        answer = tokenizer.encode(example.answer + "<turn|>", add_special_tokens=False)[:length]
        clean = np.array(answer + [model.generation_config.pad_token_id] * (length - len(answer)))
        canvases = np.stack([clean] * len(NOISE))
        for canvas, level in zip(canvases, NOISE, strict=True):
            places = chance.permutation(length)[: round(level * length)]
            canvas[places] = chance.integers(vocab, size=len(places))
        made.append(Text(encode_prompt(tokenizer, example.prompt), answer, canvases))
    return made


def divergences(original: Sequence[Logs], other: Iterable[Logs]) -> dict[str, float]:
    """KL(original || other) of each kind, mean nats per position."""
    sums, positions = np.zeros(len(KINDS)), np.zeros(len(KINDS))
    for ours, theirs in zip(original, other, strict=True):
        sums += [(mx.exp(p) * (p - q)).sum().item() for p, q in zip(ours, theirs, strict=True)]
        positions += [len(p) for p in ours]
    return dict(zip(KINDS, (sums / positions).tolist(), strict=True))


def examples(count: int) -> list[Example]:
    """The first `count` held-out ones a task, as the quality harness takes them."""
    made = [example for task in TASKS for example in held_out(task, count)]
    return [
        Example.of(f"{example.task} {number}", number, example.prompt, as_line(example))
        for number, example in enumerate(made)
    ]


def difference(ours: Run, theirs: Run) -> Interval:
    """Of right answers to the same prompts, in points."""
    seen = Paired.of(ours.rights, theirs.rights, same_seeds=True).difference()
    return Interval(100 * seen.value, 100 * seen.low, 100 * seen.high)


class Comparison:
    """What the original says and answers, and rows of what is compared with it."""

    def __init__(self, name: str, count: int, seed: int):
        self.name, self.count, self.seed = name, count, seed
        self.examples, self.judges = examples(count), Judges.named(())
        self.logs, self.runs, self.facts = self._measured(name)

    def original(self) -> dict[str, Any]:
        return self._row({}, self.logs, self.runs)

    def converted(self, options: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            path = convert(self.name, Path(folder) / "model", **options, progress=False)
            logs, runs, _ = self._measured(str(path))
        return self._row(options, logs, runs)

    def _measured(self, name: str) -> tuple[list[Logs], dict[str, Run], dict[str, Any]]:
        """What a model says of the texts, its answers in both modes, and what it runs on."""
        runs, engine = {}, None
        for mode, options in MODES.items():
            del engine  # before there are weights twice
            engine = Ours(Setup(model=name, mode=mode, options=options))
            runs[mode] = Run(mode, {}, answers(engine, self.examples, [self.seed], self.judges))
        made = texts(engine.model, engine.tokenizer, min(self.count, MOST_TEXTS), self.seed)
        return [text.logs(engine.model) for text in made], runs, environment(name, engine.model)

    def _row(self, options: dict[str, Any], logs: Sequence[Logs], runs: Mapping[str, Run]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "bits": Conversion(resolve(self.name), Options(**options)).bits_per_weight,
            "kl": divergences(self.logs, logs),
            "steps": runs["diffusion"].total("denoise_forwards") / len(self.examples),
        }
        for mode, run in runs.items():
            tasks = {task or ALL: 100 * part.rights.mean().item() for task, part in run.tasks}
            row[mode] = {"exact": 100 * run.rights.mean().item(), "tasks": tasks}
            row[mode]["difference"] = asdict(difference(run, self.runs[mode]))
        return row | {"records": {mode: [asdict(record) for record in run.records] for mode, run in runs.items()}}


def shown(points: Interval) -> str:
    return f"{points.value:+.1f} [{points.low:+.1f}, {points.high:+.1f}]"


def show(*cells: str, head: bool = False) -> None:
    """Print a line of a Markdown table."""
    for line in (cells, ["---"] * len(cells)) if head else (cells,):
        print(f"| {' | '.join(line)} |", flush=True)


def chosen(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows by name and the converter's options for them. Raises UsageError, InputError."""
    everything = args.recipe is None and args.q_mode is None
    recipes, modes = (RECIPES, DEFAULTS) if everything else (args.recipe or (), args.q_mode or ())
    for recipe in recipes:
        get_recipe(recipe)
    for mode in modes:
        Scheme.of(mode)
    ways: dict[str, dict[str, Any]] = {recipe: {"quant_recipe": recipe} for recipe in recipes}
    return ways | {f"-q {mode}": {"quantize": True, "q_mode": mode} for mode in modes}


def _require_floats(model: str) -> None:
    """Raise InputError for what is quantised: there is no original to compare with."""
    if ModelConfig.read(resolve(model)).quantization is not None:
        raise InputError(f"{model}: is quantised; name the floats that it was made from")


def _command(args: argparse.Namespace) -> None:
    if not 1 <= args.count <= MOST_HELD_OUT:
        raise UsageError(f"--count must lie in 1-{MOST_HELD_OUT}, not {args.count}")
    ways = chosen(args)
    if args.json:
        require_place(args.json)
    _require_floats(args.model)
    comparison = Comparison(args.model, args.count, args.seed)
    result = comparison.facts | {"prompts a task": args.count, "seed": args.seed}
    print("\n".join(f"{key}: {value}" for key, value in result.items()), end="\n\n")
    columns = [title for mode in MODES for title in (f"{mode} %", "difference")]
    show("recipe", "bits", *(f"KL {kind}" for kind in KINDS), "steps", *columns, head=True)
    rows = {}
    for name, options in {"original": None, **ways}.items():
        row = rows[name] = comparison.original() if options is None else comparison.converted(options)
        scores = [row[mode] for mode in MODES]
        cells = [cell for s in scores for cell in (f"{s['exact']:.1f}", shown(Interval(**s["difference"])))]
        kl = [f"{value:.2g}" for value in row["kl"].values()]
        show(name, f"{row['bits']:.2f}", *kl, f"{row['steps']:.2f}", *cells)
    print()
    show("diffusion % / ar %", *TASKS, head=True)
    for name, row in rows.items():
        show(name, *(" / ".join(f"{row[mode]['tasks'][task]:.1f}" for mode in MODES) for task in TASKS))
    if args.json:
        write_whole(args.json, json.dumps(result | {"rows": rows}, indent=1) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.quantisation", description="Measure what each recipe of the converter costs in quality."
    )
    add = parser.add_argument
    add("--model", default="nano", help='floats that answer nano\'s tasks: a folder or "nano" (default: nano)')
    add("--recipe", action="append", metavar="NAME|FILE", help="may be repeated (default: all, and all modes)")
    add("--q-mode", action="append", metavar="MODE", help="every module alike in this mode; may be repeated")
    add("--count", type=int, default=200, help=f"prompts a task, at most {MOST_HELD_OUT} (default: 200)")
    add("--seed", type=int, default=0, help="of answers and of noise (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write what is printed, and each answer's record")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

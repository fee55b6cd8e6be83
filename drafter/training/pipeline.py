"""train_drafter(): from prompts to a folder with a drafter, going on from where the same call was interrupted."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import wired_limit

from ...config import ModelConfig
from ...convert.journal import fingerprint
from ...errors import InputError, UsageError
from ...folders import expanded, require_new
from ...loading import load, resolve
from ...model import DiffusionGemma
from .. import weights
from ..format import as_json
from ..geometry import BlockConfig
from ..network import BlockNetwork
from . import answers, prompts, result, shape
from .estimate import TrainingEstimate, estimate, require_fit
from .options import SAVE_EVERY, Options, Sizes
from .trainer import Trainer
from .workspace import workspace

OF_ANSWERS = ("seed", "max_tokens", "at_once")  # options that answers depend on, as on model and prompts
OF_NEITHER = ("dtype", "micro_batch_gb")  # those that a checkpoint does not depend on, but for rounding
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors")


def train_drafter(
    model: str,
    prompts_file: str | Path,
    out: str | Path,
    *,
    init: str | None = None,
    sizes: Sizes | None = None,
    options: Options | None = None,
    revision: str | None = None,
    save_every: int = SAVE_EVERY,
    answers_file: str | Path | None = None,
    typed: Sequence[str] = (),
) -> Path:
    """Train a block drafter for a checkpoint; returns the folder it wrote.

    Args:
        model: "nano", a folder or a Hub id, as it will be served: quantised or not.
        prompts_file: see `prompts.read`.
        out: the folder to write; must not exist.
        init: a drafter to continue: a folder, a Hub id, or "nano".
        sizes: of a new drafter.
        save_every: steps between checkpoints.
        answers_file: finished answers are taken from there if it exists, else kept there.
        typed: the command, for training.json.

    Raises InputError, UsageError: one line that says what is wrong and where.
    """
    sizes, options, out, prompts_file = sizes or Sizes(), options or Options(), expanded(out), expanded(prompts_file)
    require_new(out)
    if save_every < 1:
        raise UsageError(f"--save-every must be a whole number above 0, not {save_every}")
    kept = None if answers_file is None else expanded(answers_file)
    if kept is not None and kept.absolute() == out.absolute():
        raise UsageError(f"--answers {kept} is what --out names, too")
    data = prompts.contents(prompts_file)
    lines = prompts.parse(data, prompts_file)
    trained, held = prompts.split(lines, options.held_out)
    folder = resolve(model, revision)
    start = None if init is None else weights.find(init)
    drafter = _config(folder, start, sizes)
    main, tokenizer = load(folder, lazy=True)
    encoded = prompts.encode(lines, tokenizer)
    answers.check(main, lines, encoded)
    facts = _facts(folder, encoded, options)
    texts = None if kept is None else answers.take(kept, facts, len(encoded))
    need = _require_fit(main, drafter, options, encoded)
    answering = "" if texts else f"{len(encoded)} answers of at most {options.max_tokens} tokens; "
    print(f"In all: {answering}{need.work(options.total_steps(len(trained)))}", file=sys.stderr)
    network = _network(main, drafter, start, options)
    places = [[place for place in of if place] for of in ((model, init), (prompts_file, out, answers_file))]
    about = {
        "model": result.named(model),
        "init": init and result.named(init),
        "command": result.command(typed, map(str, places[0]), map(str, places[1])),
        "prompts": len(lines),
        "prompts_file": prompts_file.name,
        "prompts_sha256": hashlib.sha256(data).hexdigest(),
        "held_out_prompts": len(held),
    }
    with workspace(out, facts, _training_facts(start, drafter, held, options)) as work, wired_limit(main):
        accepted = None
        trainer = None
        if not work.result.exists():
            mx.eval(main.parameters())
            if texts is None:
                texts = answers.write(main, encoded, options, work.answers)
                if kept is not None:
                    answers.keep(kept, facts, encoded, texts)
            trainer = Trainer(main, network, encoded, texts, trained, held, options, work.state)
            trainer.run(save_every)
            accepted = trainer.measure()
        work.publish(lambda growing: result.write(growing, trainer, options, accepted, about))
    if accepted is not None:
        print(accepted.table(), file=sys.stderr)
    if trainer is not None:
        done = trainer.progress
        print(f"{done.tokens_per_second:.0f} tokens/s, peak memory {done.peak_gb:.2f} GB", file=sys.stderr)
    return out


def _config(folder: Path, start: Path | None, sizes: Sizes) -> BlockConfig:
    """Of the drafter, by config.json of the model and of what is continued; no weight is read."""
    model = ModelConfig.read(folder)
    if start is None:
        return shape.new(model, sizes)
    config = weights.read_config(start)
    config.require_fit(model, str(start / "config.json"))
    shape.require_same(config, sizes)
    return config


def _require_fit(
    main: DiffusionGemma, drafter: BlockConfig, options: Options, prompts: list[list[int]]
) -> TrainingEstimate:
    """Say what the training needs, or raise InputError if this machine has less."""
    context = min(max(map(len, prompts)) + options.max_tokens, main.config.max_position_embeddings)
    options = replace(options, at_once=min(options.at_once, len(prompts)))
    need = estimate(main.config, drafter, options, weights=main.memory.weights, dtype=main.dtype, context=context)
    require_fit(need)
    print(f"Needs about {need}", file=sys.stderr)
    return need


def _network(main: DiffusionGemma, config: BlockConfig, start: Path | None, options: Options) -> BlockNetwork:
    """The drafter to begin with, in float32."""
    if start is not None:
        network = weights.read(start, main, dtype=mx.float32)
    else:
        mx.random.seed(options.seed % (1 << 64))
        try:
            network = BlockNetwork(config)
        except (OverflowError, ValueError, TypeError) as error:
            raise InputError(f"a drafter of these sizes has no arrays in MLX ({error!s:.80})") from None
        if config.markov_rank is not None:  # begins as no correction at all
            network.markov_head.markov_w2.weight = mx.zeros_like(network.markov_head.markov_w2.weight)
    mx.eval(network.parameters())
    return network


def _facts(folder: Path, encoded: list[list[int]], options: Options) -> dict[str, Any]:
    """What the answers depend on."""
    paths = [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    own = {_flag(name): getattr(options, name) for name in OF_ANSWERS}
    return {"model": fingerprint(paths, {})["sources"], "prompts": encoded} | own


def _training_facts(start: Path | None, drafter: BlockConfig, held: list[int], options: Options) -> dict[str, Any]:
    """What the result depends on beside the answers."""
    found = fingerprint(sorted(start.glob("*.safetensors")) if start else [], {})
    own = {_flag(name): value for name, value in vars(options).items() if name not in OF_ANSWERS + OF_NEITHER}
    held_out = {_flag("held_out"): held}
    return own | held_out | {"--init": found["sources"], "drafter": as_json(drafter)}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")

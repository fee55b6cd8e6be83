"""train_drafter(): from prompts to a folder with a drafter, going on from where the same call was interrupted."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import wired_limit

from ...convert.journal import fingerprint
from ...errors import UsageError
from ...folders import require_new
from ...loading import load, resolve
from ...model import DiffusionGemma
from .. import weights
from ..block import find
from ..network import BlockNetwork
from . import answers, prompts, result, shape
from .estimate import estimate, require_fit
from .options import Options, Sizes
from .trainer import Trainer
from .workspace import workspace

SAVE_EVERY = 100  # steps between checkpoints
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
) -> Path:
    """Train a block drafter for a checkpoint; returns the folder it wrote.

    Args:
        model: "nano", a folder or a Hub id, as it will be served: quantised or not.
        prompts_file: see `prompts.read`.
        out: the folder to write; must not exist.
        init: a drafter to continue: a folder, a Hub id, or "nano".
        sizes: of a new drafter.
        save_every: steps between checkpoints.

    Raises InputError, UsageError: one line that says what is wrong and where.
    """
    sizes, options, out = sizes or Sizes(), options or Options(), Path(out)
    require_new(out)
    if save_every < 1:
        raise UsageError(f"--save-every must be a whole number above 0, not {save_every}")
    lines = prompts.read(Path(prompts_file))
    trained, held = prompts.split(lines, options.held_out)
    folder = resolve(model, revision)
    main, tokenizer = load(folder)
    network = _network(main, init, sizes, options)
    encoded = prompts.encode(lines, tokenizer)
    answers.check(main, lines, encoded)
    context = min(max(map(len, encoded)) + options.max_tokens, main.config.max_position_embeddings)
    need = estimate(
        main.config, network.config, options, weights=main.memory.weights, dtype=main.dtype, context=context
    )
    print(f"Needs about {need}; {need.positions} positions of blocks a step at most", file=sys.stderr)
    require_fit(need)
    about = {
        "model": _named(model),
        "init": init and _named(init),
        "prompts": len(lines),
        "held_out_prompts": len(held),
    }
    facts = _facts(folder, init, encoded, held, network, options)
    with workspace(out, facts) as work, wired_limit(main):
        accepted = None
        trainer = None
        if not work.result.exists():
            texts = answers.write(main, encoded, options, work.answers)
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


def _named(place: str) -> str:
    """A Hub id as it is; of a folder, its name alone."""
    return Path(place).resolve().name if Path(place).is_dir() else place


def _network(model: DiffusionGemma, init: str | None, sizes: Sizes, options: Options) -> BlockNetwork:
    """The drafter to begin with, in float32."""
    if init is not None:
        network = weights.read(find(init), model)
        shape.require_same(network.config, sizes)
        network.update(tree_map(lambda array: array.astype(mx.float32), network.parameters()))
    else:
        config = shape.new(model.config, sizes)
        mx.random.seed(options.seed % (1 << 64))
        network = BlockNetwork(config)
        if config.markov_rank is not None:  # begins as no correction at all
            network.markov_head.markov_w2.weight = mx.zeros_like(network.markov_head.markov_w2.weight)
    mx.eval(network.parameters())
    return network


def _facts(
    folder: Path, init: str | None, encoded: list[list[int]], held: list[int], network: BlockNetwork, options: Options
) -> dict[str, Any]:
    """What the result depends on."""
    paths = [path for pattern in MODEL_FILES for path in sorted(folder.glob(pattern))]
    paths += sorted(find(init).glob("*.safetensors")) if init else []
    found = fingerprint(paths, vars(options) | {"drafter": network.config.to_dict()})
    text = json.dumps([encoded, held]).encode()
    return {
        "model": found["sources"],
        "prompts": hashlib.sha256(text).hexdigest(),
        "options": found["options"],
        "versions": found["versions"],
    }

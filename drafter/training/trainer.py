"""Stage two: steps over answers, with checkpoints from which the same weights follow.

Whatever is random is a function of the seed and the step: the order of the answers in an epoch, the
anchors, the first weights. So a run that is killed and resumed ends with the weights of one that is
not, bit for bit where kernels are deterministic (MLX's CPU).

A step takes some answers one after another. Of each, the main model is run once; the rows of context
are computed once; blocks are run in micro-batches that a budget of bytes holds, and their gradients
are summed, those of the context's rows as well, which then flow back through the context in one go.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

from ...checkpoint import save
from ...errors import InputError
from ...memory import GB
from ...model import DiffusionGemma
from ..network import BlockNetwork
from .anchors import Blocks, Rows, Text, first_anchor, loss, main_shares, observe, run, weights
from .estimate import blocks_at_once
from .heldout import Accepted, measure
from .options import Options
from .workspace import write_atomically

BETAS, DECAY, LARGEST_GRADIENT = (0.9, 0.95), 0.01, 1.0
LAST_RATE = 0.01  # share of the learning rate that is left at the end
MEASUREMENTS, MEASURED = 8, 24  # times, and held-out answers each time
MEMORY = 0.98  # of the running statistics
ORDER, ANCHORS = 1, 2  # purposes of random numbers


@dataclass
class Progress:
    """What a checkpoint says beside weights.

    `history` holds {"step", "loss", "accepted", ...} by measurement; before the first step there is no loss.
    """

    step: int = 0
    loss: float = 0.0
    accepted: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    peak_gb: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def add(self, loss: float, accepted: float) -> None:
        share = min(MEMORY, self.step / (self.step + 1))
        self.loss += (1 - share) * (loss - self.loss)
        self.accepted += (1 - share) * (accepted - self.accepted)

    @property
    def tokens_per_second(self) -> float:
        """Of answers, seen by the training."""
        return self.tokens / max(self.seconds, 1e-9)


class Trainer:
    """Fits a network to answers.

    Args:
        network: its parameters are float32.
        prompts, answers: ids, by number.
        trained, held: numbers of those to train on, and of those to measure.
        state: the file of the checkpoint.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        network: BlockNetwork,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        trained: Sequence[int],
        held: Sequence[int],
        options: Options,
        state: Path,
    ):
        self.model, self.network, self.options, self._state = model, network, options, state
        self._prompts, self._answers = prompts, answers
        # a prompt of one token whose answer is one has no place for a block
        self._trained, self._held = ([n for n in numbers if len(self._places(n))] for numbers in (trained, held))
        if not self._trained:
            raise InputError("no answer is long enough to train on; give other prompts, or a larger --max-tokens")
        self.total = options.total_steps(len(self._trained))
        self.progress = Progress()
        self._optimizer = optim.Adam(options.lr, betas=list(BETAS), bias_correction=True)
        self._optimizer.init(network.trainable_parameters())

    def run(self, save_every: int) -> None:
        """From the latest checkpoint, if there is one, to the last step.

        Raises InputError if the training diverges; the checkpoint stays as it was.
        """
        if self._state.exists():
            self._load()
        else:
            self._measure()
            self.save()
        progress = self.progress
        with tqdm(total=self.total, initial=progress.step, desc="Training", unit="step") as bar:
            while progress.step < self.total:
                began = time.perf_counter()
                progress.add(*self.step(progress.step))
                progress.step += 1
                progress.seconds += time.perf_counter() - began
                progress.peak_gb = max(progress.peak_gb, mx.get_peak_memory() / GB)
                if progress.step % max(1, -(-self.total // MEASUREMENTS)) == 0 or progress.step == self.total:
                    self._measure()
                if progress.step % save_every == 0 or progress.step == self.total:
                    self.save()
                bar.set_postfix_str(
                    f"loss {progress.loss:.3f}, accepted {progress.accepted:.2f}, "
                    f"{progress.tokens_per_second:.0f} tokens/s, peak {progress.peak_gb:.2f} GB",
                    refresh=False,
                )
                bar.update()

    # a step

    def step(self, number: int) -> tuple[float, float]:
        """Train on the answers of a step; its loss, and the length that would have been accepted by its TV.

        Raises InputError if the loss or its gradient is not finite; then nothing has changed.
        """
        rate = learning_rate(number, self.total, self.options)
        gradients, total, accepted = self.gradients(number)
        gradients, norm = optim.clip_grad_norm(gradients, LARGEST_GRADIENT)
        for name, value in (("loss", total), ("gradient", norm.item())):
            if not math.isfinite(value):
                raise InputError(f"step {number + 1}: the {name} is not finite; lower --lr (the answers are kept)")
        # AdamW, whose decay is for matrices alone: it would pull the scales of norms towards zero
        parameters = tree_map(
            lambda p: p * (1 - rate * DECAY) if p.ndim > 1 else p, self.network.trainable_parameters()
        )
        self._optimizer.learning_rate = rate
        self.network.update(self._optimizer.apply_gradients(gradients, parameters))
        mx.eval(self.network.parameters(), self._optimizer.state)
        return total, accepted

    def gradients(self, number: int) -> tuple[dict, float, float]:
        """Of a step's loss: the mean over its drafts, weighted by their place in the draft."""
        chosen = self._chosen(number)
        places = [self._anchors(number, index, answer) for index, answer in enumerate(chosen)]
        weight = sum(self._weight(answer, anchors) for answer, anchors in zip(chosen, places, strict=True))
        total: dict | None = None
        losses, lengths = 0.0, 0.0
        for answer, anchors in zip(chosen, places, strict=True):
            text = observe(self.model, self._prompts[answer], self._answers[answer], self.network.config.taps)
            gradients, lost, length = self._of_text(text, anchors, weight)
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            mx.eval(total)
            losses, lengths = losses + lost, lengths + length
            self.progress.tokens += len(self._answers[answer])
        return total, losses, lengths / max(1, sum(map(len, places)))

    def _of_text(self, text: Text, anchors: np.ndarray, weight: float) -> tuple[dict, float, float]:
        network, model = self.network, self.model
        parameters = network.trainable_parameters()
        rows = network.context(text.features, 0)
        mx.eval(rows)
        blocks = Blocks.of(text.ids, anchors, network.config.drafts)
        size = blocks_at_once(network.config, len(text.ids), len(text.places), self.options.micro_batch_gb * GB)
        total, lost, length = None, 0.0, 0.0

        def objective(parameters: dict, rows: Rows, part: Blocks, shares: mx.array) -> tuple[mx.array, mx.array]:
            network.update(parameters)
            logits, confidence = run(network, model, text, part, rows)
            value, accepted = loss(logits, confidence, shares, part)
            return value / weight, mx.cumprod(accepted, axis=-1).sum()

        of_objective = mx.value_and_grad(objective, argnums=(0, 1))
        for first in range(0, len(anchors), size):
            part = blocks[first : first + size]
            (value, accepted), gradients = of_objective(parameters, rows, part, main_shares(model, text, part))
            total = gradients if total is None else tree_map(mx.add, total, gradients)
            mx.eval(total, value, accepted)
            lost, length = lost + value.item(), length + accepted.item()

        def context(parameters: dict) -> mx.array:
            network.update(parameters)
            pairs = zip(network.context(text.features, 0), total[1], strict=True)
            return sum(
                (row * gradient).sum() for ours, theirs in pairs for row, gradient in zip(ours, theirs, strict=True)
            )

        gradients = tree_map(mx.add, total[0], mx.grad(context)(parameters))
        network.update(parameters)
        mx.eval(gradients)
        return gradients, lost, length

    # what is random

    def _chosen(self, step: int) -> list[int]:
        """The answers of a step: epochs in a random order each, one behind the other."""
        count, batch = len(self._trained), self.options.batch
        numbers = []
        for place in range(step * batch, (step + 1) * batch):
            epoch, index = divmod(place, count)
            order = np.random.default_rng([self._seed, ORDER, epoch]).permutation(count)
            numbers.append(self._trained[order[index]])
        return numbers

    def _anchors(self, step: int, index: int, answer: int) -> np.ndarray:
        """Where the blocks of the index-th answer of a step begin, in order."""
        places = self._places(answer)
        if len(places) <= self.options.anchors:
            return places
        rng = np.random.default_rng([self._seed, ANCHORS, step, index])
        return np.sort(rng.choice(places, self.options.anchors, replace=False))

    def _places(self, answer: int) -> np.ndarray:
        """All there may be."""
        prompt = self._prompts[answer]
        return np.arange(first_anchor(prompt), len(prompt) + len(self._answers[answer]) - 1)

    @property
    def _seed(self) -> int:
        return self.options.seed % (1 << 64)

    def _weight(self, answer: int, anchors: np.ndarray) -> float:
        """Of all drafts of an answer together."""
        length = len(self._prompts[answer]) + len(self._answers[answer])
        return float(weights(length, anchors, self.network.config.drafts).sum())

    # what is measured

    def measure(self, most: int | None = None) -> Accepted | None:
        """Accepted length on held-out answers, `most` of them at most, from all over; None if there are none."""
        numbers = self._held[:: max(1, len(self._held) // most)][:most] if most else self._held
        if not numbers:
            return None
        taps, quiet = self.network.config.taps, most is not None
        bar = tqdm(numbers, desc="Measuring", unit="answer", disable=quiet, leave=False)
        texts = (observe(self.model, self._prompts[n], self._answers[n], taps) for n in bar)
        try:
            return measure(self.network, self.model, texts, self.options.micro_batch_gb * GB)
        except InputError as error:
            raise InputError(f"step {self.progress.step}: {error}") from None

    def _measure(self) -> None:
        accepted = self.measure(MEASURED)
        if accepted is not None:
            loss = round(self.progress.loss, 5) if self.progress.step else None
            entry = {"step": self.progress.step, "loss": loss} | accepted.to_dict()
            self.progress.history.append(entry)
            said = f"step {self.progress.step}: {accepted.lengths[-1]:.2f} of {accepted.most[-1]:.2f} accepted"
            tqdm.write(said, file=sys.stderr)

    # checkpoints

    def save(self) -> None:
        """Write the checkpoint; the one before is there until the new one is whole."""
        arrays = {f"network.{path}": array for path, array in tree_flatten(self.network.parameters())}
        arrays |= {f"optimizer.{path}": array for path, array in tree_flatten(self._optimizer.state)}
        metadata = {"progress": json.dumps(vars(self.progress), allow_nan=False)}
        write_atomically(self._state, lambda path: save(path, arrays, metadata))

    def _load(self) -> None:
        def part(name: str) -> Any:
            items = [(path.removeprefix(name), array) for path, array in arrays.items() if path.startswith(name)]
            return tree_unflatten(sorted(items))

        try:
            arrays, metadata = mx.load(str(self._state), return_metadata=True)
            self.network.update(part("network."))
            self._optimizer.state = part("optimizer.")
            mx.eval(self.network.parameters(), self._optimizer.state)
            self.progress = Progress(**json.loads(metadata["progress"]))
        except (RuntimeError, ValueError, KeyError, TypeError):
            raise InputError(f"{self._state}: is damaged; remove it to train anew (the answers are kept)") from None


def learning_rate(step: int, total: int, options: Options) -> float:
    """Linear warm-up, then a cosine."""
    warm = max(1, round(options.warmup * total))
    if step < warm:
        return options.lr * (step + 1) / warm
    share = (step - warm) / max(1, total - warm)
    return options.lr * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * share)))

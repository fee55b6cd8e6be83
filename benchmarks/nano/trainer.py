"""The training loop, which can stop at any step and go on from there."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase

from .objective import losses
from .optimizer import Optimizers, all_layers, schedule
from .rows import Batch

STATE, LOG = "state.pt", "training.jsonl"
KEPT = 0.98  # of a running mean, a step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of the whole run and what they do; learning rates are those between warm-up and decay."""

    steps: int
    decay: int  # the last steps, over which the learning rates go down to 0
    lr: float
    matrix_lr: float
    self_conditioning: float  # share of rows that are fed
    stepped: float  # share of those whose canvas is the sampler's next
    freeze: tuple[str, ...]  # parts of names of parameters that stay
    seed: int


class Trainer:
    """
    Args:
        out: folder of the state, the log and at last the checkpoint.
        device: that the model is on, cpu or cuda.
        autocast: whether products are computed in bfloat16.
    """

    def __init__(
        self,
        model: DiffusionGemmaForBlockDiffusion,
        tokenizer: PreTrainedTokenizerBase,
        plan: Plan,
        out: Path,
        device: str,
        autocast: bool,
    ):
        self.model, self.tokenizer, self.plan, self.out, self.device = model.train(), tokenizer, plan, out, device
        self.optimizers = Optimizers(model, plan.lr, plan.matrix_lr, plan.freeze)
        self.autocast = autocast
        self.step = 0
        self._ends = torch.tensor(model.generation_config.eos_token_id, device=device)
        self._means: dict[str, float] = {}

    def run(self, batches: Iterator[Batch], seconds: float, save_every: int) -> None:
        """Train to the last step, or for so many seconds; the state is saved either way."""
        started, bar = time.monotonic(), tqdm(total=self.plan.steps, initial=self.step, unit="step", mininterval=10)
        while self.step < self.plan.steps and time.monotonic() - started < seconds:
            self.step += 1
            self._update(next(batches).to(self.device))
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in self._means.items()}, refresh=False)
            if self.step % 50 == 0:
                self._note(time.monotonic() - started)
            if self.step % save_every == 0:
                self.save()
        bar.close()
        self.save()

    def _update(self, batch: Batch) -> None:
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.step)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.autocast):
            found = losses(self.model, batch, self._ends, self.plan.self_conditioning, generator, self.plan.stepped)
        found.total.backward()
        self.optimizers.step(schedule(self.step, self.plan.steps, self.plan.decay))
        for name in (field.name for field in fields(found)):
            value = getattr(found, name).item()
            self._means[name] = KEPT * self._means.get(name, value) + (1 - KEPT) * value

    def _note(self, seconds: float) -> None:
        with (self.out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": self.step, "seconds": round(seconds, 1), **self._means}) + "\n")

    def save(self) -> None:
        """The state from which training goes on, and the checkpoint as it is now."""
        state = {
            "step": self.step,
            "plan": asdict(self.plan),
            "means": self._means,
            "parameters": {name: p.detach() for name, p in self._trained()},
            "scalars": [layer.layer_scalar.detach() for layer in all_layers(self.model)],
            "optimizers": self.optimizers.state_dict(),
        }
        part = self.out / f"{STATE}.part"
        torch.save(state, part)
        os.replace(part, self.out / STATE)
        save_checkpoint(self.model, self.tokenizer, self.out)

    def resume(self) -> None:
        """Go on from the state in `out`."""
        state = torch.load(self.out / STATE, map_location=self.device, weights_only=True)
        self.step, self._means = state["step"], state["means"]
        self.optimizers.load_state_dict(state["optimizers"])
        with torch.no_grad():
            for name, p in self._trained():
                p.copy_(state["parameters"][name])
            for layer, scalar in zip(all_layers(self.model), state["scalars"], strict=True):
                layer.layer_scalar.copy_(scalar)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def save_checkpoint(model: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the Hugging Face layout in bf16."""
    is_half = model.dtype == torch.bfloat16
    half = model if is_half else copy.deepcopy(model).to(torch.bfloat16)
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)

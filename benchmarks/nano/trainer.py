"""The training loop, which can stop at any step and go on from there."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerBase

from mlx_dgemma.drafter.training.workspace import changes_in_words, write_atomically
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.folders import sync

from .objective import losses
from .optimizer import Optimizers, schedule
from .rows import Batch

STATE, LOG, GROWING = "state.pt", "training.jsonl", ".growing"
KEPT = 0.98  # of a running mean, a step
WAIT = b"\nthis step is finished and saved first; Ctrl-C again stops at once\n"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that makes a run, by option: it goes on with the same alone."""

    init: str | None
    data: str | None  # SHA-256 of the file
    shares: dict[str, float] | None  # by task, without own data
    batch: int
    canvas: int | None
    dtype: str  # of the weights
    steps: int  # of the whole run
    decay: int  # the last steps, over which the learning rates go down to 0
    lr: float  # this one and the next between warm-up and decay
    matrix_lr: float
    self_conditioning: float  # share of rows that are fed
    stepped: float  # share of those whose canvas is the sampler's next
    freeze: tuple[str, ...]  # parts of names of parameters that stay
    seed: int


class Trainer:
    """
    Args:
        out: folder of the state, the log and the checkpoint.
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
        self._saved: int | None = None  # the step of the state in `out`
        self._means: dict[str, float] = {}

    def run(self, batches: Iterator[Batch], seconds: float, save_every: int) -> None:
        """Train to the last step, for so many seconds, or until Ctrl-C; the state is saved in every case."""
        started, bar = time.monotonic(), tqdm(total=self.plan.steps, initial=self.step, unit="step", mininterval=10)
        with bar, deferred_interrupt() as is_interrupted:
            while self.step < self.plan.steps and time.monotonic() - started < seconds and not is_interrupted():
                self.step += 1
                self._update(next(batches).to(self.device))
                bar.update()
                bar.set_postfix({name: f"{value:.3f}" for name, value in self._means.items()}, refresh=False)
                if self.step % 50 == 0:
                    self._note(time.monotonic() - started)
                if self.step % save_every == 0:
                    self.save()
            if self.step != self._saved:
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
        """The state, and then the checkpoint: while `GROWING` is there, it is that of an earlier step, or none."""
        growing = self.out / GROWING
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        state = {
            "step": self.step,
            "plan": asdict(self.plan),
            "means": self._means,
            "optimizers": self.optimizers.state_dict(),
        }
        write_atomically(self.out / STATE, lambda path: _write(torch.save, state, path))
        save_checkpoint(self.model, self.tokenizer, growing)
        _take_places(growing, self.out)
        self._saved = self.step

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state that was saved."""
        self.step, self._means = state["step"], state["means"]
        self.optimizers.load_state_dict(state["optimizers"])
        self._saved = None if (self.out / GROWING).exists() else self.step


def read_state(out: Path, plan: Plan) -> dict[str, Any] | None:
    """What a run that was begun in `out` goes on from, None: none was.

    Raises UsageError for that of another run, InputError for what is none.
    """
    path = out / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        begun = by_option(state["plan"])
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is not the state of a training; remove {out}, or name another --out") from None
    if changes := changes_in_words(by_option(asdict(plan)), begun):
        raise UsageError(
            f"{out}: was begun with other {changes}; give the same again to go on, remove it to begin anew, "
            "or name another --out"
        )
    return state


def by_option(plan: dict[str, Any]) -> dict[str, Any]:
    """As the command line calls its parts."""
    return {f"--{name.replace('_', '-')}": value for name, value in plan.items()}


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the block only when it is done, and meanwhile is told; a second one ends it at once."""
    caught = []

    def catch(number: int, _: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, usual)
        os.write(2, WAIT)  # print is not reentrant

    usual = signal.signal(signal.SIGINT, catch)
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, usual)
    if caught:
        raise KeyboardInterrupt


def _write(function: Callable[..., Any], *arguments: Any) -> None:
    """Call what writes. Raises OSError: torch, safetensors and tokenizers have each another name for a full disk."""
    try:
        function(*arguments)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot be written; is the disk full? ({error})") from error


def save_checkpoint(model: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the Hugging Face layout in bf16."""
    is_half = model.dtype == torch.bfloat16
    half = model if is_half else copy.deepcopy(model).to(torch.bfloat16)
    _write(half.save_pretrained, folder)
    _write(tokenizer.save_pretrained, folder)


def _take_places(growing: Path, out: Path) -> None:
    """Files of a whole checkpoint take their places in `out`, that which makes it one last; others' weights go."""
    files = sorted(growing.iterdir(), key=lambda path: path.name == "config.json")
    for path in files:
        sync(path)
        os.replace(path, out / path.name)
    for path in set(out.glob("model*.safetensors*")) - {out / path.name for path in files}:
        path.unlink()
    growing.rmdir()

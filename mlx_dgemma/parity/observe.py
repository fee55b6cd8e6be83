"""Walk the reference through a recorded run and keep what every part of it hands on.

What is kept goes to the host at once, layer by layer: beside the model, a device holds one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import GenerationConfig
from . import bundle
from .reference import DynamicCache, Reference, Run, Story, generation, torch

Rows = Callable[[int], list[int]]  # of a pass of so many positions, those that are kept
Logits = Callable[[list[int]], torch.Tensor]  # rows -> (B, rows, V)


@dataclass
class Walk:
    """What a model computes along a recorded run."""

    quantities: dict[str, np.ndarray] = field(default_factory=dict)
    choices: list[np.ndarray] = field(default_factory=list)  # the experts of every token, pass after pass


@torch.no_grad()
def walk(model: Reference, story: Story, run: Run, tops: dict[str, torch.Tensor]) -> Walk:
    """Every quantity of the recorded run as this model computes it, in float64.

    Args:
        tops: pass -> the ids (B, L, 64) whose logits are kept; filled by the first walk.
    """
    with _Observer(model, tops) as seen:
        _canvases(model, story, run, seen)
        _text(model, story, seen)
        _verification(model, story, seen)
    return seen.walk


def _canvases(model: Reference, story: Story, run: Run, seen: _Observer) -> None:
    """Encode and denoise as `generate` did, each step from the recorded canvas."""
    cache, per_step = _cache(model), {}
    for index, (block, steps) in enumerate(zip(story.blocks(), story.steps, strict=True)):
        with seen.during(f"encode.{index}", len(block)):
            seen.keep_logits(block.shape[1], _logits(model, _encode(model, block, cache)))
        z = None
        for number, step in enumerate(steps):
            canvas = torch.tensor(step["canvas"], device=model.device)
            is_kept = (index, number) in bundle.DETAILED
            with seen.during(f"denoise.{index}.{number}" if is_kept else None, len(canvas)):
                logits = model(decoder_input_ids=canvas, past_key_values=cache, self_conditioning_logits=z).logits
                seen.keep_logits(canvas.shape[1], lambda rows, logits=logits: logits[:, rows])
            z = _processed(logits, run.sampling, number)
            for name, value in _decisive(z, run.sampling).items():
                per_step.setdefault(name, []).append(value.cpu().numpy())
            z = z.to(model.model.decoder.embed_tokens.weight.dtype)  # as `generate` hands it on
    seen.walk.quantities |= {f"steps/{name}": np.stack(values) for name, values in per_step.items()}


def _text(model: Reference, story: Story, seen: _Observer) -> None:
    """The whole text in one causal pass, and the next token at every position."""
    length = story.sequences.shape[1]
    with seen.during("ar", len(story.sequences)):
        of = _logits(model, _encode(model, story.sequences, _cache(model)))
        seen.keep_logits(length, of)
        seen.keep_choice(length, of)


def _verification(model: Reference, story: Story, seen: _Observer) -> None:
    """One round behind the first row: the block, and what comes once its wrong drafts are forgotten."""
    text, cache = story.sequences[:1], _cache(model)
    _encode(model, text[:, :-1], cache)
    with seen.during("verify", 1, lambda length: list(range(length))):
        of = _logits(model, _encode(model, story.block[None], cache))
        seen.keep_logits(len(story.block), of)
        seen.keep_choice(len(story.block), of)
    # nothing is rolled back here: what is left must be as if the wrong drafts had never been
    right = np.concatenate([text, story.block[None, 1 : 1 + story.accepted], [[story.answer]]], axis=1)
    cache = _cache(model)
    with seen.during("after", 1, lambda length: [length - 1]):
        seen.keep_logits(right.shape[1], _logits(model, _encode(model, right, cache)))
    canvas = torch.tensor(story.steps[0][0]["canvas"][:1], device=model.device)
    with seen.during("behind", 1):
        logits = model(decoder_input_ids=canvas, past_key_values=cache).logits
        seen.keep_logits(canvas.shape[1], lambda rows: logits[:, rows])


def _cache(model: Reference) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _encode(model: Reference, ids: np.ndarray, cache: DynamicCache) -> torch.Tensor:
    ids = torch.tensor(ids, device=model.device)
    return model.model.encoder(input_ids=ids, past_key_values=cache).last_hidden_state


def _logits(model: Reference, hidden: torch.Tensor) -> Logits:
    """Next-token logits of rows of the encoder's output: the same head and softcap as a canvas has."""
    cap = model.final_logit_softcapping
    return lambda rows: torch.tanh(model.lm_head(hidden[:, rows]).to(torch.float32) / cap) * cap


def _processed(logits: torch.Tensor, sampling: GenerationConfig, number: int) -> torch.Tensor:
    schedule = generation.LinearTemperatureScheduleLogitsProcessor(
        sampling.t_min, sampling.t_max, sampling.max_denoising_steps
    )
    remaining = torch.tensor(sampling.max_denoising_steps - number, dtype=torch.int32, device=logits.device)
    return schedule(None, logits, remaining)


def _decisive(z: torch.Tensor, sampling: GenerationConfig) -> dict[str, torch.Tensor]:
    """What decisions rest on, how far each is from turning, and what they are: all (B, C)."""
    tiles = z.split(bundle.ROWS_AT_ONCE, dim=1)
    entropy = torch.cat([torch.distributions.Categorical(logits=rows).entropy() for rows in tiles], dim=1)
    values = torch.cat([rows.topk(2, dim=-1).values for rows in tiles], dim=1)
    ascending, order = entropy.sort(dim=-1)
    room = sampling.entropy_bound - (ascending.cumsum(dim=-1) - ascending)
    room = torch.zeros_like(entropy).scatter(-1, order, room)
    return {
        "entropy": entropy.double(),
        "peak": values[..., 0].double(),
        "argmax": z.argmax(dim=-1),  # of equals, which there are in bfloat16, topk takes another
        "gap": values[..., 0] - values[..., 1],
        "slack": room.abs(),
        "accepts": room >= 0,
    }


class _Observer:
    """Keeps what layers, routers, norms and self-conditioning hand on in the pass that is being run."""

    def __init__(self, model: Reference, tops: dict[str, torch.Tensor]):
        self.walk = Walk()
        self._model, self._tops = model, tops
        self._columns = _column_ids(model)
        self._hooks: list[Any] = []
        self._name: str | None = None  # of the pass; None: nothing is kept but the routers' choices
        self._batch, self._rows = 1, bundle.kept_rows

    def __enter__(self) -> _Observer:
        inner = self._model.model
        for stack in (inner.encoder.language_model, inner.decoder):
            for index, layer in enumerate(stack.layers):
                self._hooks.append(layer.register_forward_hook(self._hidden(f"layer.{index}")))
                self._hooks.append(layer.router.register_forward_hook(self._choice(index)))
            self._hooks.append(stack.norm.register_forward_hook(self._hidden("norm")))
        self._hooks.append(inner.decoder.self_conditioning.register_forward_hook(self._soft))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def during(self, name: str | None, batch: int, rows: Rows = bundle.kept_rows) -> Iterator[None]:
        """Name what is handed on meanwhile, and say which of its rows are kept."""
        self._name, self._batch, self._rows = name, batch, rows
        try:
            yield
        finally:
            self._name, self._rows = None, bundle.kept_rows

    def keep_logits(self, length: int, of: Logits) -> None:
        """Fixed columns, the likeliest ids and logsumexp of a pass over `length` positions."""
        if self._name is None:
            return
        self._put("logits", of(self._rows(length))[..., self._columns])
        logits = of(bundle.spread_rows(length) if self._rows is bundle.kept_rows else self._rows(length))
        if self._name not in self._tops:
            self._tops[self._name] = logits.topk(min(bundle.TOP, logits.shape[-1]), dim=-1).indices.cpu()
        ids = self._tops[self._name]
        self._put("top_ids", ids)
        self._put("top", logits.gather(-1, ids.to(logits.device)))
        if logits.shape[1] > 1:  # one number says too little of what float32 can do
            self._put("logsumexp", logits.double().logsumexp(dim=-1))  # of logits as they are: the sum adds no error

    def keep_choice(self, length: int, of: Logits) -> None:
        """The likeliest next token at every position, and by how much it is."""
        for rows in bundle.tiles(length):
            logits = of(rows)
            values = logits.topk(2, dim=-1).values
            self._append("best", logits.argmax(dim=-1))
            self._append("gap", values[..., 0] - values[..., 1])

    def _put(self, what: str, value: torch.Tensor) -> None:
        value = value.detach().cpu()
        number = value.double() if value.is_floating_point() else value.int()
        self.walk.quantities[f"{self._name}/{what}"] = number.numpy().copy()

    def _append(self, what: str, value: torch.Tensor) -> None:
        before = self.walk.quantities.get(f"{self._name}/{what}")
        self._put(what, value)
        if before is not None:
            joined = np.concatenate([before, self.walk.quantities[f"{self._name}/{what}"]], axis=1)
            self.walk.quantities[f"{self._name}/{what}"] = joined

    def _keep(self, what: str, value: torch.Tensor) -> None:
        if self._name is not None:
            self._put(what, value[:, self._rows(value.shape[1])])

    def _hidden(self, what: str):
        return lambda module, given, out: self._keep(what, out)

    def _soft(self, module, given, out) -> None:
        if given[1].any():  # zeros mean that there is none yet
            self._keep("soft", given[1])

    def _choice(self, index: int):
        def hook(module, given, out) -> None:
            probabilities, _, ids = out
            count = ids.shape[-1]
            ids = ids.sort(dim=-1).values.view(self._batch, -1, count)
            self.walk.choices.append(ids.cpu().numpy())
            self._keep(f"router.{index}", ids)
            self._keep(f"margin.{index}", _margin(probabilities, count).view(self._batch, -1))

        return hook


def _column_ids(model: Reference) -> torch.Tensor:
    size = model.config.text_config.vocab_size
    return torch.tensor(bundle.columns(bundle.column_count(size), size), device=model.device)


def _margin(probabilities: torch.Tensor, count: int) -> torch.Tensor:
    """By which share the first expert not taken is below the last one taken; 1 if all are taken."""
    ranked = probabilities.sort(dim=-1, descending=True).values
    if ranked.shape[-1] == count:
        return torch.ones_like(ranked[:, 0])
    return 1 - ranked[:, count] / ranked[:, count - 1]

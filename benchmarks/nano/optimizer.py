"""Muon for the matrices of the layers, AdamW for the rest, and one learning rate that warms up, stays and decays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion

LONGEST_WARM_UP = 200  # steps


class Optimizers:
    """Updates everything but the vision tower and what `freeze` has a part of the name of.

    Layer scalars, which are buffers in transformers, are trained too. Muon takes matrices only: the experts of a
    layer, stacked, are seen as one.
    """

    def __init__(self, model: DiffusionGemmaForBlockDiffusion, lr: float, matrix_lr: float, freeze: Sequence[str] = ()):
        frozen = ("vision", *freeze)
        for name, p in model.named_parameters():
            p.requires_grad_(not any(part in name for part in frozen))
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        scalars = [layer.layer_scalar.requires_grad_() for layer in all_layers(model)]
        matrices = {name: p for name, p in named.items() if p.ndim > 1 and "embed_tokens" not in name}
        self._views = [(p, nn.Parameter(p.detach().flatten(0, -2))) for p in matrices.values()]
        self._rest = [p for name, p in named.items() if name not in matrices] + scalars
        self.parameters = [*matrices.values(), *self._rest]
        views = [view for _, view in self._views]
        self._optimizers = [
            torch.optim.Muon(views, lr=matrix_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(self._rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rate, from gradients clipped at a norm of 1."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for p, view in self._views:
            view.grad = p.grad.view_as(view)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * scale
            optimizer.step()
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def schedule(step: int, steps: int, decay: int) -> float:
    """Share of the learning rate at a step from 1 on: up over the first tenth, down to 0 over the last `decay`."""
    warm_up = min(LONGEST_WARM_UP, steps // 10)
    return min(1.0, step / max(1, warm_up), (steps - step + 1) / max(1, decay))


def all_layers(model: DiffusionGemmaForBlockDiffusion) -> list[nn.Module]:
    return [*model.model.decoder.layers, *model.model.encoder.language_model.layers]

"""Muon for the matrices of the layers, AdamW for the rest, and one learning rate that warms up, stays and decays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mlx_dgemma.errors import UsageError

LONGEST_WARM_UP = 200  # steps
SMALL = 1 << 20  # parameters: stacks of matrices up to this size are worked on together
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315), 5  # coefficients of Jordan's quintic, and how often it is applied


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for matrices and stacks of matrices, each on its own (Jordan et al., Muon, 2024).

    An update is scaled to AdamW's usual size (Liu et al., arXiv 2502.16982). torch.optim.Muon computes in bf16, which
    CPUs without bf16 arithmetic do many times slower than float32, and has no stacks.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[object, list[torch.Tensor]] = defaultdict(list)
            for p in group["params"]:
                alike[p.shape[-2:] if p.numel() <= SMALL else p].append(p)
            for parameters in alike.values():
                shape = parameters[0].shape[-2:]
                moves = [self._ahead(p, group["momentum"]).view(-1, *shape) for p in parameters]
                updates = orthogonal(torch.cat(moves)).split(list(map(len, moves)))
                for p, update in zip(parameters, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p), alpha=group["lr"] * 0.2 * max(shape) ** 0.5)

    def _ahead(self, p: torch.Tensor, kept: float) -> torch.Tensor:
        """Nesterov's momentum: the running mean of gradients as it would be after one more like this."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean = state["momentum"].lerp_(p.grad, 1 - kept)
        return p.grad.lerp(mean, kept)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(N, R, C): singular values all about 1."""
    (a, b, c), times = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(times):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Optimizers:
    """Updates everything but the vision tower and what `freeze` has a part of the name of.

    Layer scalars, which are buffers in transformers, are trained too. Weights that are not float32 have masters that
    are: they would round most updates away. Raises UsageError if `freeze` names nothing, or leaves nothing.
    """

    def __init__(self, model: nn.Module, lr: float, matrix_lr: float, freeze: Sequence[str] = ()):
        scalars = {name: b for name, b in model.named_buffers() if name.endswith("layer_scalar")}
        names = [*model.named_parameters(remove_duplicate=False), *scalars.items()]  # tied weights have several
        if unknown := next((part for part in freeze if not any(part in name for name, _ in names)), None):
            raise UsageError(f"--freeze {unknown}: no parameter has this in its name")
        frozen = {id(p) for name, p in names if any(part in name for part in ("vision", *freeze))}
        for _, p in names:
            p.requires_grad_(id(p) not in frozen)
        self._trained = {name: p for name, p in [*model.named_parameters(), *scalars.items()] if p.requires_grad}
        if not self._trained:
            raise UsageError("--freeze leaves nothing to train")
        self._masters = {name: _master(p) for name, p in self._trained.items()}
        is_matrix = {name: p.ndim > 1 and "embed_tokens" not in name for name, p in self._masters.items()}
        matrices, rest = ([p for name, p in self._masters.items() if is_matrix[name] is kind] for kind in (True, False))
        self._optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self._optimizers.append(Muon(matrices, lr=matrix_lr))
        if rest:
            self._optimizers.append(torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)))

    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rate, from gradients clipped at a norm of 1."""
        for p, master in self._rounded():
            master.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._masters.values(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        self._round()

    def state_dict(self) -> dict[str, Any]:
        """Of the optimizers, and the weights they are at."""
        weights = {name: p.detach() for name, p in self._masters.items()}
        return {"weights": weights, "optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self._masters.items():
            p.copy_(state["weights"][name])
        self._round()
        for optimizer, its_state in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)

    @torch.no_grad()
    def _round(self) -> None:
        for p, master in self._rounded():
            p.copy_(master)

    def _rounded(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Weights that are not their own masters, with these."""
        pairs = zip(self._trained.values(), self._masters.values(), strict=True)
        return ((p, master) for p, master in pairs if p is not master)


def _master(p: torch.Tensor) -> torch.Tensor:
    return p if p.dtype == torch.float32 else p.detach().float().requires_grad_()


def schedule(step: int, steps: int, decay: int) -> float:
    """Share of the learning rate at a step from 1 on: up over the first tenth, down to 0 over the last `decay`."""
    warm_up = min(LONGEST_WARM_UP, steps // 10)
    return min(1.0, step / max(1, warm_up), (steps - step + 1) / max(1, decay))

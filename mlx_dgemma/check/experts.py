"""Experts: the sparse matmuls alone, for few and for many positions, with and without sorting by expert."""

from __future__ import annotations

from statistics import median

import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce

from ..layers import SORT_FROM, Experts
from .budget import Budget
from .report import Column, Section
from .subject import SEED, Subject, seconds_of

TITLE = "Expert matmuls"
COLUMNS = (
    Column("positions", "positions", "d"),
    Column("pairs", "pairs", "d"),
    Column("touched", "experts touched", ".1f"),
    Column("unsorted", "ms unsorted", ".3f"),
    Column("sorted", "ms sorted", ".3f"),
    Column("used", "used here"),
    Column("bandwidth", "GB/s", ".2f"),
    Column("flops", "GFLOP/s", ".2f"),
)
SIZES = (1, 2, 4, 8, 16, 64, 256)
SAMPLES = 5


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """A row per number of positions: a layer's experts, timed over all layers in a row."""
    config, stacks = subject.model.config, [layer.experts for layer in subject.model.layers]
    section.notes.append(
        f"ms a layer, all {len(stacks)} layers in a row, each position routed to {config.top_k_experts} of "
        f"{config.num_experts} experts at random; GB/s of the weights touched and GFLOP/s by what is used here."
    )
    cost = 0.0
    with subject.watched("expert matmuls"):
        for number, size in enumerate(SIZES):
            subject.tell(f"experts: {size} positions")
            if not budget.has(cost):
                section.missing.append(f"{size} positions")
                continue
            part = budget.part(1 / (len(SIZES) - number))
            cost = _row(subject, section, stacks, size, part)


def _row(subject: Subject, section: Section, stacks: list[Experts], size: int, budget: Budget) -> float:
    """Returns the seconds of the slower way, once through all layers."""
    config = subject.model.config
    top_k, wide = config.top_k_experts, config.hidden_size * config.moe_intermediate_size
    routes = [Route(subject, size, SEED + number) for number in range(len(stacks))]
    times = {}
    for is_sorted, share in ((False, 0.5), (True, 1.0)):
        found = seconds_of(lambda way=is_sorted: _through(stacks, routes, way), budget.part(share), SAMPLES)
        times[is_sorted] = median(found[1:] or found) / len(stacks) if found else None
    if not any(times.values()):
        section.missing.append(f"{size} positions")
        return 0.0
    is_used = size * top_k >= SORT_FROM
    seconds, touched = times[is_used], sum(route.touched for route in routes) / len(routes)
    rates = (None, None)
    if seconds:
        weights = _nbytes(stacks[0]) * touched / config.num_experts
        rates = (weights / seconds / 1e9, 6 * size * top_k * wide / seconds / 1e9)
    else:
        section.missing.append(f"{size} positions {'sorted' if is_used else 'unsorted'}")
    ms = [1e3 * times[way] if times[way] else None for way in (False, True)]
    section.add(size, size * top_k, touched, *ms, "sorted" if is_used else "unsorted", *rates)
    return len(stacks) * max(filter(None, times.values()), default=0.0)


class Route:
    """Positions and the experts that each goes through."""

    def __init__(self, subject: Subject, size: int, seed: int):
        config, chance = subject.model.config, np.random.default_rng(seed)
        ids = np.argsort(chance.random((size, config.num_experts)), axis=-1)[:, : config.top_k_experts]
        self.touched = len(np.unique(ids))
        self.ids = mx.array(ids[None].astype(np.uint32))
        self.shares = mx.full(self.ids.shape, 1 / config.top_k_experts)
        rows = chance.standard_normal((1, size, config.hidden_size)).astype(np.float32)
        self.rows = mx.array(rows).astype(subject.model.dtype)
        mx.eval(self.ids, self.shares, self.rows)


def _through(stacks: list[Experts], routes: list[Route], is_sorted: bool) -> None:
    """A layer after the other: each waits for the one before, as in the model, and finds its weights cold."""
    out = mx.zeros_like(routes[0].rows)
    for experts, route in zip(stacks, routes, strict=True):
        out = experts(route.rows + 0 * out, route.shares, route.ids, is_sorted)
    mx.eval(out)


def _nbytes(experts: Experts) -> int:
    return tree_reduce(lambda total, array: total + array.nbytes, experts.parameters(), 0)

"""Accepted length on answers that are never trained on, by the width of a draft.

At every anchor of an answer the drafter drafts greedily; what counts is how many of its drafts, from
the first on, are the answer's own tokens: min(run, width), averaged over all anchors of all answers.
Near the end of an answer fewer tokens are left than a draft is wide; what a drafter that is always
right would reach is given beside it ("most").

This is teacher-forced: every place of the answer counts once, also those that decoding would have
skipped. It is what greedy decoding accepts where the answer is greedy (but for DSpark's rare drafts that
are not among the 64 likeliest ids without its correction); an answer drawn at random holds tokens that
no drafter can foresee.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import InputError
from ...model import DiffusionGemma
from ..network import BlockNetwork
from .anchors import Blocks, Text, run
from .estimate import blocks_at_once


@dataclass(frozen=True)
class Accepted:
    """Accepted length at widths 1, 2, ... and the most there could be; `places` anchors were tried."""

    lengths: tuple[float, ...]
    most: tuple[float, ...]
    places: int

    def table(self) -> str:
        lines = ["| width | accepted | most |", "|---|---|---|"]
        for width, (length, most) in enumerate(zip(self.lengths, self.most, strict=True), 1):
            lines.append(f"| {width} | {length:.2f} | {most:.2f} |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {
            "accepted": [round(length, 4) for length in self.lengths],
            "most": [round(length, 4) for length in self.most],
            "places": self.places,
        }


def measure(network: BlockNetwork, model: DiffusionGemma, texts: Iterable[Text], budget: float) -> Accepted:
    """Of a drafter on some answers; `budget` bytes for blocks that are run together.

    Raises InputError if it says what is no number, of which argmax would make an answer.
    """
    drafts = network.config.drafts
    runs, left = [], []
    for text in texts:
        rows = network.context(text.features, 0)
        mx.eval(rows)
        blocks = Blocks.of(text.ids, text.places, drafts)
        size = blocks_at_once(network.config, len(text.ids), len(text.places), budget)
        for first in range(0, len(blocks.anchors), size):
            part = blocks[first : first + size]
            logits, _ = run(network, model, text, part, rows)
            if not mx.isfinite(logits).all().item():
                raise InputError("the drafter's logits are not finite; lower --lr (the answers are kept)")
            ids = np.array(mx.argmax(logits, axis=-1))
            right = (ids == part.targets) & (part.weights > 0)
            runs.append(np.cumprod(right, axis=1).sum(axis=1))
            left.append((part.weights > 0).sum(axis=1))
    widths = np.arange(1, drafts + 1)[:, None]
    lengths, most = (np.minimum(np.concatenate(x)[None], widths).mean(axis=1).tolist() for x in (runs, left))
    return Accepted(tuple(lengths), tuple(most), sum(map(len, runs)))

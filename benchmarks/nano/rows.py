"""Examples as rows of ids, and batches of them, each row with one random block of its answer as the canvas."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_dgemma.prompt import Prompt, encode_prompt

WIDTHS = (48, 64, 80, 96, 160, 256, 512)  # rows of about one length share a batch
USUAL_WIDTH = 96


@dataclass(frozen=True)
class Row:
    """Ids of a prompt and of its answer, the end of turn included."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Batch:
    """B rows, padded on the right to L, and one canvas of C positions of each.

    text (B, L): prompt and answer. answered (B, L): where the answer stands. before (B): how many ids stand
    before the canvas. canvas (B, C): the block of the answer, padded behind its end.
    """

    text: torch.Tensor
    answered: torch.Tensor
    before: torch.Tensor
    canvas: torch.Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(value.to(device) for value in (self.text, self.answered, self.before, self.canvas)))


def encode(tokenizer: TokenizerWrapper, end: int, prompt: Prompt, answer: str, thought: str | None) -> Row:
    """A prompt as generation encodes it, and its answer, before which a thought stands in its channel."""
    said = answer if thought is None else f"<|channel>thought\n{thought}<channel|>{answer}"
    asked = encode_prompt(tokenizer, prompt, enable_thinking=thought is not None)
    return Row(asked, [*tokenizer.encode(said, add_special_tokens=False), end])


def batches(rows: Iterable[Row], size: int, canvas: int, pad: int, seed: int) -> Iterator[Batch]:
    """Batches of `size` rows of USUAL_WIDTH, and of about as many positions at other widths.

    Rows that wait for their batch to fill when a training stops are not trained on.
    """
    rng = random.Random(seed)
    waiting: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        width = next((width for width in WIDTHS if len(row) <= width), -(-len(row) // WIDTHS[-1]) * WIDTHS[-1])
        waiting[width].append(row)
        if len(waiting[width]) == max(1, size * (USUAL_WIDTH + canvas) // (width + canvas)):
            yield collate(waiting.pop(width), width, canvas, pad, rng)


def collate(rows: list[Row], width: int, canvas: int, pad: int, rng: random.Random) -> Batch:
    text, answered, before, blocks = [], [], [], []
    for row in rows:
        start = rng.randrange(-(-len(row.answer) // canvas)) * canvas
        block = row.answer[start : start + canvas]
        text.append([*row.prompt, *row.answer] + [pad] * (width - len(row)))
        answered.append([len(row.prompt) <= place < len(row) for place in range(width)])
        before.append(len(row.prompt) + start)
        blocks.append(block + [pad] * (canvas - len(block)))
    return Batch(*map(torch.tensor, (text, answered, before, blocks)))

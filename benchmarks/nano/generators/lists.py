"""Lists: words in reverse, words sorted, numbers counted up over several canvases."""

from __future__ import annotations

import random

from ..example import Example
from .words import WORDS


def reverse(rng: random.Random) -> Example:
    """Three to six words -> the same words from last to first."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    answer = " ".join(reversed(words))
    return Example(task="reverse", prompt="reverse " + " ".join(words), answer=answer, keys=("reverse " + answer,))


def sort(rng: random.Random) -> Example:
    """Three to eight words -> the same words in alphabetical order."""
    words = rng.sample(WORDS, rng.randint(3, 8))
    answer = " ".join(sorted(words))
    return Example(task="sort", prompt="sort " + " ".join(words), answer=answer, keys=("sort " + answer,))


def count(rng: random.Random) -> Example:
    """`count 17 to 63` -> the numbers between, both included: 8 to 80 of them, up to 240 tokens."""
    length = rng.randint(8, 80)
    first = rng.randint(10, 99 - length)
    last = first + length - 1
    request = f"count {first} to {last}"
    return Example(task="count", prompt=request, answer=" ".join(map(str, range(first, last + 1))), keys=(request,))

"""Stories from a probabilistic grammar: their probability and entropy are known, so that sampling can be tested.

`GRAMMAR` is right-linear in its only recursion (a story goes on or ends) and gives every text one derivation.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from functools import cache

from ..example import Example

# symbol -> [(probability, text with <symbols>)]
GRAMMAR: dict[str, list[tuple[float, str]]] = {
    "story": [(1.0, "<opening> <rest>")],
    "opening": [
        (0.5, "Once a <adjective> <animal> lived <place>."),
        (0.5, "There was a <adjective> <animal> <place>."),
    ],
    "rest": [(0.85, "<sentence> <rest>"), (0.1, "The end."), (0.05, "And so it went on.")],
    "sentence": [
        (0.3, "It <verb> a <adjective> <thing> <place>."),
        (0.25, "One <time> it <met> a <adjective> <animal>."),
        (0.2, "The <animal> <said>: <speech>"),
        (0.15, "Then it <went> <place>."),
        (0.1, "It was <feeling>."),
    ],
    "speech": [(0.4, "I am <feeling>."), (0.35, "Where is my <thing>?"), (0.25, "Let us go home.")],
    "adjective": [(0.35, "small"), (0.25, "old"), (0.2, "clever"), (0.12, "quiet"), (0.08, "golden")],
    "animal": [(0.3, "fox"), (0.25, "bear"), (0.2, "owl"), (0.15, "mouse"), (0.1, "swan")],
    "place": [(0.35, "in the forest"), (0.3, "by the river"), (0.2, "on the hill"), (0.15, "under a bridge")],
    "thing": [(0.3, "key"), (0.25, "lamp"), (0.2, "book"), (0.15, "bell"), (0.1, "ring")],
    "verb": [(0.4, "found"), (0.3, "lost"), (0.2, "hid"), (0.1, "drew")],
    "time": [(0.5, "day"), (0.3, "night"), (0.2, "morning")],
    "met": [(0.6, "met"), (0.4, "saw")],
    "said": [(0.7, "said"), (0.3, "asked")],
    "went": [(0.6, "went"), (0.4, "ran")],
    "feeling": [(0.4, "happy"), (0.3, "tired"), (0.2, "hungry"), (0.1, "afraid")],
}
START = "story"
SYMBOL = re.compile(r"<(\w+)>")


def sample(rng: random.Random, symbol: str = START) -> str:
    probabilities, texts = zip(*GRAMMAR[symbol], strict=True)
    (text,) = rng.choices(texts, probabilities)
    return SYMBOL.sub(lambda found: sample(rng, found[1]), text)


def sentences(rng: random.Random, count: int) -> list[str]:
    """So many sentences of stories, with no beginning and no end."""
    return [sample(rng, "sentence") for _ in range(count)]


def log_probability(text: str) -> float:
    """Natural logarithm of the probability of a whole story; -inf if the grammar does not have it."""
    return next((log for log, end in _parses(START, text, 0) if end == len(text)), -math.inf)


def _parses(symbol: str, text: str, start: int) -> Iterator[tuple[float, int]]:
    """(log-probability, end) of all that `symbol` may derive from `start` on."""
    for probability, production in GRAMMAR[symbol]:
        for log, end in _matches(SYMBOL.split(production), text, start):
            yield math.log(probability) + log, end


def _matches(parts: list[str], text: str, start: int) -> Iterator[tuple[float, int]]:
    """The same for literal, symbol, literal, ..."""
    literal, *rest = parts
    if not text.startswith(literal, start):
        return
    start += len(literal)
    if not rest:
        yield 0.0, start
        return
    symbol, *rest = rest
    for log, end in _parses(symbol, text, start):
        for more, last in _matches(rest, text, end):
            yield log + more, last


def is_story(text: str, fields: object = None) -> bool:
    """The checker `story`: whether the grammar has the text; which of its texts the example shows says nothing."""
    try:
        return log_probability(text.strip()) > -math.inf
    except RecursionError:
        return False  # hundreds of sentences: nobody's sample


@cache
def entropy(symbol: str = START) -> float:
    """Nats of one derivation: what each choice has, and what its symbols have in turn; `rest` solved for itself."""
    total = again = 0.0
    for probability, production in GRAMMAR[symbol]:
        symbols = SYMBOL.findall(production)
        again += probability * symbols.count(symbol)
        inner = sum(entropy(other) for other in symbols if other != symbol)
        total += probability * (inner - math.log(probability))
    return total / (1 - again)


def story(rng: random.Random) -> Example:
    """`story` -> a text of the grammar: any of them is right."""
    text = sample(rng)
    return Example(task="story", prompt="story", answer=text, keys=(text,), checker="story")

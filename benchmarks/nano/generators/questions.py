"""Questions about facts that stand in the prompt: a few sentences of them, or one far behind a long text."""

from __future__ import annotations

import random

from ..example import Example
from .stories import sentences
from .words import CITIES, COLORS, JOBS, NAMES, WORDS


def _person(rng: random.Random, name: str, job: str, city: str, item: str) -> dict[str, str]:
    return {"name": name, "job": job, "city": city, "item": item, "color": rng.choice(COLORS)}


FACTS = {
    "job": "{name} is a {job}.",
    "city": "{name} lives in {city}.",
    "item": "{name} has a {color} {item}.",
}
# question -> (its answer, the facts it needs)
QUESTIONS = {
    "Who is a {job}?": ("{name} is a {job}.", ["job"]),
    "Who lives in {city}?": ("{name} lives in {city}.", ["city"]),
    "Who has a {item}?": ("{name} has a {item}.", ["item"]),
    "What is {name}?": ("{name} is a {job}.", ["job"]),
    "Where does {name} live?": ("{name} lives in {city}.", ["city"]),
    "What color is the {item}?": ("The {item} is {color}.", ["item"]),
    "What does {name} have?": ("{name} has a {color} {item}.", ["item"]),
    "Where does the {job} live?": ("The {job} lives in {city}.", ["job", "city"]),
    "What does the {job} have?": ("The {job} has a {color} {item}.", ["job", "item"]),
}


def question(rng: random.Random) -> Example:
    """Four to seven facts about two to four people in any order -> the answer of one or two of them."""
    count = rng.randint(2, 4)
    drawn = (rng.sample(words, count) for words in (NAMES, JOBS, CITIES, WORDS))
    people = [_person(rng, *values) for values in zip(*drawn, strict=True)]
    asked, (ask, (answer, needed)) = rng.choice(people), rng.choice(list(QUESTIONS.items()))
    told = {FACTS[kind].format(**asked) for kind in needed}
    others = [text for person in people for fact in FACTS.values() if (text := fact.format(**person)) not in told]
    told |= set(rng.sample(others, min(len(others), rng.randint(3, 5))))
    facts = " ".join(rng.sample(sorted(told), len(told)))
    request = f"{facts} {ask.format(**asked)}"
    return Example(task="question", prompt=request, answer=answer.format(**asked), keys=(request,))


def recall(rng: random.Random) -> Example:
    """A four-digit code, a story of up to 400 tokens behind it, and what the code was."""
    name, code = rng.choice(NAMES), f"{rng.randint(0, 9999):04}"
    story = " ".join(sentences(rng, rng.randint(4, 28)))
    request = f"The code of {name} is {code}. {story} What is the code of {name}?"
    return Example(task="recall", prompt=request, answer=code, keys=(f"code {name} {code}",))

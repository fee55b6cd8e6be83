"""Conversations: an object changed turn by turn, and what was said before."""

from __future__ import annotations

import json
import random

from ..example import Example, Message
from .structured import changed_object, object_key, random_object
from .words import CITIES, JOBS, NAMES, plain


def _conversation(turns: list[tuple[str, str]], last: str) -> list[Message]:
    said = [message for pair in turns for message in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": content} for role, content in [*said, ("user", last)]]


def chat(rng: random.Random) -> Example:
    return (_edits if rng.random() < 0.6 else _introduction)(rng)


def _edits(rng: random.Random) -> Example:
    """One object, and one to three changes of a field each."""
    objects = [random_object(rng)]
    request = "json " + " ".join(f"{key}={plain(value)}" for key, value in objects[0].items())
    requests = [request]
    for _ in range(rng.randint(1, 3)):
        name, changed = changed_object(rng, objects[-1])
        requests.append(f"set {name}={plain(changed[name])}")
        objects.append(changed)
    *turns, (last, answer) = zip(requests, map(json.dumps, objects), strict=True)
    keys = tuple(object_key(fields) for fields in reversed(objects))
    return Example(task="chat", prompt=_conversation(turns, last), answer=answer, keys=keys)


TOLD = {
    "My name is {name}.": ("Hello {name}.", "What is my name?", "Your name is {name}."),
    "I live in {city}.": ("I see.", "Where do I live?", "You live in {city}."),
    "I am a {job}.": ("Good to know.", "What am I?", "You are a {job}."),
}


def _introduction(rng: random.Random) -> Example:
    """Two or three things told in turns of their own, and a question about one of them."""
    person = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "job": rng.choice(JOBS)}
    told = rng.sample(list(TOLD), rng.randint(2, 3))
    turns = [(said.format(**person), TOLD[said][0].format(**person)) for said in told]
    _, ask, answer = TOLD[rng.choice(told)]
    keys = ("introduction " + " ".join(sorted(said for said, _ in turns)),)
    return Example(task="chat", prompt=_conversation(turns, ask), answer=answer.format(**person), keys=keys)

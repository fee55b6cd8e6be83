"""Words that requests and answers are made of."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

NAMES = (
    "Ann Bob Carla Dmitri Elena Farid Grace Hugo Ines Jonas Keiko Liam Mona Nils Olga Pablo Rosa Sven Tara Yusuf"
).split()
CITIES = "Oslo Lima Cairo Kyoto Paris Quito Rome Seoul Turin Vienna Boston Delhi Geneva Havana Lagos Madrid".split()
COLORS = "red green blue amber violet black white teal".split()
JOBS = "baker pilot nurse farmer painter tailor judge miner".split()
WORDS = (
    "apple river stone cloud tiger lemon piano chair grape horse bread candle door eagle forest garden "
    "hammer island jacket kettle ladder mirror needle orange pencil rabbit silver table window yellow"
).split()

FIELDS: dict[str, Callable[[random.Random], object]] = {
    "name": lambda r: r.choice(NAMES),
    "city": lambda r: r.choice(CITIES),
    "color": lambda r: r.choice(COLORS),
    "job": lambda r: r.choice(JOBS),
    "item": lambda r: r.choice(WORDS),
    "age": lambda r: r.randint(10, 99),
    "size": lambda r: r.randint(1, 99),
    "year": lambda r: r.randint(1950, 2049),
    "active": lambda r: r.random() < 0.5,
    "score": lambda r: r.randint(0, 999),
}


def plain(value: object) -> str:
    """A value as it is said outside of JSON."""
    return value if isinstance(value, str) else json.dumps(value)

"""Sums, differences and products with their working: digit by digit, as on paper."""

from __future__ import annotations

import random
from itertools import zip_longest

from ..example import Example


def _digits(number: int) -> list[int]:
    """From the last to the first."""
    return [int(digit) for digit in reversed(str(number))]


def _sum(a: int, b: int) -> tuple[list[str], int]:
    lines, carry = [], 0
    for first, second in zip_longest(_digits(a), _digits(b), fillvalue=0):
        plus, total = f" + {carry}" * carry, first + second + carry
        lines.append(f"{first} + {second}{plus} = {total}")
        carry = total // 10
    return lines, a + b


def _difference(a: int, b: int) -> tuple[list[str], int]:
    lines, borrowed = [], 0
    for first, second in zip_longest(_digits(a), _digits(b), fillvalue=0):
        lent = 10 if first - borrowed < second else 0
        minus, rest = f" - {borrowed}" * borrowed, first + lent - borrowed - second
        lines.append(f"{first + lent}{minus} - {second} = {rest}")
        borrowed = int(lent > 0)
    return lines, a - b


def _product(a: int, b: int) -> tuple[list[str], int]:
    lines, carry = [], 0
    for digit in _digits(a):
        plus, total = f" + {carry}" * (carry > 0), digit * b + carry
        lines.append(f"{digit} * {b}{plus} = {total}")
        carry = total // 10
    return lines, a * b


def arithmetic(rng: random.Random) -> Example:
    """`47 + 85` -> a line a digit, then the result; with thinking on, the lines are thought and the result is said."""
    sign = rng.choice("++--*")
    a, b = rng.randint(2, 999), rng.randint(2, 9) if sign == "*" else rng.randint(2, 999)
    if sign == "-" and b > a:
        a, b = b, a
    lines, result = {"+": _sum, "-": _difference, "*": _product}[sign](a, b)
    question = f"{a} {sign} {b}"
    working, answer = "\n".join(lines), f"{question} = {result}"
    thinks = rng.random() < 1 / 3
    return Example(
        task="arithmetic",
        prompt=question,
        answer=answer if thinks else f"{working}\n{answer}",
        keys=(question,),
        checker="final",
        thought=working if thinks else None,
    )

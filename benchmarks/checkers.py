"""Checkers, which tell whether the answer to an example is right, and judges, who have them by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mlx_dgemma.errors import InputError, UsageError

from .examples import Example, Fields
from .nano.generators.stories import is_story

Checker = Callable[[str, Fields], bool]
SIDES = {4: 2, 9: 3}  # of a Sudoku: rows, and rows of a box
RULE = re.compile(r"[-+|=:\s]+")  # between rows, of a table or of boxes
FENCED = re.compile(r"```\w*\n(.*?)\n?```", re.DOTALL)


def exact(text: str, fields: Fields) -> bool:
    """The text but for white space at its ends."""
    return text.strip() in [answer.strip() for answer in accepted(fields)]


def same_json(text: str, fields: Fields) -> bool:
    """Equal as parsed values: the order of keys and white space say nothing, nor does 1.0 for 1; true is not 1.

    One code fence around the whole answer is taken off. A key given twice is no JSON here.
    """
    fenced = FENCED.fullmatch(text.strip())
    try:
        value = _parsed(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return any(_equal(value, _parsed(answer)) for answer in accepted(fields))


def sudoku(text: str, fields: Fields) -> bool:
    """The last whole grid in the text has every digit once a row, column and box, and keeps the prompt's givens.

    A grid, 4x4 or 9x9, is so many rows of so many digits behind each other, between spaces or newlines; `.` in the
    prompt's is a blank. In the answer, commas, bars, brackets and marks of emphasis count as spaces, lines of nothing
    but -, +, |, = and : are left out, and the digits of a row that has a line to itself may stand apart. Rows behind
    each other that do not make whole grids make none: which ones are meant is open.
    """
    givens = puzzle(fields)
    side, box = len(givens), SIDES[len(givens)]
    grid = _last_grid(_closed_up(text, side), side, blanks=False)
    if grid is None or any(
        given not in (".", cell) for given, cell in zip("".join(givens), "".join(grid), strict=True)
    ):
        return False
    places = [(row, column) for row in range(side) for column in range(side)]
    for unit_of in (lambda r, c: r, lambda r, c: c, lambda r, c: (r // box, c // box)):
        if len({(unit_of(r, c), grid[r][c]) for r, c in places}) < len(places):
            return False
    return True


def final(text: str, fields: Fields) -> bool:
    """The last line, behind its last "=" if there is one, is that of the answer: working before it says nothing."""
    return _end(text) in map(_end, accepted(fields))


def _end(text: str) -> str:
    return text.strip().rpartition("\n")[2].rpartition("=")[2].strip()


def contains(text: str, fields: Fields) -> bool:
    """The answer is in the text, in the same case, with no letter, digit or underscore beside it.

    A number also has no minus sign or dot in front of it, and no comma, dot or slash between it and a further digit:
    3 is not in -3, 1-3, 0.3, 3,000 or 1/3.
    """
    return any(re.search(_whole(answer.strip()), text) for answer in accepted(fields))


def _whole(answer: str) -> str:
    before = r"(?<!\d[,/])(?<![.\u2212-])" if answer[:1].isdigit() else ""
    behind = r"(?![.,/]\d)" if answer[-1:].isdigit() else ""
    return rf"(?<!\w){before}{re.escape(answer)}(?!\w){behind}"


CHECKERS: dict[str, Checker] = {
    "exact": exact,
    "json": same_json,
    "sudoku": sudoku,
    "final": final,
    "contains": contains,
    "story": is_story,
}


def accepted(fields: Fields) -> Sequence[str]:
    """The texts that are right."""
    answer = fields["answer"]
    return [answer] if isinstance(answer, str) else answer


def puzzle(fields: Fields) -> list[str] | None:
    """The rows of the last grid in the prompt, with its blanks; None if there is none."""
    text = _prompt_text(fields)
    return _last_grid(text, 9, blanks=True) or _last_grid(text, 4, blanks=True)


def _prompt_text(fields: Fields) -> str:
    """All that is said before the answer."""
    prompt = fields["prompt"] if "prompt" in fields else fields["messages"]
    if isinstance(prompt, str):
        return prompt
    said = [message.get("content") for message in prompt]
    parts = [part for content in said for part in (content if isinstance(content, list) else [{"text": content}])]
    return "\n".join(str(part.get("text")) for part in parts)


def _closed_up(text: str, side: int) -> str:
    """Rows without what people set between digits and behind the last one."""
    rows = [line for line in text.splitlines() if not RULE.fullmatch(line)]
    lines = [re.sub(r"(?<=\d)\.(?!\S)", "", re.sub(r"[,;|*`\[\]]", " ", row)).split() for row in rows]
    return "\n".join("".join(line) if len(line) == side == len("".join(line)) else " ".join(line) for line in lines)


def _last_grid(text: str, side: int, blanks: bool) -> list[str] | None:
    row = f"[1-{side}{'.' if blanks else ''}]{{{side}}}"
    runs = [run.split() for run in re.findall(rf"(?<!\S){row}(?:\s+{row})*(?!\S)", text)]
    return next((rows[-side:] for rows in reversed(runs) if len(rows) % side == 0), None)


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b and isinstance(a, bool) == isinstance(b, bool)


@dataclass(frozen=True)
class Judges:
    """Checkers by name; `only`: the one that is used whatever an example says."""

    by_name: Mapping[str, Checker]
    only: str | None = None

    @classmethod
    def named(cls, names: Sequence[str]) -> Judges:
        """Ours and some more.

        Args:
            names: "NAME=MODULE:FUNCTION" is what examples call NAME; one of ours, or "MODULE:FUNCTION", is the only.

        Raises:
            UsageError: there is no such checker.
        """
        by_name, only = dict(CHECKERS), None
        for text in names:
            name, equals, place = text.rpartition("=")
            if not equals and only is not None:
                raise UsageError(f"checkers {only!r} and {text!r}: there can be one in place of all")
            if not equals:
                name = only = text
            if equals or text not in CHECKERS:
                by_name[name] = imported(place)
        return cls(by_name, only)

    def name(self, own: str) -> str:
        """Of the checker of an example that asks for `own`."""
        return own if self.only is None else self.only

    def require_judged(self, examples: Sequence[Example]) -> None:
        """Raise InputError naming the line that no checker can judge."""
        for example in examples:
            name = self.name(example.checker)
            if name not in self.by_name:
                raise InputError(
                    f"{example.where}: checker must be one of {', '.join(self.by_name)}, not {name!r:.80}; "
                    "--checker NAME=MODULE:FUNCTION gives it one of your own"
                )
            if self.by_name[name] is CHECKERS.get(name):  # somebody's own knows what it needs
                _require_judged(example.where, name, example.fields)

    def is_right(self, example: Example, text: str) -> bool:
        """Raises InputError naming the line if the checker fails."""
        name = self.name(example.checker)
        try:
            verdict = self.by_name[name](text, example.fields)
        except Exception as error:  # whatever somebody's function raises
            raise InputError(f"{example.where}: checker {name} raised {type(error).__name__}: {error}") from None
        if not isinstance(verdict, bool):
            raise InputError(f"{example.where}: checker {name} must return True or False, not {verdict!r:.80}")
        return verdict


def imported(place: str) -> Checker:
    """The function at "MODULE:FUNCTION". Raises UsageError if there is none."""
    module, colon, function = place.partition(":")
    if not colon or not module or not function:
        raise UsageError(f"checker {place!r} does not exist; there are {', '.join(CHECKERS)} and MODULE:FUNCTION")
    try:
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever somebody's module raises
        raise UsageError(f"checker {place!r}: cannot be imported ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise UsageError(f"checker {place!r}: {function} is not a function")
    return found


def _require_judged(where: str, checker: str, fields: Fields) -> None:
    """Raise InputError for a line that its checker has nothing to say of."""
    if checker == "sudoku" and puzzle(fields) is None:
        raise InputError(f"{where}: no 4x4 or 9x9 grid in the prompt; write its rows, with . for a blank")
    if checker in ("sudoku", "story"):
        return
    answers = fields.get("answer")
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f'{where}: "answer" must be the text that is right, or a list of texts')
    if checker == "contains" and not all(answer.strip() for answer in answers):
        raise InputError(f"{where}: an empty answer is in every text; say what must be in it")
    if checker == "json":
        for answer in answers:
            try:
                _parsed(answer)
            except (ValueError, RecursionError) as error:
                raise InputError(f'{where}: "answer" is not JSON ({error}), as the checker json wants it') from None

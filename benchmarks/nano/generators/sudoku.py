"""Sudoku with one solution: 4x4 by listing all grids, 9x9 graded by the technique that solves it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product

from ..example import Example

BLANK = "."
EASY, HARD = "singles", "search"  # a 9x9 is solved by naked and hidden singles alone, or a guess is needed
Cells = list[int]  # 81 digits, 0 for a blank


@cache
def grids() -> tuple[str, ...]:
    """All 288 valid 4x4 grids, row after row."""
    rows = ["".join(p) for p in permutations("1234")]
    halves = [a + b for a, b in product(rows, rows) if len(set(a[:2] + b[:2])) == 4 == len(set(a[2:] + b[2:]))]
    both = (top + bottom for top, bottom in product(halves, halves))
    return tuple(grid for grid in both if all(len(set(grid[column::4])) == 4 for column in range(4)))


@cache
def _having(cell: int, digit: str) -> int:
    """The grids with a digit in a cell, as bits."""
    return sum(1 << number for number, grid in enumerate(grids()) if grid[cell] == digit)


def solutions(puzzle: str) -> int:
    """Of a 4x4 puzzle, its cells row after row."""
    left = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        left &= -1 if digit == BLANK else _having(cell, digit)
    return left.bit_count()


def rows(cells: str) -> list[str]:
    side = int(len(cells) ** 0.5)
    return [cells[start : start + side] for start in range(0, len(cells), side)]


def sudoku(rng: random.Random) -> Example:
    """A 4x4 with 4 to 9 blanks -> its grid."""
    return _small(rng, "sudoku", 4, 9)


def minimal(rng: random.Random) -> Example:
    """A 4x4 of which no given can be left out, most with 11 or 12 blanks -> its grid."""
    return _small(rng, "minimal", 16, 16)


def _small(rng: random.Random, task: str, fewest: int, most: int) -> Example:
    """A 4x4 with so many blanks, or as many as leave one solution."""
    grid = rng.choice(grids())
    cells, blanks = list(grid), rng.randint(fewest, most)
    for cell in rng.sample(range(16), 16):
        if cells.count(BLANK) == blanks:
            break
        kept, cells[cell] = cells[cell], BLANK
        if solutions("".join(cells)) > 1:
            cells[cell] = kept
    request = "sudoku " + " ".join(rows("".join(cells)))
    return Example(task=task, prompt=request, answer="\n".join(rows(grid)), keys=("grid " + grid,), checker="sudoku")


def sudoku9(rng: random.Random) -> Example:
    """A 9x9 -> its grid; most are solved by singles, one in five needs a search."""
    solution = _full_grid(rng)
    wanted = HARD if rng.random() < 0.2 else EASY
    while technique(puzzle := _dig(rng, solution, wanted)) != wanted:
        pass  # few puzzles need a search, even of those that may
    shown = "".join(str(digit) if digit else BLANK for digit in puzzle)
    answer = "".join(map(str, solution))
    request = "sudoku " + " ".join(rows(shown))
    return Example(
        task="sudoku9", prompt=request, answer="\n".join(rows(answer)), keys=("grid " + answer,), checker="sudoku"
    )


ROW = [cell // 9 for cell in range(81)]
COLUMN = [cell % 9 for cell in range(81)]
BOX = [cell // 27 * 3 + cell % 9 // 3 for cell in range(81)]
UNITS = [[c for c in range(81) if of[c] == n] for of in (ROW, COLUMN, BOX) for n in range(9)]
PEERS = [{p for unit in UNITS if cell in unit for p in unit} - {cell} for cell in range(81)]
ALL = 0b1111111110  # bit d: digit d may stand here


def candidates(cells: Cells, cell: int) -> int:
    """The digits that no peer holds, as bits."""
    left = ALL
    for peer in PEERS[cell]:
        left &= ~(1 << cells[peer])
    return left


def technique(cells: Cells) -> str:
    """What a 9x9 puzzle with one solution takes."""
    return EASY if all(_singles(cells)) else HARD


def _singles(puzzle: Cells) -> Cells:
    """The puzzle with all that naked and hidden singles fill in."""
    cells = puzzle.copy()
    left = {cell: candidates(cells, cell) for cell in range(81) if not cells[cell]}
    while left:
        cell, bit = _naked(left) or _hidden(left) or (None, 0)
        if cell is None:
            break
        cells[cell] = bit.bit_length() - 1
        del left[cell]
        for peer in PEERS[cell] & left.keys():
            left[peer] &= ~bit
    return cells


def _naked(left: dict[int, int]) -> tuple[int, int] | None:
    return next(((cell, bits) for cell, bits in left.items() if bits.bit_count() == 1), None)


def _hidden(left: dict[int, int]) -> tuple[int, int] | None:
    for unit in UNITS:
        once = twice = 0
        for cell in unit:
            bits = left.get(cell, 0)
            once, twice = once | bits, twice | once & bits
        if once & ~twice:
            bit = (once & ~twice) & -(once & ~twice)
            return next((cell, bit) for cell in unit if left.get(cell, 0) & bit)
    return None


def search(cells: Cells, rng: random.Random | None = None) -> Iterator[Cells]:
    """All solutions of a 9x9, cells with the fewest candidates first; `rng` shuffles the digits tried."""
    blanks = [(candidates(cells, cell), cell) for cell in range(81) if not cells[cell]]
    if not blanks:
        yield cells.copy()
        return
    bits, cell = min(blanks, key=lambda blank: blank[0].bit_count())
    digits = [digit for digit in range(1, 10) if bits >> digit & 1]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        cells[cell] = digit
        yield from search(cells, rng)
    cells[cell] = 0


def _full_grid(rng: random.Random) -> Cells:
    return next(search([0] * 81, rng))


def _dig(rng: random.Random, solution: Cells, wanted: str) -> Cells:
    """Take out cells, in a random order, as long as the puzzle stays within the technique that is wanted."""
    cells, fewest = solution.copy(), 24 if wanted == HARD else rng.randint(24, 45)
    for cell in rng.sample(range(81), 81):
        kept, cells[cell] = cells[cell], 0
        if not all(_singles(cells)) and (wanted == EASY or not _is_unique(cells)):
            cells[cell] = kept
        if 81 - cells.count(0) == fewest:
            break
    return cells


def _is_unique(cells: Cells) -> bool:
    found = search(cells.copy())
    next(found)
    return next(found, None) is None

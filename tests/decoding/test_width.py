"""The choice of width, on machines that are not here: their costs are given, texts are simulated."""

import random
from itertools import pairwise

import pytest

from mlx_dgemma.decoding import width as width_module
from mlx_dgemma.decoding.costs import KEPT, Costs, CostTable
from mlx_dgemma.decoding.width import WIDEST, History, Widths, width_to_ask, width_to_verify
from mlx_dgemma.drafter.protocol import Draft

# Seconds. Plain steps from measured tokens per second; passes over 4 and 16 positions in plain steps as
# measured (M1 Ultra: today's expert kernels), as bandwidth allows (M5 Max), or from a canvas step of 3.2
# plain steps over 256 positions (H100); this CPU with nano. A step that has to wait for its drafter costs
# a launch more. A lookup is free, a block drafter reads 0.9 GB and a 4-bit head.
MACHINES = {
    "M1 Ultra": (1 / 71, {1: 1.2, 4: 2.2, 16: 5.1}, 0.15),
    "M5 Max": (1 / 146, {1: 1.3, 4: 1.5, 16: 2.5}, 0.2),
    "H100": (1 / 199, {1: 1.1, 4: 1.15, 16: 1.25}, 0.1),
    "CPU": (1 / 300, {1: 1.0, 2: 1.2, 4: 1.5, 8: 2.2, 16: 3.7}, 0.1),
}


def costs(machine: str, drafter: str) -> Costs:
    step, verified, block = MACHINES[machine]
    drafted = {1: block * step if drafter == "block" else 0.002 * step}
    return Costs(step, {n: ratio * step for n, ratio in verified.items()}, drafted)


def simulate(table: Costs, text, length: int, widths: Widths, confident: bool = False) -> tuple[float, int]:
    """(modelled seconds in plain steps, drafted rounds) of an answer.

    Args:
        text: position -> the chance that a draft for it is right, or None where there is no draft.
    """
    rng, done, spent, rounds, waits = random.Random(1), 0, 0.0, 0, True
    while done < length:
        asked = widths.ask(done, length - done - 1)
        if not asked and not waits:  # launched ahead
            widths.stepped(done, None)
            done, spent = done + 1, spent + table.step()
            continue
        waits = bool(asked)  # the step after a round was not launched ahead
        chances = []
        for position in range(done, done + asked):
            if text(position) is None:
                break
            chances.append(text(position))
        draft = Draft([0] * len(chances), chances if confident else None)
        draft = draft.first(widths.verify(done, draft))
        accepted = next((i for i in range(len(draft.tokens)) if rng.random() >= chances[i]), len(draft.tokens))
        seconds, drafter_seconds = table.verify(len(draft.tokens) + 1), table.draft(asked) if asked else 0.0
        widths.verified(done, asked, draft, accepted, drafter_seconds, seconds)
        spent += drafter_seconds + seconds
        done, rounds = done + accepted + 1, rounds + bool(draft.tokens)
    return spent / table.step(), rounds


def best_fixed(table: Costs, chance: float, length: int) -> float:
    runs = (simulate(table, lambda _: chance, length, Widths(table, fixed=width))[0] for width in range(1, WIDEST + 1))
    return min(runs)


@pytest.mark.parametrize("chance", [0.6, 0.7, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("machine", MACHINES)
def test_it_drafts_where_it_pays(machine, chance):
    """Never far from the best fixed width, which is known only afterwards."""
    table, length = costs(machine, "block"), 3000
    best = best_fixed(table, chance, length)
    spent, rounds = simulate(table, lambda _: chance, length, Widths(table))
    if best < 0.95 * length:
        assert rounds > length / 50
        assert spent <= 1.08 * best
    else:
        assert spent <= 1.03 * length


@pytest.mark.parametrize("start", [0, 5, 15, 40, 100])
@pytest.mark.parametrize("machine", MACHINES)
def test_a_copy_that_starts_late_is_found(machine, start):
    """New text, in which a lookup finds nothing, then text that stands in the prompt."""
    table, copied = costs(machine, "lookup"), 300
    text = lambda position: None if position < start else 0.98  # noqa: E731
    spent, _ = simulate(table, text, start + copied, Widths(table), confident=True)
    best = best_fixed(table, 0.98, copied)
    assert spent <= 1.03 * start + 1.25 * best + 16


WORST = {
    "never right": lambda _: 0.0,
    "no draft": lambda _: None,
    "right at first": lambda position: 0.95 if position < 60 else 0.0,
    "right in turns": lambda position: 1.0 if position // 12 % 2 else 0.0,
    "right every other token": lambda position: float(position % 2),
    "below break-even": lambda _: 0.3,
    "a match now and then, wrong": lambda position: 0.0 if position % 7 == 0 else None,
}


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("drafter", ["lookup", "block"])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("text", WORST)
def test_a_bad_text_costs_five_per_cent_at_most(machine, drafter, text, confident):
    table = costs(machine, drafter)
    for length in (128, 256, 2000):
        spent, _ = simulate(table, WORST[text], length, Widths(table), confident)
        assert spent <= 1.05 * length


def test_without_budget_and_probes_a_bad_text_costs_more(monkeypatch):
    monkeypatch.setattr(width_module, "ALLOWANCE", 1e9)
    monkeypatch.setattr(width_module, "LONGEST_WAIT", 1)
    table = costs("M1 Ultra", "block")
    assert simulate(table, WORST["never right"], 2000, Widths(table))[0] > 1.2 * 2000


def test_confidence_that_lies_costs_no_more():
    table = costs("M1 Ultra", "block")
    for length in (128, 1000):
        widths, rng, done, spent = Widths(table), random.Random(0), 0, 0.0
        while done < length:
            asked = widths.ask(done, length - done - 1)
            if not asked:
                widths.stepped(done, None)
                done, spent = done + 1, spent + table.step()
                continue
            draft = Draft([0] * asked, [0.99] * asked)
            draft = draft.first(widths.verify(done, draft))
            accepted = int(rng.random() < 0.1) if draft.tokens else 0
            widths.verified(done, asked, draft, accepted, 0.0, 0.0)
            spent += table.draft(asked) + table.verify(len(draft.tokens) + 1)
            done += accepted + 1
        assert spent <= 1.05 * length * table.step()


def test_wider_where_more_is_right_and_where_positions_are_cheap():
    def width(machine: str, chance: float) -> int:
        history = History(right=50 * chance, wrong=50 * (1 - chance), debt=-100.0)
        return width_to_ask(costs(machine, "block"), history, room=100)

    assert width("M1 Ultra", 0.6) < width("M1 Ultra", 0.8) < width("M1 Ultra", 0.95)
    assert width("M1 Ultra", 0.8) < width("M5 Max", 0.8) <= width("H100", 0.8)
    assert width("H100", 0.8) > 8


def test_a_draft_is_cut_where_the_drafter_gets_unsure():
    table, history = costs("M1 Ultra", "lookup"), History(debt=-100.0)
    assert width_to_verify(table, history, [0.95] * 4 + [0.1] * 8, 12) == 4
    assert width_to_verify(table, history, [0.05] * 4, 4) == 0
    doubted = History(right=1.0, wrong=9.0, promised=9.0, debt=-100.0)
    assert width_to_verify(table, doubted, [0.95] * 4, 4) == 0, "confidences that were wrong count less"


def test_probes_come_at_growing_distance():
    widths = Widths(costs("M1 Ultra", "block"))
    drafted_at = []
    for position in range(3000):
        asked = widths.ask(position, 4000)
        if not asked:
            widths.stepped(position, None)
            continue
        draft = Draft([0] * asked)
        draft = draft.first(widths.verify(position, draft))
        assert draft.tokens
        drafted_at.append(position)
        widths.verified(position, asked, draft, 0, 0.0, 0.0)
    gaps = [b - a for a, b in pairwise(drafted_at)]
    assert gaps == sorted(gaps) and gaps[-1] >= 128
    assert len(drafted_at) < 40


def test_it_comes_back_when_the_text_gets_better():
    table = costs("M1 Ultra", "block")
    bad_then_good = lambda position: 0.0 if position < 400 else 0.95  # noqa: E731
    spent, _ = simulate(table, bad_then_good, 1400, Widths(table))
    assert spent < 400 * 1.05 + 1000 * 0.75


def drafted_late() -> int:
    """Rounds drafted among the last thousand tokens, where plain steps were measured while the machine was busy.

    A draft is right half the time and costs, with its pass, 2.1 plain steps: it never pays.
    """
    table, rng, done, late, waits = CostTable(), random.Random(0), 0, 0, True
    for _ in range(KEPT + 1):
        table.add(0, "plain", 1, 4.0)  # what a step took then; now 1.0
    widths = Widths(table)
    while done < 5000:
        asked = widths.ask(0, 1)
        if not asked and not waits:
            widths.stepped(0, 1.0)
            done += 1
            continue
        waits, draft = bool(asked), Draft([0] * asked)
        accepted = int(asked and rng.random() < 0.5)
        widths.verified(0, asked, draft, accepted, 0.1 * bool(asked), 2.0 if asked else 1.0)
        done, late = done + accepted + 1, late + bool(asked and done > 4000)
    return late


def test_what_was_measured_on_a_busy_machine_is_measured_again(monkeypatch):
    assert drafted_late() < 30
    monkeypatch.setattr(width_module, "ROUNDS_MEASURED", 10**9)
    assert drafted_late() > 500, "never again: drafting at a loss goes on"


def test_the_room_bounds_the_width():
    table = Costs(1.0, {1: 1.0, 17: 1.1})
    assert [width_to_ask(table, History(), room) for room in (-1, 0, 1, 3)] == [0, 0, 1, 3]
    assert [Widths(table, fixed=5).ask(0, room) for room in (-1, 0, 3, 9)] == [0, 0, 3, 5]
    assert width_to_ask(table, History(debt=-100.0), 1000) <= WIDEST


def test_the_choice_is_a_function_of_its_arguments():
    table, history = costs("M5 Max", "lookup"), History(right=3.0, wrong=1.0, tokens=40)
    assert len({width_to_ask(table, history, 30) for _ in range(3)}) == 1
    assert history == History(right=3.0, wrong=1.0, tokens=40)

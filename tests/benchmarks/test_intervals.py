"""Intervals and the test: by hand, against their definitions, by how often they hold, and where they must not."""

import math
from itertools import product

import numpy as np
import pytest

from benchmarks.intervals import END, Paired, Z, effective_count, fewest_prompts, p_value, share, wilson


def answered(*rows: str) -> np.ndarray:
    """ "10" is a prompt whose first seed is right and whose second is not."""
    return np.array([[letter == "1" for letter in row] for row in rows])


def pairs(only_ours: int, only_theirs: int, both: int = 0, neither: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ours = "1" * only_ours + "0" * only_theirs + "1" * both + "0" * neither
    theirs = "0" * only_ours + "1" * only_theirs + "1" * both + "0" * neither
    return answered(*ours), answered(*theirs)


# --- shares


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # Newcombe, Statistics in Medicine 17, 1998, 857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_newcombes_table(right, count, low, high):
    assert wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)


def test_limits_of_no_and_of_all_right_mirror_each_other():
    none, every = (share(answered(*[letter * 3] * 50)) for letter in "01")
    assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
    assert none.high == pytest.approx(Z**2 / (50 + Z**2)) and every.low == pytest.approx(1 - none.high)


def test_seeds_that_agree_are_worth_one_and_those_that_do_not_all():
    agree, differ = answered(*["111", "000"] * 20), answered(*["110", "101", "011", "110"] * 250)
    assert share(agree) == share(agree[:, :1])
    # every prompt has two of three right: nothing is left to vary but seeds
    low, high = wilson(2 / 3, 3000)
    assert (share(differ).low, share(differ).high) == pytest.approx((low, high), abs=2e-3)


def test_an_effective_count_by_hand():
    # 1, 0, -1: with END more at each end, variances are 0.75 more beside 2 END, and 0.5 more; of one each
    by_hand = (3 * 0.75 + 2 * END) / (2 + 2 * END)
    assert effective_count(np.array([1, 0, -1]), 0.75, 2) == pytest.approx(3 * by_hand)
    means = np.full(1000, 0.5)
    assert effective_count(means, 1.0, 2) == 2000, "at most all"
    assert effective_count(np.ones(5), 1.0, 9) == 5, "at least prompts"


def rated(random, chance: float, alike: float, size: tuple[int, int]) -> np.ndarray:
    """Answers of which so many are right, two seeds of a prompt being correlated by `alike`."""
    if alike == 1:
        return np.repeat(random.random((size[0], 1)) < chance, size[1], axis=1)
    spread = (1 - alike) / alike if alike else 1e9
    return random.random(size) < random.beta(chance * spread, (1 - chance) * spread, size[0])[:, None]


@pytest.mark.parametrize(("prompts", "seeds"), [(20, 3), (60, 3), (200, 3), (8, 20)])
def test_a_share_is_covered_however_much_seeds_agree(prompts, seeds):
    random = np.random.default_rng(prompts)
    for chance, alike in product((0.5, 0.8, 0.95), (0, 0.1, 0.3, 0.6, 1)):
        intervals = [share(rated(random, chance, alike, (prompts, seeds))) for _ in range(300)]
        covered = np.mean([interval.low <= chance <= interval.high for interval in intervals])
        assert covered >= 0.905, (chance, alike)  # of 300, 0.94 less two deviations and a half


def test_it_would_not_be_if_seeds_were_prompts():
    random = np.random.default_rng(0)
    limits = [wilson(rated(random, 0.75, 0.6, (60, 4)).mean(), 240) for _ in range(300)]
    assert np.mean([low <= 0.75 <= high for low, high in limits]) < 0.85


@pytest.mark.parametrize(("prompts", "seeds"), [(1, 3), (5, 30), (30, 2), (100, 3), (400, 10)])
def test_a_mistake_more_raises_no_limit(prompts, seeds):
    limits, differences = [], []
    every = np.ones((prompts, seeds), dtype=bool)
    for wrong in range(prompts + 1):  # one seed of so many prompts
        ours = every.copy()
        ours[:wrong, 0] = False
        limits.append((share(ours).low, share(ours).high))
        paired = Paired.of(ours, every, same_seeds=True).difference()
        differences.append((paired.low, paired.high))
    for found in (limits, differences):
        assert (np.diff(found, axis=0) <= 1e-9).all()


@pytest.mark.parametrize(("prompts", "seeds"), [(10, 5), (100, 3), (300, 3), (400, 30)])
def test_answers_that_differ_both_ways_never_exclude_more_than_none(prompts, seeds):
    none = Paired(0, 0, prompts, prompts).difference().low
    for count in range(1, 6):
        ours, theirs = np.ones((2, prompts, seeds), dtype=bool)
        ours[:count, 0] = theirs[-count:, -1] = False
        assert Paired.of(ours, theirs, same_seeds=True).difference().low <= none + 1e-9


# --- differences


def likeliest_rest(only_ours: int, only_theirs: int, count: int, difference: float) -> float:
    """By trying: the share of pairs that theirs alone has, if ours alone has `difference` more."""
    rest = np.linspace(max(0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    same = count - only_ours - only_theirs
    return rest[
        np.argmax(
            only_ours * np.log(rest + difference)
            + only_theirs * np.log(rest)
            + same * np.log(1 - 2 * rest - difference)
        )
    ]


@pytest.mark.parametrize(("only_ours", "only_theirs", "count"), [(7, 3, 40), (1, 9, 25), (12, 20, 60)])
def test_limits_are_where_the_likelihood_says(only_ours, only_theirs, count):
    interval = Paired(only_ours / count, only_theirs / count, count, count).difference()
    assert interval.value == pytest.approx((only_ours - only_theirs) / count)
    for limit, sign in ((interval.low, 1), (interval.high, -1)):
        rest = likeliest_rest(only_ours, only_theirs, count, limit)
        deviation = math.sqrt((2 * rest + limit * (1 - limit)) / count)
        assert (interval.value - limit) / deviation == pytest.approx(sign * Z, rel=1e-3)


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(3, 0), (4, 0), (9, 2), (9, 3), (0, 4), (2, 30)])
def test_no_difference_is_excluded_where_mcnemars_score_says(only_ours, only_theirs):
    interval = Paired.of(*pairs(only_ours, only_theirs, both=60), same_seeds=True).difference()
    deviations = abs(only_ours - only_theirs) / math.sqrt(only_ours + only_theirs)
    assert (interval.low > 0 or interval.high < 0) == (deviations > Z)


def test_sides_mirror_each_other_and_limits_stay_within_bounds():
    ours, theirs = pairs(5, 1, both=10, neither=4)
    there, back = (Paired.of(*sides, True).difference() for sides in ((ours, theirs), (theirs, ours)))
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    opposite = Paired.of(*pairs(6, 0), same_seeds=True).difference()
    assert opposite.value == opposite.high == 1 and 0 < opposite.low < 1


@pytest.mark.parametrize(("prompts", "lost", "margin"), [(17, 2, 0.02), (34, 4, 0.02), (51, 6, 0.02), (9, 4, 0.08)])
def test_where_the_root_is_of_nothing_there_is_a_verdict(prompts, lost, margin):
    theirs = np.ones((prompts, 3), dtype=bool)
    ours = theirs.copy()
    ours.flat[: 3 * lost : 3] = False
    paired = Paired.of(ours, theirs, same_seeds=True)
    assert paired.score(-margin) < paired.score(-2 * margin) and paired.prompts_needed(margin) > 0


def test_no_answer_that_differs_leaves_a_loss_that_a_formula_tells():
    interval = Paired.of(*pairs(0, 0, both=100, neither=20), same_seeds=True).difference()
    assert (interval.value, interval.high) == (0, pytest.approx(Z**2 / (120 + Z**2)))
    assert interval.low == pytest.approx(-interval.high)


def covered_by(interval_of, count: int, only_ours: float, only_theirs: float) -> float:
    """The chance that it holds the true difference, over all that can be seen of `count` pairs."""
    true, total = only_ours - only_theirs, 0.0
    for b, c in product(range(count + 1), repeat=2):
        if b + c <= count:
            ways = math.comb(count, b) * math.comb(count - b, c)
            chance = ways * only_ours**b * only_theirs**c * (1 - only_ours - only_theirs) ** (count - b - c)
            low, high = interval_of(b / count, c / count, count)
            total += chance * (low <= true + 1e-9 and true - 1e-9 <= high)
    return total


def tango(b: float, c: float, count: int) -> tuple[float, float]:
    interval = Paired(b, c, count, count).difference()
    return interval.low, interval.high


def wald(b: float, c: float, count: int) -> tuple[float, float]:
    half = Z * math.sqrt((b + c - (b - c) ** 2) / count)
    return b - c - half, b - c + half


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(0.02, 0.02), (0.05, 0.0), (0.1, 0.02), (0.3, 0.2)])
def test_a_difference_is_covered_near_none_too(only_ours, only_theirs):
    assert 0.94 < covered_by(tango, 30, only_ours, only_theirs)


def test_what_is_usually_taken_is_not():
    assert covered_by(wald, 30, 0.05, 0.0) < 0.8


def test_answers_of_the_same_seeds_are_compared_with_each_other():
    same = answered("100", "010", "111", "000")
    assert Paired.of(same, same, same_seeds=True) == Paired(0, 0, 4, 4)
    apart = Paired.of(same, same, same_seeds=False)
    assert apart.only_ours == apart.only_theirs == pytest.approx(2 * 2 / 9 / 4)


def test_seeds_that_are_not_equally_many():
    ours, theirs = answered("1", "0", "1"), answered("110", "000", "111")
    paired = Paired.of(ours, theirs, same_seeds=False)
    assert (paired.only_ours, paired.only_theirs) == (pytest.approx(1 / 9), 0)
    assert paired.count == 3, "the side with one seed has no more to say"


def test_a_difference_of_correlated_seeds_is_covered():
    random, covered, naive = np.random.default_rng(1), [], []
    for _ in range(400):
        chances = random.beta(0.3, 0.1, size=(60, 2))  # each side has its own hard prompts
        ours, theirs = (random.random((60, 3)) < chances[:, side, None] for side in (0, 1))
        paired = Paired.of(ours, theirs, same_seeds=True)
        for held, interval in (
            (covered, paired.difference()),
            (naive, Paired(paired.only_ours, paired.only_theirs, 60, 180).difference()),
        ):
            held.append(interval.low <= 0 <= interval.high)
    assert 0.92 <= np.mean(covered) <= 0.985
    assert np.mean(naive) < 0.85


# --- how many prompts it takes


def test_the_fewest_prompts_are_those_at_which_the_limit_passes_the_margin():
    assert [fewest_prompts(margin) for margin in (0.01, 0.05)] == [381, 73]
    for count, tells in ((381, True), (380, False)):
        assert (Paired(0, 0, count, count).difference().low > -0.01) is tells
    assert Paired(0, 0, 20, 20).prompts_needed(0.01) == 381


@pytest.mark.parametrize("shares", [(0.03, 0.03), (0.03, 0.033), (0.02, 0.05), (0.05, 0.02)])
def test_so_many_prompts_tell_if_answers_differ_as_often(shares):
    needed = Paired(*shares, 100, 150).prompts_needed(0.01)  # two seeds, worth 1.5
    half = sum(shares) / 2
    ends = []
    for b, c in (shares, (half, half)):
        for count in (needed, needed - 1):
            interval = Paired(b, c, count, 1.5 * count).difference()
            ends.append(interval.low > -0.01 or interval.high < 0)
    assert ends[0] and ends[2] and not (ends[1] and ends[3])


# --- the test


@pytest.mark.parametrize(("only_ours", "only_theirs"), [(0, 0), (1, 0), (5, 0), (7, 2), (6, 6), (3, 14)])
def test_with_one_seed_it_is_exact_mcnemar(only_ours, only_theirs):
    count, most = only_ours + only_theirs, max(only_ours, only_theirs)
    tail = sum(math.comb(count, k) for k in range(most, count + 1)) / 2**count
    assert p_value(*pairs(only_ours, only_theirs, 9, 4)) == pytest.approx(min(1, 2 * tail))


def flipped(differences: list[int]) -> float:
    """All signs tried."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((1, -1), repeat=len(differences))
    ]
    return sum(total >= abs(sum(differences)) for total in sums) / len(sums)


def test_with_several_seeds_all_signs_are_tried():
    ours = answered("111", "110", "100", "111", "000", "011", "110")
    theirs = answered("000", "100", "110", "111", "010", "000", "000")
    assert p_value(ours, theirs) == pytest.approx(flipped([3, 1, -1, -1, 2, 2]))
    assert p_value(ours, theirs) == p_value(theirs, ours) != p_value(ours[:, :1], theirs[:, :1])
    assert p_value(ours[:, :1], theirs) == pytest.approx(flipped([3, 2, 1, -1, 0, 3]))  # of three


def test_seeds_that_repeat_each_other_prove_no_more():
    ours, theirs = pairs(6, 1, 5)
    assert p_value(ours.repeat(3, axis=1), theirs.repeat(3, axis=1)) == pytest.approx(p_value(ours, theirs))


def test_it_rejects_what_is_true_no_more_often_than_it_says():
    random, found = np.random.default_rng(2), []
    for _ in range(300):
        chances = random.beta(0.5, 0.5, size=(40, 2))
        found.append(p_value(*(random.random((40, 3)) < chances[:, side, None] for side in (0, 1))))
    assert np.mean(np.array(found) <= 0.05) < 0.08
    assert np.mean(np.array(found) <= 0.3) > 0.2, "nor does it never reject"

"""Intervals of shares of right answers and of differences, and a test, where one prompt is answered several times.

The units are prompts: answers to one prompt with different seeds are correlated, so they count as less than as many
prompts. How many independent answers they are worth is their effective number (Kish, Survey Sampling, 1965): the
variance of one answer over the variance of the mean, the latter from the spread between prompts. It lies between the
number of prompts and that of answers, and it takes the number's place in

    a share         Wilson's score interval (J. Am. Stat. Assoc. 22, 1927, 209)
    a difference    Tango's score interval of paired shares (Statistics in Medicine 17, 1998, 891)

Korn and Graubard (Survey Methodology 24, 1998, 193) have such a number in the exact binomial interval, as it is
estimated, with a factor of t quantiles for few clusters. Here `END` prompts more at either end, all of whose seeds
agree, are what few prompts or few mistakes are weighed against: these say little of whether seeds agree, so they count
as prompts, and a mistake more never raises a limit. Where seeds do agree, both intervals are those of one seed.

Both hold what they promise near 0 and 1 as well, where "mean +- 1.96 deviations" does not. The test flips the sign of
every prompt's whole difference (Fisher, The Design of Experiments, 1935) and is exact; with one seed it is McNemar's
(Psychometrika 12, 1947, 153). Answers are arrays of bools, a row per prompt, a column per seed. Everything is
two-sided, at 95 %, and not corrected for how many rows a table has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z = NormalDist().inv_cdf(0.975)
END = Z**2  # prompts; the least at which answers that differ never narrow an interval of a difference
NOTHING = 1e-12  # a variance below it is rounding
HALVINGS = 50


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, sign: str = "") -> str:
        """`sign`: "+" shows it of positive numbers too."""
        value, low, high = (format(number, f"{sign}.3f") for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def share(rights: np.ndarray) -> Interval:
    """The share of right answers."""
    value, means = float(rights.mean()), rights.mean(axis=1)
    return Interval(value, *wilson(value, effective_count(2 * means - 1, 1.0, rights.shape[1])))


def wilson(value: float, count: float) -> tuple[float, float]:
    """The limits of a share that was seen in `count` independent observations, a whole number or not."""
    grown = 1 + Z**2 / count
    middle = (value + Z**2 / (2 * count)) / grown
    half = Z / grown * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_count(means: np.ndarray, square: float, most: int) -> float:
    """How many independent observations, of -1 to 1, are worth what was seen.

    Args:
        means: of each prompt's observations.
        square: mean square of one observation.
        most: observations of a prompt, which is what it counts for at most; it counts for one at least.
    """
    prompts, ends = len(means), 2 * END
    middle = means.sum() / (prompts + ends)
    one = (prompts * square + ends) / (prompts + ends) - middle**2
    between = ((means**2).sum() + ends) / (prompts + ends) - middle**2
    return prompts * float(np.clip(one / between, 1, most))


@dataclass(frozen=True)
class Paired:
    """Two sets of answers to the same prompts.

    Attributes:
        only_ours: share of pairs in which ours alone is right.
        only_theirs: in which theirs alone is.
        prompts: how many.
        count: of independent pairs that are worth as much.
    """

    only_ours: float
    only_theirs: float
    prompts: int
    count: float

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray, same_seeds: bool) -> Paired:
        """Pair answers to a prompt seed by seed if seeds are the same (so may be the draws), else each with each."""
        if same_seeds:
            alone = (ours & ~theirs).mean(axis=1), (theirs & ~ours).mean(axis=1)
        else:
            a, b = ours.mean(axis=1), theirs.mean(axis=1)
            alone = a * (1 - b), b * (1 - a)
        only_ours, only_theirs = (float(part.mean()) for part in alone)
        most = min(ours.shape[1], theirs.shape[1])
        count = effective_count(alone[0] - alone[1], only_ours + only_theirs, most)
        return cls(only_ours, only_theirs, len(ours), count)

    def score(self, difference: float) -> float:
        """Deviations between the difference seen and a supposed one in (-1, 1): falls as that rises, 0 where they meet.

        The deviation is that under the supposition, with `rest` the likeliest share of pairs that theirs alone has.
        """
        seen, d = self.only_ours - self.only_theirs, difference
        linear = (2 - seen) * d - self.only_ours - self.only_theirs
        root = max(0.0, linear**2 + 8 * self.only_theirs * d * (1 - d))  # never below 0 but by rounding
        rest = (math.sqrt(root) - linear) / 4
        variance = 2 * rest + d * (1 - d)
        return 0.0 if variance <= NOTHING else (seen - d) * math.sqrt(self.count / variance)

    def difference(self) -> Interval:
        """Ours - theirs."""
        mirrored = Paired(self.only_theirs, self.only_ours, self.prompts, self.count)
        return Interval(self.only_ours - self.only_theirs, self._low(), -mirrored._low())

    def _low(self) -> float:
        """The least difference that is not refuted, by bisection."""
        refuted, kept = -1.0, self.only_ours - self.only_theirs
        for _ in range(HALVINGS):
            middle = (refuted + kept) / 2
            if self.score(middle) > Z:
                refuted = middle
            else:
                kept = middle
        return kept

    def prompts_needed(self, margin: float) -> int:
        """About how many prompts would tell whether ours is worse by `margin` or more, where these do not.

        The more of two: if all shares stay as they are, until one limit of the interval has passed its bound; and if
        both are equally good and differ as often as they did. A score grows with the square root of the count.
        """
        half = (self.only_ours + self.only_theirs) / 2
        as_seen = max(self.score(-margin), -self.score(0.0))
        as_equals = Paired(half, half, self.prompts, self.count).score(-margin)
        return math.ceil(self.prompts * (Z / min(as_seen, as_equals)) ** 2)


def fewest_prompts(margin: float) -> int:
    """Those that can tell that a loss is less than `margin` if not one answer differs: Z^2 / (n + Z^2) < margin."""
    return math.ceil(Z**2 * (1 - margin) / margin)


def p_value(ours: np.ndarray, theirs: np.ndarray) -> float:
    """How often chance alone makes a difference at least as large, if which side is which were a coin's toss a prompt.

    Exact if both have as many seeds; with fewer on one side, whose shares are then coarser, nearly so.
    """
    seeds = math.lcm(ours.shape[1], theirs.shape[1])
    differences = ours.sum(axis=1) * (seeds // ours.shape[1]) - theirs.sum(axis=1) * (seeds // theirs.shape[1])
    sizes = np.abs(differences[differences != 0])
    if not len(sizes):
        return 1.0
    unit = np.gcd.reduce(sizes)
    sizes, seen = sizes // unit, abs(differences.sum()) // unit
    chances = np.ones(1)  # of the sum of the sizes that keep a plus
    for size in sizes:
        chances = (np.pad(chances, (0, size)) + np.pad(chances, (size, 0))) / 2
    sums = 2 * np.arange(len(chances)) - sizes.sum()
    return min(1.0, float(chances[np.abs(sums) >= seen].sum()))

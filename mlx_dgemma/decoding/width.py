"""How many tokens to draft: what costs, experience and the drafter's own confidence say together.

With p(i) the chance that the first i drafts are all right, a round of k drafts gives

    tau(k) = 1 + p(1) + ... + p(k)   tokens in   draft(k) + verify(k + 1)   seconds,

and the best k has the largest quotient. Two rules keep a bad drafter, or a text that turns bad,
from costing more than a few per cent of plain decoding:

    budget  a round is run only if, should all its drafts be wrong, the time spent so far stays
            within ALLOWANCE + RATE * tokens plain steps of what plain decoding would have taken
    probes  where drafting does not pay, plain steps, and a draft after 2, 4, 8, ... tokens; where
            the drafter has nothing to say, and asking costs something, it is asked as rarely

Functions of their arguments alone, so that any machine's choices can be tested on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..drafter.protocol import Draft
from .costs import DRAFT, LARGEST_PASS, Costs, CostTable

WIDEST = 16  # wider drafts only if asked for
ALLOWANCE, RATE = 3.0, 0.02  # plain steps, plain steps per token
RESERVE = 1.5  # plain steps of the allowance that asking in vain leaves for drafts
ASKING = 0.01  # plain steps per token that asking in vain may come to
SLOWEST = 4.0  # a round is charged at most so many times what it should have taken
PRIOR, PRIOR_WEIGHT = 0.75, 2.0  # acceptance that is expected at first, and the trials it is worth
FORGETTING, AGEING = 0.95, 0.98  # what a trial still weighs after the next one, after a plain step
LONGEST_WAIT = 128  # tokens between probes at most
UNMEASURED_STEPS = 4  # plain steps run to learn what they cost
# Drafted rounds in a row after which it is learnt anew: if the machine was busy then, it would be drafted on for ever.
# That takes three plain passes: one that is waited for, and two launched ahead, which are timed, as the second is
# launched before the first is known. Where drafting costs nothing, they are 1.2 % of the time.
ROUNDS_MEASURED, STEPS_AGAIN = 256, 1


@dataclass(frozen=True)
class History:
    """What has become of drafts, as far as the next choice needs it."""

    right: float = 0.0  # drafts accepted, and
    wrong: float = 0.0  # first drafts rejected, older ones weighing less
    promised: float = 0.0  # the sum of confidences of both
    debt: float = 0.0  # plain steps spent beyond what plain decoding would have taken
    tokens: int = 0  # emitted
    failures: int = 0  # drafted rounds in a row after which drafting did not seem to pay
    waited: int = 0  # tokens since the last drafted round
    empties: int = 0  # times in a row that asking led to no draft
    unasked: int = 0  # tokens since the last asking

    @property
    def acceptance(self) -> float:
        """The chance that a draft is right, if those before it are."""
        return (self.right + PRIOR * PRIOR_WEIGHT) / (self.right + self.wrong + PRIOR_WEIGHT)

    @property
    def trust(self) -> float:
        """What confidences have been worth: accepted over promised."""
        return (self.right + PRIOR_WEIGHT) / (self.promised + PRIOR_WEIGHT)

    @property
    def is_probe_due(self) -> bool:
        return self.waited >= min(2**self.failures, LONGEST_WAIT)

    def after_step(self) -> History:
        """A plain step, nothing asked. What is known of drafts grows old: texts change."""
        aged = {name: AGEING * getattr(self, name) for name in ("right", "wrong", "promised")}
        return replace(self, **aged, tokens=self.tokens + 1, waited=self.waited + 1, unasked=self.unasked + 1)

    def after_round(
        self,
        costs: Costs,
        asked: int,
        drafted: int,
        accepted: int,
        confidences: Sequence[float] | None = None,
        seconds: float | None = None,
    ) -> History:
        """A round for which `asked` tokens were asked, `drafted` verified and `accepted` kept.

        Args:
            seconds: what it took; None: what it should have taken.
        """
        expected = _spent(costs, asked, drafted)
        spent = expected if seconds is None else min(seconds / costs.step(), SLOWEST * expected)
        right, wrong, promised = self.right, self.wrong, self.promised
        for i in range(min(accepted + 1, drafted)):
            believed = confidences[i] if confidences else self.acceptance
            right, wrong, promised = (FORGETTING * value for value in (right, wrong, promised))
            right, wrong, promised = right + (i < accepted), wrong + (i >= accepted), promised + believed
        changed = replace(
            self,
            right=right,
            wrong=wrong,
            promised=promised,
            debt=self.debt + spent - (accepted + 1),
            tokens=self.tokens + accepted + 1,
            waited=0 if drafted else self.waited + 1,
            empties=0 if drafted else self.empties + bool(asked),
            unasked=0 if asked else self.unasked + 1,
        )
        if not drafted:
            return changed
        pays = best_width(costs, _chances(changed, None, WIDEST), 1)[1] >= 1
        return replace(changed, failures=0 if pays else self.failures + 1)


def width_to_ask(costs: Costs, history: History, room: int, is_confident: bool = False) -> int:
    """How many tokens to ask a drafter for; 0: leave it alone for this step.

    Args:
        room: drafts that could all be kept.
        is_confident: the drafter gives confidences, so that its draft can be cut afterwards.
    """
    widest = min(room, WIDEST)
    if widest < 1 or (history.failures and not history.is_probe_due):
        return 0
    in_vain = _spent(costs, widest, 0) - 1
    if history.unasked < min(2**history.empties - 1, in_vain / ASKING):
        return 0
    if is_confident:
        return widest if history.debt + in_vain <= ALLOWANCE - RESERVE + RATE * history.tokens else 0
    width = best_width(costs, _chances(history, None, widest), 1)[0]
    while width and not _affordable(costs, history, width, width):
        width -= 1
    return width


def width_to_verify(costs: Costs, history: History, confidences: Sequence[float] | None, drafted: int) -> int:
    """How many of `drafted` tokens to verify."""
    width, _ = best_width(costs, _chances(history, confidences, drafted), 0, asked=drafted)
    if not width and history.failures and history.is_probe_due:
        width = 1
    while width and not _affordable(costs, history, drafted, width):
        width -= 1
    return width


def best_width(costs: Costs, chances: Sequence[float], least: int, asked: int | None = None) -> tuple[int, float]:
    """The width from `least` on with most tokens per second, and how many times plain decoding that is.

    Args:
        chances: chances[i], that the first i + 1 drafts are all right.
        asked: the width that was asked for, if the draft is there already.
    """
    tokens, best = 1.0, (0, 0.0)
    for width in range(len(chances) + 1):
        tokens += chances[width - 1] if width else 0.0
        gain = tokens * costs.step() / (costs.draft(width if asked is None else asked) + costs.verify(width + 1))
        if width >= least and gain > best[1]:
            best = (width, gain)
    return best


def _chances(history: History, confidences: Sequence[float] | None, width: int) -> list[float]:
    chances, chance = [], 1.0
    for i in range(width):
        step = history.acceptance if confidences is None else min(1.0, confidences[i] * history.trust)
        chance *= step
        chances.append(chance)
    return chances


def _affordable(costs: Costs, history: History, asked: int, verified: int) -> bool:
    return history.debt + _spent(costs, asked, verified) - 1 <= ALLOWANCE + RATE * history.tokens


def _spent(costs: Costs, asked: int, verified: int) -> float:
    """A round's time in plain steps."""
    return ((costs.draft(asked) if asked else 0.0) + costs.verify(verified + 1)) / costs.step()


class Widths:
    """The choices of one request, and what they teach.

    Args:
        table: a `CostTable`, or `Costs` that are given.
        fixed: always this width, whatever it costs; None: the best one.
    """

    def __init__(self, table: CostTable | Costs | None = None, fixed: int | None = None):
        if fixed is not None and not 0 <= fixed < LARGEST_PASS:
            raise ValueError(f"the width must lie in 0-{LARGEST_PASS - 1}, not {fixed}")
        self._table, self._fixed = CostTable() if table is None else table, fixed
        self._history, self._is_confident, self._to_measure = History(), True, 0
        self._rounds = 0  # since the last plain step
        self.drafter = ""  # its name

    def ask(self, context: int, room: int) -> int:
        """How many tokens to ask the drafter for behind `context` tokens, where `room` could be kept."""
        if self._fixed is not None:
            return max(0, min(self._fixed, room))
        if self._to_measure:
            return 0
        return width_to_ask(self._costs(context), self._history, room, self._is_confident)

    def verify(self, context: int, draft: Draft) -> int:
        """How many tokens of a draft to verify."""
        if self._fixed is not None or not draft.tokens:
            return len(draft.tokens)
        self._is_confident = draft.confidences is not None
        return width_to_verify(self._costs(context), self._history, draft.confidences, len(draft.tokens))

    def stepped(self, context: int, seconds: float | None) -> None:
        """A step that was launched ahead; None: its time says nothing."""
        self._history = self._history.after_step()
        self._rounds = 0
        self._to_measure = max(0, self._to_measure - 1)
        if seconds is not None:
            self._table.add(context, "plain", 1, seconds)

    def verified(
        self, context: int, asked: int, draft: Draft, accepted: int, drafter_seconds: float, seconds: float
    ) -> None:
        """A round in which `asked` tokens were asked for, `draft` verified, and `accepted` of it kept."""
        costs, drafted = self._costs(context), len(draft.tokens)
        charged = drafter_seconds + seconds if costs.is_measured else None
        self._history = self._history.after_round(costs, asked, drafted, accepted, draft.confidences, charged)
        self._table.add(context, "verify", drafted + 1, seconds)
        if asked:
            self._table.add(context, DRAFT + self.drafter, asked, drafter_seconds)
        self._rounds += 1
        if asked and not accepted and costs.plain is None:
            self._to_measure = UNMEASURED_STEPS  # what it is that has to be beaten
        elif self._rounds >= ROUNDS_MEASURED:
            self._to_measure, self._rounds = STEPS_AGAIN, 0

    def _costs(self, context: int) -> Costs:
        return self._table.at(context, self.drafter)

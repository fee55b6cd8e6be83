"""Speed: every mode with every drafter on the same prompts, and whether drafts left the answer as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..decoding import causal, diffusion
from ..decoding.causal import agreement
from ..decoding.costs import CostTable
from ..decoding.counts import Counts
from ..decoding.prefill import prefill
from ..decoding.width import Widths
from ..drafter import make
from ..drafter.protocol import Drafter
from ..model import DiffusionGemma
from ..parity.widths import NOISE
from .budget import Budget
from .report import Column, Section
from .subject import Subject, turned_off

TITLE = "Tokens per second"
COLUMNS = (
    Column("mode", "mode"),
    Column("drafter", "drafter"),
    Column("width", "drafts"),
    Column("prompts", "prompts", "d"),
    Column("tokens", "tokens", "d"),
    Column("rate", "tok/s", ".1f"),
    Column("gain", "x ar", ".2f"),
    Column("per_pass", "tok/pass", ".2f"),
    Column("steps", "steps/canvas", ".1f"),
    Column("accepted", "accepted", ".2f"),
    Column("same", "same as ar"),
)
LONGEST = 256  # tokens an answer
WARM_UP = 3  # tokens, or denoising steps
FIXED = 8  # drafts a pass: what a drafter is worth where the costs here have it rarely asked
LARGEST_SHARE = 0.6  # of the time left, for one answer


@dataclass(frozen=True)
class Way:
    """A mode and a drafter, None: without.

    Attributes:
        width: how many tokens are drafted a pass; None: what costs least.
    """

    mode: str
    name: str | None = None
    drafter: Drafter | None = None
    width: int | None = None

    def __str__(self) -> str:
        return " ".join([self.mode, *([self.name] if self.name else []), *([str(self.width)] if self.width else [])])


PLAIN = Way("ar")
SAME, TIE = "yes", "tie"


@dataclass
class Answer:
    """What one way wrote to one prompt, and what it took from the prompt's end to its last token."""

    tokens: list[int]
    seconds: float
    forwards: int
    counts: Counts
    canvases: int
    is_whole: bool
    same: str | None = None  # "yes", "tie", or how it differs from the answer without a drafter; None: not compared


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """A row per way, renewed after every answer: prompt by prompt, so that a cut leaves all of them comparable.

    What a user gets comes first; then the drafters again, at a fixed width.
    """
    section.notes += [
        f"Natural stop, at most {LONGEST} tokens, ar greedy; the prompts ({', '.join(subject.prompts)}) are not "
        f"timed. Drafts a pass: by measured cost, as `generate` does, or always {FIXED}; accepted: of them, a round.",
        "diffusion is another sampler: its answers are not meant to equal those of ar.",
    ]
    drafted = [Way("ar", name, drafter) for name, drafter in subject.drafters.items()]
    usual = [PLAIN, Way("diffusion"), *drafted]
    fixed = [replace(way, width=FIXED) for way in drafted]
    first = next(iter(subject.prompts.values()))
    for way in usual:
        if budget.has(WARM_UP * subject.pace(budget.clock)):
            subject.tell(f"speed: warming up {way}")
            _answer(subject, way, first, budget.part(0.1), WARM_UP)
    answers: dict[Way, dict[str, Answer]] = {way: {} for way in [*usual, *fixed]}
    for ways in (usual, fixed):
        for number, label in enumerate(subject.prompts):
            for way in ways if number % 2 == 0 else [*ways[:1], *ways[:0:-1]]:  # all but ar, whose turn is first
                _take(subject, section, way, label, answers, budget)


def _take(
    subject: Subject,
    section: Section,
    way: Way,
    label: str,
    answers: dict[Way, dict[str, Answer]],
    budget: Budget,
) -> None:
    """One more answer, and the rows anew; none of a drafter that has failed."""
    if any(_failed(answers[other]) for other in answers if other.name == way.name):
        return
    if not budget.has():
        section.missing.append(f"{label} by {way}")
        return
    subject.tell(f"speed: {label} by {way}")
    with subject.watched(f"{way.mode} answers" + (f", {way.name}" if way.name else "")):
        answer = _answer(subject, way, subject.prompts[label], budget.part(LARGEST_SHARE))
    answers[way][label] = answer
    if not answer.is_whole:
        section.missing.append(f"the rest of {label} by {way}")
    if answer.counts.drafter_failure:
        section.faults.append(turned_off(way.name, answer.counts.drafter_failure))
    section.rows.clear()
    for row in answers:
        _add(subject, section, row, answers)


def _failed(answers: dict[str, Answer]) -> bool:
    return any(answer.counts.drafter_failure for answer in answers.values())


def _answer(subject: Subject, way: Way, prompt: Sequence[int], budget: Budget, most: int | None = None) -> Answer:
    """Decode until the answer ends, or the budget, or after `most` tokens or steps."""
    counts, clock = Counts(), budget.clock
    before = [clock(), 0]  # when the prompt was done, and the passes it took

    def prefilled(done: int, total: int) -> None:
        before[:] = clock(), counts.encode_forwards + (done < total)

    events = _events(subject, way, prompt, counts, prefilled)
    done = Answer([], 0.0, 0, counts, 0, False)
    try:
        for number, (new, reason) in enumerate(events, 1):
            if new:  # the steps of a canvas that is cut have brought nothing yet
                done.tokens += new
                done.seconds = clock() - before[0]
                done.forwards = counts.encode_forwards + counts.denoise_forwards - before[1]
                done.canvases += way.mode == "diffusion"
            if reason is None and (not budget.has() or number == most):
                break
        else:  # whether it says why it ended or not: it was not cut here
            done.is_whole = True
    finally:
        events.close()
        mx.synchronize()
    return done


def _events(subject: Subject, way: Way, prompt, counts, progress) -> Iterator[tuple[list[int], str | None]]:
    """(new ids, why they are the last), after every denoising step or token."""
    model, config = subject.model, subject.greedy(LONGEST)
    if way.mode == "diffusion":
        for event in diffusion.decode(model, prompt, config, subject.draws(), counts=counts, progress=progress):
            is_block = isinstance(event, diffusion.Block)
            yield (event.tokens, event.finish_reason) if is_block else ([], None)
        return
    drafter = make(way.drafter, model)
    widths = Widths(CostTable.of(model), way.width)
    given = {"drafter": drafter, "widths": widths, "counts": counts, "progress": progress}
    for token in causal.decode(model, prompt, config, subject.draws(), **given):
        yield [token.id], token.finish_reason


def _add(subject: Subject, section: Section, way: Way, answers: dict[Way, dict[str, Answer]]) -> None:
    """The row of a way: sums over its answers to what ar without a drafter has answered too."""
    plain = answers[PLAIN]
    mine = {
        label: answer for label, answer in answers[way].items() if label in plain and (answer.tokens or answer.is_whole)
    }
    if not mine:
        return
    done, beside = list(mine.values()), [plain[label] for label in mine]
    tokens, forwards = sum(len(answer.tokens) for answer in done), sum(answer.forwards for answer in done)
    rounds, accepted = (sum(getattr(answer.counts, name) for answer in done) for name in ("rounds", "accepted"))
    same = _sameness(subject, section, way, mine, plain) if way.drafter is not None else None
    head = (way.mode, way.name or "-", None if way.drafter is None else str(way.width or "by cost"), len(mine), tokens)
    if _failed(mine):  # the rest of the answer was written without it
        section.add(*head, *[None] * (len(COLUMNS) - len(head)))
        return
    whole = [answer for answer in done if answer.is_whole and answer.canvases]
    steps = sum(answer.counts.denoise_forwards for answer in whole)
    section.add(
        *head,
        _rate(done),
        _rate(done) / _rate(beside) if way is not PLAIN and any(answer.tokens for answer in beside) else None,
        tokens / forwards if forwards else None,
        steps / sum(answer.canvases for answer in whole) if whole and way.mode == "diffusion" else None,
        accepted / rounds if rounds else None,
        same,
    )


def _rate(answers: Sequence[Answer]) -> float:
    return sum(len(answer.tokens) for answer in answers) / max(1e-9, sum(answer.seconds for answer in answers))


def _sameness(subject: Subject, section: Section, way: Way, mine: dict[str, Answer], plain: dict[str, Answer]) -> str:
    """Whether the answers are those without a drafter; a difference that no rounding explains is a fault."""
    for label in mine:
        if mine[label].same is None:
            mine[label].same = _difference(subject, label, plain[label], mine[label])
            if mine[label].same not in (SAME, TIE):
                section.faults.append(f"{way} changes {mine[label].same}")
    verdicts = [answer.same for answer in mine.values() if answer.same is not None]
    ties = verdicts.count(TIE)
    wrong = len(verdicts) - ties - verdicts.count(SAME)
    return f"NO: {wrong} of {len(verdicts)}" if wrong else f"but for {ties} ties" if ties else SAME if verdicts else "-"


def _difference(subject: Subject, label: str, plain: Answer, answer: Answer) -> str:
    expected, got = plain.tokens, answer.tokens
    number = agreement(expected, got)
    if number >= min(len(expected), len(got)):
        shorter = min(plain, answer, key=lambda one: len(one.tokens))
        if len(expected) == len(got) or not shorter.is_whole:
            return SAME
        return f"the length of {label}: {len(got)} tokens, not {len(expected)}"
    gap = margin(subject.model, subject.prompts[label] + expected[:number], expected[number], got[number])
    return TIE if abs(gap) <= 2 * NOISE[subject.model.dtype] else f"token {number} of {label}, by {gap:.2g} in logits"


def margin(model: DiffusionGemma, tokens: Sequence[int], expected: int, got: int) -> float:
    """How much likelier `expected` is than `got` after `tokens`, in logits, by a pass over one position."""
    cache = model.make_cache()
    prefill(model, tokens[:-1], cache)
    scores = model.logits(model.encode(mx.array([tokens[-1:]]), cache))[0, 0]
    return (scores[expected] - scores[got]).item()

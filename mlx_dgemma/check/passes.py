"""Costs: what a pass of every kind and size takes here; the width policy learns from the same samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

import mlx.core as mx

from ..cache import PrefixCache
from ..decoding.causal import Verifier, decode
from ..decoding.costs import KEPT, CostTable
from ..decoding.counts import Counts
from ..decoding.prefill import prefill
from ..decoding.width import WIDEST, Widths
from ..denoise import denoise
from .budget import Budget
from .report import Column, Section
from .subject import Subject, seconds_of, turned_off

TITLE = "What a pass costs"
COLUMNS = (
    Column("pass", "pass"),
    Column("positions", "positions", "d"),
    Column("ms", "ms", ".2f"),
    Column("steps", "AR steps", ".2f"),
    Column("samples", "samples", "d"),
)
CONTEXT = 256  # tokens before what is timed
NARROW, WIDE = (1, 2, 4, 8, 16), (32, 64)
STEP = "AR step"


@dataclass
class Bench:
    """A prefix in a cache, and the rows that are measured behind it."""

    subject: Subject
    section: Section
    table: CostTable
    text: list[int]
    cache: PrefixCache
    medians: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> int:
        return len(self.text) - 1

    def add(self, name: str, positions: int | None, times: list[float]) -> None:
        """A row from a warm-up and the samples after it; nothing measured is a piece left out."""
        if not times:
            self.section.missing.append(name if positions is None else f"{name} {positions}")
            return
        if len(times) == 1:
            which = name if positions is None else f"{name} {positions}"
            self.section.notes.append(f"{which}: time for a first run alone, which may have compiled kernels.")
        seconds = median(times[1:] or times)
        self.medians.setdefault(name, seconds)
        steps = seconds / self.medians[STEP] if STEP in self.medians else None
        self.section.add(name, positions, 1e3 * seconds, steps, max(1, len(times) - 1))

    def learn(self, kind: str, number: int, times: list[float]) -> None:
        """The table drops the first pass of a kind by itself: it compiles kernels."""
        for seconds in times:
            self.table.add(len(self.text), kind, number, seconds)


def measure(subject: Subject, section: Section, budget: Budget) -> None:
    """Rows: the prompt, a step, verify passes, a canvas step, drafts; then the widest passes."""
    model = subject.model
    length = min(CONTEXT, model.config.max_position_embeddings // 2)
    section.notes.append(f"Behind {length} tokens; medians. Verify passes and drafts feed the stored cost table.")
    bench = Bench(subject, section, CostTable.of(model), subject.text(length), model.make_cache())
    try:
        with subject.watched("passes behind a prefix"):
            _prompt(bench, budget)
            if bench.cache.length:
                _step(bench, budget)
                _verify(bench, NARROW, budget)
                _canvas(bench, budget.part(0.5))
                _drafts(bench, budget)
                _verify(bench, WIDE, budget)
    finally:  # what an interruption leaves is worth keeping too
        bench.table.save()


def _prompt(bench: Bench, budget: Budget) -> None:
    model = bench.subject.model

    def encode() -> None:
        bench.cache = model.make_cache()
        prefill(model, bench.text[:-1], bench.cache)
        mx.eval(bench.cache.arrays())

    bench.subject.tell("costs: the prompt")
    bench.add("prompt", bench.held, seconds_of(encode, budget.part(0.2), 2))


def _step(bench: Bench, budget: Budget) -> None:
    """The time between tokens where the next step is launched before this one's token is read."""
    subject, times = bench.subject, []
    subject.tell("costs: AR steps")
    config = subject.greedy(2 * KEPT).replace(eos_token_ids=())
    steps = decode(subject.model, bench.text, config, subject.draws(), cache=bench.cache)
    try:
        next(steps)  # not launched ahead
        times = seconds_of(lambda: next(steps), budget, KEPT)
    finally:
        steps.close()
        bench.cache.rollback(bench.cache.length - bench.held)
    bench.add(STEP, 1, times)
    bench.learn("plain", 1, times)


def _verify(bench: Bench, sizes: tuple[int, ...], budget: Budget) -> None:
    """The loop's own pass, from its launch to its tokens."""
    subject, cost = bench.subject, 0.0
    verifier = Verifier(subject.model, bench.cache, subject.greedy(1), subject.draws(), bench.text, Counts())
    following = subject.text(max(sizes))
    for number, size in enumerate(sizes):
        block = mx.array(following[:size])

        def verify(block: mx.array = block) -> None:
            verifier.launch(block, ()).samples.tolist()
            bench.cache.rollback(bench.cache.length - bench.held)

        subject.tell(f"costs: verifying {size} positions")
        part = budget.part(1 / (len(sizes) - number + len(subject.drafters)))
        times = seconds_of(verify, part, KEPT) if budget.has(cost) else []
        cost = times[-1] if times else cost
        bench.add("verify", size, times)
        bench.learn("verify", size, times)


def _canvas(bench: Bench, budget: Budget) -> None:
    subject = bench.subject
    subject.tell("costs: denoising steps")
    times: list[float] = []
    if budget.has(bench.medians.get("prompt", 0.0)):
        for canvas in range(KEPT + 1):
            _denoise(bench, canvas, times, budget)
    bench.add("canvas step", subject.model.config.canvas_length, times)


def _denoise(bench: Bench, canvas: int, times: list[float], budget: Budget) -> None:
    """Add the seconds of the steps of a canvas, but for the first, which conditions on nothing."""
    model = bench.subject.model
    steps = denoise(model, bench.cache, model.generation_config, bench.subject.draws(), canvas)
    while len(times) <= KEPT and budget.has(times[-1] if times else 0.0):
        started = budget.clock()
        frame = next(steps, None)
        if frame is None:
            return
        if frame.step > 1:
            times.append(budget.clock() - started)


def _drafts(bench: Bench, budget: Budget) -> None:
    for number, (name, drafter) in enumerate(bench.subject.drafters.items()):
        bench.subject.tell(f"costs: drafts of {name}")
        part = budget.part(1 / (len(bench.subject.drafters) - number + 1))
        counts = Counts()
        times = _rounds(bench, drafter, counts, part) if part.has(2 * bench.medians.get("prompt", 0.0)) else []
        if counts.drafter_failure:
            bench.section.faults.append(turned_off(name, counts.drafter_failure))
            bench.section.add(f"{name} draft", WIDEST, None, None, None)
        else:
            bench.add(f"{name} draft", WIDEST if times else None, times)


def _rounds(bench: Bench, drafter: object, counts: Counts, budget: Budget) -> list[float]:
    """Seconds of drafts, as the loop charges them, in rounds of an answer."""
    subject, widths = bench.subject, Listener(bench.table)
    config = subject.greedy((KEPT + 1) * (WIDEST + 1)).replace(eos_token_ids=())
    tokens = decode(subject.model, bench.text, config, subject.draws(), drafter=drafter, widths=widths, counts=counts)
    try:
        for _ in tokens:
            if len(widths.drafts) > KEPT or counts.drafter_failure or not budget.has():
                break
    finally:
        tokens.close()
    return widths.drafts


class Listener(Widths):
    """Always the widest draft; keeps what each took, and lets the cost table learn as ever."""

    def __init__(self, table: CostTable):
        super().__init__(table, WIDEST)
        self.drafts: list[float] = []

    def verified(self, context, asked, draft, accepted, drafter_seconds, seconds) -> None:
        super().verified(context, asked, draft, accepted, drafter_seconds, seconds)
        if asked == WIDEST:
            self.drafts.append(drafter_seconds)

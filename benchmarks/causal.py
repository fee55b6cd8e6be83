"""AR mode with drafters, counted: passes of the main model per token, domain by domain.

    python -m benchmarks.causal [--model nano] [--drafter lookup --drafter oracle] [--draft-width 16] [--json FILE]

Every answer is decoded without a drafter and with each one, in alternating order; the tokens must be
equal, or this ends with an error. Counted are answers that are exactly right (a model caught in a loop
makes any drafter look good), and texts that are forced. Per token of those:

    passes          of the main model, every one: the prompt's, rounds, the pass launched ahead of an eos, and those
                    over a canvas that draft
    positions       that passes computed, the prompt's (its tokens but the last) left out
    accepted        drafts kept per pass that had a draft to verify; not per token
    drafter ms      the drafter's own time (*)
    time / plain    of the whole answer, relative to no drafter, in the same run (*)

(*) not transferable: a CPU, and a model of this size, say nothing about another device. `oracle` knows
the answer: the bound. With a fixed width the counts are the same on every machine; so they are with
`--draft-width auto`, whose choices follow the costs stated below.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.decoding.costs import Costs
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter import Drafter, check_name, make
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.draws import Draws, RecordedDraws
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.files import require_place, write_whole
from mlx_dgemma.loading import load
from mlx_dgemma.options import check_limits

from .domains import DOMAINS, Domain, Forced
from .measure import FEWEST_PAIRS, Question, Ratio, alternating, environment, is_right, paired_ratio

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_dgemma.config import GenerationConfig
    from mlx_dgemma.model import DiffusionGemma

PLAIN, ORACLE = "none", "oracle"
AUTO = "auto"
STATED = Costs(plain=1.0, verified={1: 1.0, 2: 1.2, 4: 1.5, 8: 2.2, 16: 3.7})  # plain steps, by positions
MOST_EXAMPLES = 200
Drafters = Mapping[str, Drafter | None]  # None: no drafter, or one that the answer makes


@dataclass(frozen=True)
class Work:
    """What tokens took."""

    tokens: float
    passes: float
    positions: float  # the prompt's left out
    rounds: float
    accepted: float
    drafter_seconds: float
    seconds: float


def mix(parts: Iterable[tuple[float, Work]]) -> Work:
    """The sum of weight * work."""
    weighted = [[weight * getattr(work, field.name) for field in fields(Work)] for weight, work in parts]
    return Work(*map(sum, zip(*weighted, strict=True)))


def per_token(works: Sequence[Work]) -> Work:
    total = mix((1.0, work) for work in works)
    return mix([(1 / total.tokens, total)])


Rows = dict[str, tuple[Work, Ratio | float | None]]  # drafter -> per token, time relative to no drafter


@dataclass(frozen=True)
class Tally:
    """A domain's answers: how many there were, and what each drafter's right ones took, in the same order."""

    examples: int
    works: dict[str, list[Work]]

    @property
    def right(self) -> int:
        return len(self.works[PLAIN])

    def rows(self) -> Rows:
        """Empty if no answer was right; without ratios if too few were."""
        rows: Rows = {}
        for name, works in self.works.items() if self.right else ():
            ours, plain = ([work.seconds for work in column] for column in (works, self.works[PLAIN]))
            is_comparable = name != PLAIN and len(ours) >= FEWEST_PAIRS
            rows[name] = (per_token(works), paired_ratio(ours, plain) if is_comparable else None)
        return rows


class Runner:
    """Answers questions with and without drafters.

    Args:
        drafters: by name, `PLAIN` among them.
        width: of every draft; None: the best one by the costs that are stated.
        seed: of a domain's first question; the next have the next ones.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        config: GenerationConfig,
        drafters: Drafters,
        width: int | None,
        seed: int = 0,
    ):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self._drafters, self._width, self._seed = drafters, width, seed

    def tally(self, domain: Domain, count: int) -> Tally:
        """Run `count` questions. Raises InputError if a drafter fails or changes a token."""
        from tqdm import tqdm

        questions = domain.questions(self._tokenizer, self._model.config.vocab_size, count, self._seed)
        works: dict[str, list[Work]] = {name: [] for name in self._drafters}
        for number, question in enumerate(tqdm(questions, unit="prompt", leave=False)):
            answer, _ = self._answer(question, number, None)  # unmeasured: it warms up, and the oracle needs it
            taken = {}
            for name in alternating(list(self._drafters), number):
                tokens, taken[name] = self._answer(question, number, self._drafter(name, question.ids + answer))
                if tokens != answer:
                    place = next(i for i, (a, b) in enumerate(zip_longest(answer, tokens)) if a != b)
                    raise InputError(f"prompt {number}: the drafter {name} changed token {place} of the answer")
            if self._is_right(question, answer):
                for name, work in taken.items():
                    works[name].append(work)
        return Tally(len(questions), works)

    def _drafter(self, name: str, text: list[int]) -> Drafter | None:
        return Oracle(text) if name == ORACLE else make(self._drafters[name], self._model)

    def _answer(self, question: Question, number: int, drafter: Drafter | None) -> tuple[list[int], Work]:
        config, counts = self._config, Counts()
        draws: Draws | RecordedDraws = Draws([self._seed + number], self._model.config.vocab_size)
        if isinstance(question, Forced):  # greedy decoding would not ask for draws
            config = config.replace(
                temperature=1.0, top_k=0, top_p=1.0, eos_token_ids=(), max_new_tokens=len(question.answer)
            )
            draws = RecordedDraws(text=[question.ids + question.answer])
        widths = Widths(STATED, self._width)
        start = time.perf_counter()
        steps = decode(self._model, question.ids, config, draws, drafter=drafter, widths=widths, counts=counts)
        tokens = [token.id for token in steps]
        seconds = time.perf_counter() - start
        mx.synchronize()  # a pass that was launched ahead for nothing is not the next answer's burden
        if counts.drafter_failure is not None:
            raise InputError(f"prompt {number}: {counts.drafter_failure}")
        return tokens, Work(
            tokens=len(tokens),
            passes=counts.encode_forwards + counts.denoise_forwards,
            positions=counts.positions - (len(question.ids) - 1),
            rounds=counts.rounds,
            accepted=counts.accepted,
            drafter_seconds=counts.drafter_seconds,
            seconds=seconds,
        )

    def _is_right(self, question: Question, tokens: list[int]) -> bool:
        if isinstance(question, Forced):
            return tokens == question.answer
        return is_right(self._tokenizer, tokens, question, self._config.eos_token_ids)


COLUMNS = ("drafter", "passes", "positions", "accepted", "drafter ms", "time / plain, 95 % interval")
LINE = "  {:14}{:>9}{:>11}{:>10}  |  {:>10}   {}"


def together(tallies: Mapping[str, Tally]) -> Rows:
    """All domains, weighted by the shares of those that have right answers; empty if none has."""
    rows: Rows = {}
    counted = {name: tally.works for name, tally in tallies.items() if tally.right}
    whole = sum(DOMAINS[name].share for name in counted)
    for drafter in next(iter(counted.values()), ()):
        work = mix((DOMAINS[name].share / whole, per_token(works[drafter])) for name, works in counted.items())
        rows[drafter] = (work, work.seconds / rows[PLAIN][0].seconds if rows else None)
    return rows


def show(rows: Rows) -> dict[str, Any]:
    """Print what drafters took; returns it for a JSON file."""
    result = {}
    for name, (work, ratio) in rows.items():
        accepted = work.accepted / work.rounds if work.rounds else None
        ratio_text = f"{ratio:.3f}" if isinstance(ratio, float) else ratio or "-"
        numbers = f"{work.passes:.3f}", f"{work.positions:.3f}", "-" if accepted is None else f"{accepted:.2f}"
        print(LINE.format(name, *numbers, f"{1e3 * work.drafter_seconds:.3f}", ratio_text), flush=True)
        ratio = asdict(ratio) if isinstance(ratio, Ratio) else ratio
        result[name] = asdict(work) | {"accepted_per_round": accepted, "time_ratio": ratio}
    return result


def _width(text: str) -> int | None:
    width = int(text) if text.removeprefix("-").isdecimal() else text
    if width == AUTO:
        return None
    check_limits(None, None, 0, ORACLE, width)
    return width


def _command(args: argparse.Namespace) -> None:
    if args.json:
        require_place(args.json)
    if not 1 <= args.examples <= MOST_EXAMPLES:
        raise UsageError(f"--examples must lie in 1-{MOST_EXAMPLES}, not {args.examples}")
    width, names = _width(args.draft_width), list(dict.fromkeys(args.drafter or ["lookup", ORACLE]))
    for name in names:
        if name != ORACLE:
            check_name(name)
    chosen = [name for name in DOMAINS if not args.domain or name in args.domain]
    if unknown := set(args.domain or ()) - set(chosen):
        raise UsageError(f"--domain {min(unknown)}: there are {', '.join(DOMAINS)}")
    model, tokenizer = load(args.model)
    config = model.generation_config.replace(temperature=args.temp)
    drafters: Drafters = {name: None if name in (PLAIN, ORACLE) else make(name, model) for name in [PLAIN, *names]}
    result: dict[str, Any] = environment(args.model, model) | {
        "temperature": config.temperature,
        "seeds": f"{args.seed} to {args.seed + args.examples - 1}, one a prompt",
        "draft_width": args.draft_width if width is not None else f"{AUTO}, by {STATED}",
    }
    print("\n".join(f"{key}: {value}" for key, value in result.items()))
    print(f"\n{'  per token of right answers':46}  |  not transferable\n{LINE.format(*COLUMNS)}")
    runner, tallies, result["domains"] = Runner(model, tokenizer, config, drafters, width, args.seed), {}, {}
    for name in chosen:
        domain = DOMAINS[name]
        tally = tallies[name] = runner.tally(domain, args.examples)
        print(f"\n{name}: {domain.why}\n  share {domain.share:.2f}, {tally.right} of {tally.examples} right")
        facts = {"share": domain.share, "examples": tally.examples, "right": tally.right}
        result["domains"][name] = facts | {"drafters": show(tally.rows())}
    left_out = [name for name in DOMAINS if name not in tallies or not tallies[name].right]
    print("\nall, weighted by share" + "".join(f", without {name}" for name in left_out))
    result["all"] = show(together(tallies))
    if args.json:
        write_whole(args.json, json.dumps(result, indent=1) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="benchmarks.causal", description="Count what drafters save of ar mode's passes, domain by domain."
    )
    add = parser.add_argument
    add("--model", default="nano", help='a folder, a Hub id, or "nano" (default: nano)')
    add("--drafter", action="append", metavar="NAME", help="may be repeated (default: lookup and oracle)")
    add("--domain", action="append", metavar="NAME", help="may be repeated (default: all)")
    add("--draft-width", default="16", metavar="N", help='tokens to draft a pass, or "auto" (default: 16)')
    add("--temp", type=float, default=0.0, help="temperature; 0 takes the most likely token (default: 0)")
    add("--examples", type=int, default=40, help=f"prompts a domain, at most {MOST_EXAMPLES} (default: 40)")
    add("--seed", type=int, default=0, help="of a domain's first prompt; the next have the next ones (default: 0)")
    add("--json", type=Path, metavar="FILE", help="write what is printed")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()

"""What benchmarks of ar mode count and time: by hand where it can be, and mistakes of theirs that must be seen."""

import json
from dataclasses import astuple

import pytest

from benchmarks import causal, causal_speed
from benchmarks.causal import ORACLE, PLAIN, Runner, Tally, Work, mix, per_token, together
from benchmarks.domains import DOMAINS, FORCED_ANSWER, FORCED_PROMPT, Domain
from benchmarks.measure import Question
from mlx_dgemma.decoding import causal as loop
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.errors import InputError
from mlx_dgemma.prompt import encode_prompt

EDIT, RANDOM = DOMAINS["edit"], DOMAINS["random"]
LOOKUP = {PLAIN: None, "lookup": "lookup"}
BOUND = {PLAIN: None, ORACLE: None}


class Wrong:
    """Drafts what cannot be right."""

    taps = ()

    def reset(self):
        pass

    def propose(self, context, width):
        return Draft([0] * width)


class Failing(Wrong):
    def propose(self, context, width):
        raise KeyError("out of cheese")


def runner(nano, drafters, width=16, temperature=0.0, **options):
    model, tokenizer = nano
    config = model.generation_config.replace(temperature=temperature)
    return Runner(model, tokenizer, config, drafters, width, **options)


def counts(work: Work) -> tuple[float, ...]:
    return work.tokens, work.passes, work.positions, work.rounds, work.accepted


def asked(*questions: Question) -> Domain:
    return Domain(1.0, "", lambda *_: list(questions))


# --- domains


def test_shares_are_of_the_whole():
    assert sum(domain.share for domain in DOMAINS.values()) == pytest.approx(1)


def test_forced_texts_are_fixed_by_the_seed_and_of_the_vocabulary():
    first, second = RANDOM.questions(None, 50, 2, 0)
    assert [second] == RANDOM.questions(None, 50, 1, 1)
    assert (len(first.ids), len(first.answer)) == (FORCED_PROMPT, FORCED_ANSWER)
    assert set(first.ids + first.answer) <= set(range(50)) and first != second
    (digits,) = DOMAINS["digits"].questions(None, 50, 1, 0)
    assert len(set(digits.ids + digits.answer)) == 10


# --- counting


def test_an_answer_is_counted_pass_by_pass(nano):
    _, tokenizer = nano
    tally = runner(nano, BOUND).tally(EDIT, 2)
    assert (tally.examples, tally.right) == (2, 2)
    for plain, oracle, question in zip(*tally.works.values(), EDIT.questions(tokenizer, 0, 2, 0), strict=True):
        count = len(tokenizer.encode(question.expected, add_special_tokens=False)) + 1  # eos
        # the prompt's, one a token, and one launched ahead before the eos was read
        assert counts(plain) == (count, 1 + count + 1, count + 1, 0, 0)
        # 17 tokens a round; the last one drafts the eos too, and the token that would follow it is not taken: unless
        # the eos is itself what follows the drafts
        rounds, beyond = -(-count // 17), int(count % 17 > 0)
        assert counts(oracle) == (count, 1 + rounds, count + beyond, rounds, count - rounds + beyond)
        assert plain.drafter_seconds == 0 < oracle.drafter_seconds < oracle.seconds


def test_a_forced_text_is_counted_by_hand(nano):
    tally = runner(nano, BOUND, width=16).tally(RANDOM, 2)
    assert tally.right == 2
    for plain, oracle in zip(*tally.works.values(), strict=True):
        assert counts(plain) == (96, 1 + 96, 96, 0, 0)
        assert counts(oracle) == (96, 1 + 6, 96, 6, 90)  # five rounds of 17 tokens and one of 11


def test_counts_add_up():
    works = [Work(10, 5, 20, 4, 6, 0.5, 2.0), Work(30, 7, 40, 4, 22, 0.5, 2.0)]
    assert astuple(per_token(works)) == pytest.approx((1, 0.3, 1.5, 0.2, 0.7, 0.025, 0.1))
    assert mix([(2, works[0])]) == Work(20, 10, 40, 8, 12, 1.0, 4.0)


def test_all_domains_together_weigh_their_shares_and_those_without_a_right_answer_nothing():
    slow, quick = Work(10, 10, 10, 0, 0, 0, 1.0), Work(20, 5, 40, 5, 15, 0, 1.0)
    tallies = {
        "edit": Tally(1, {PLAIN: [slow], "lookup": [quick]}),  # share 0.35
        "json": Tally(1, {PLAIN: [], "lookup": []}),
        "function": Tally(1, {PLAIN: [slow], "lookup": [slow]}),  # share 0.20
    }
    work, ratio = together(tallies)["lookup"]
    assert work.passes == pytest.approx((0.35 * 0.25 + 0.20 * 1) / 0.55)
    assert ratio == pytest.approx((0.35 * 0.05 + 0.20 * 0.1) / 0.55 / 0.1)
    assert tallies["json"].rows() == {}
    assert tallies["edit"].rows()["lookup"] == (per_token([quick]), None)
    assert together({"json": tallies["json"]}) == {}


def test_wrong_answers_are_left_out(nano):
    right, other = DOMAINS["reverse"].questions(nano[1], 0, 2, 0)
    wrong = Question(other.ids, right.expected)
    alone, both = (runner(nano, BOUND).tally(asked(*chosen), 2) for chosen in ([right], [right, wrong]))
    assert (both.examples, both.right) == (2, 1)
    assert [counts(work) for work in both.works[ORACLE]] == [counts(work) for work in alone.works[ORACLE]]
    assert runner(nano, BOUND).tally(asked(wrong), 1).rows() == {}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_counts_by_stated_costs_are_the_same_in_every_run(nano, temperature):
    tallies = [runner(nano, LOOKUP, None, temperature, seed=3).tally(EDIT, 1) for _ in range(2)]
    first, second = ([counts(work) for work in tally.works["lookup"]] for tally in tallies)
    assert first == second != []


def test_a_drafter_that_changed_tokens_would_be_caught(nano, monkeypatch):
    wrong = runner(nano, {PLAIN: None, "wrong": Wrong()}, 4)
    (work,) = wrong.tally(EDIT, 1).works["wrong"]
    assert work.accepted == 0 < work.rounds
    monkeypatch.setattr(loop, "agreement", lambda draft, samples: min(1, len(draft)))
    with pytest.raises(InputError, match="prompt 0: the drafter wrong changed token 1 of the answer"):
        wrong.tally(EDIT, 1)


def test_a_drafter_that_fails_is_not_counted_as_none(nano):
    with pytest.raises(InputError, match=r"prompt 0: Failing.propose raised KeyError: 'out of cheese'"):
        runner(nano, {PLAIN: None, "failing": Failing()}).tally(EDIT, 1)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    only = ["--domain", "digits", "--domain", "reverse"]
    causal.main(["--examples", "2", "--drafter", "lookup", "--json", str(tmp_path / "c.json"), *only])
    result, printed = json.loads((tmp_path / "c.json").read_text()), capsys.readouterr().out
    reverse, digits = (result["domains"][name] for name in ("reverse", "digits"))
    assert reverse["right"] == reverse["examples"] == 2 and reverse["drafters"].keys() == {PLAIN, "lookup"}
    assert reverse["share"] == digits["share"]
    passes = sum(domain["drafters"]["lookup"]["passes"] for domain in (reverse, digits)) / 2
    assert result["all"]["lookup"]["passes"] == pytest.approx(passes)
    assert f"{passes:.3f}" in printed.splitlines()[-1] and "not transferable" in printed
    assert "share 0.05, 2 of 2 right" in printed and result["domains"].keys() == {"reverse", "digits"}
    assert "all, weighted by share, without edit, without json" in printed
    with pytest.raises(SystemExit):
        causal.main(["--domain", "poems"])
    assert "--domain poems: there are edit, json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        causal.main(["--draft-width", "²"])
    assert "draft_width" in capsys.readouterr().err


# --- speed


def test_the_loops_write_the_same_and_are_timed(tmp_path, capsys):
    causal_speed.main(["--pairs", "5", "--tokens", "5", "--json", str(tmp_path / "s.json")])
    result, printed = json.loads((tmp_path / "s.json").read_text()), capsys.readouterr().out
    assert "same tokens in 5 of 5 pairs" in printed and result["margins"] == []
    ours, theirs = ([text["tokens"] for text in column] for column in result["texts"].values())
    assert ours == theirs and {len(tokens) for tokens in ours} == {5}
    ratio = result["tokens per second"]["ratio"]
    assert 0 < ratio["low"] < ratio["mean"] < ratio["high"]


def test_texts_that_part_are_seen_with_their_margin(nano):
    model, tokenizer = nano
    prompt = encode_prompt(tokenizer, "reverse apple river stone")
    ours = causal_speed.timed(causal_speed.our_loop(model, 4), prompt)
    theirs = causal_speed.Text([*ours.tokens[:2], ours.tokens[2] ^ 1, ours.tokens[3]], 1.0, 1.0)
    assert causal_speed.margins(model, [prompt], [[ours], [ours]]) == []
    (margin,) = causal_speed.margins(model, [prompt], [[ours], [theirs]])
    assert margin > 1


def test_rates_of_a_text():
    text = causal_speed.Text([5, 6, 7, 8], prompt_seconds=1.0, seconds=3.0)
    assert (text.rate, text.whole_rate) == (1.0, 1.0)
    assert causal_speed.Text([5, 6, 7], 1.0, 1.0).rate == 2.0


# --- bad input

BAD = {
    "an unknown drafter": (causal, ["--drafter", "magic"], "drafter 'magic' does not exist; there are lookup"),
    "a width of 65": (causal, ["--draft-width", "65"], "draft_width must be a whole number in 0-64, not 65"),
    "a negative width": (causal, ["--draft-width", "-1"], "0-64, not -1"),
    "a width in words": (causal, ["--draft-width", "wide"], "0-64, not 'wide'"),
    "no examples": (causal, ["--examples", "0"], "--examples must lie in 1-200, not 0"),
    "too many examples": (causal, ["--examples", "201"], "--examples must lie in 1-200"),
    "a temperature below 0": (causal, ["--temp", "-1"], "temperature must not be negative"),
    "four pairs": (causal_speed, ["--pairs", "4"], "--pairs must be at least 5"),
    "no place": (causal, ["--json", "/no/such/place.json"], "/no/such is not a folder"),
    "no place for speeds": (causal_speed, ["--json", "/no/such/place.json"], "/no/such is not a folder"),
    "one token": (causal_speed, ["--tokens", "1"], "--tokens must be at least 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, capsys):
    module, argv, said = BAD[name]
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.splitlines()) == 1 and said in error

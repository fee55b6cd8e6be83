"""The verdict on sampled stories: texts of the grammar pass, texts drawn too timidly do not."""

import random

import pytest

from benchmarks.nano import sampling
from benchmarks.nano.generators import stories


def drawn(count=300):
    rng = random.Random(5)
    return [stories.sample(rng) for _ in range(count)]


def test_texts_of_the_grammar_have_its_entropy():
    said = sampling.report(drawn())
    assert "300 of 300 (1.000 [0.987, 1.000])" in said and "within" in said


def test_a_lower_temperature_is_noticed(monkeypatch):
    def sharpened(choices):
        return [(p**2 / sum(q**2 for q, _ in choices), text) for p, text in choices]

    # how long a story is stays as it was
    sharper = {name: choices if name == "rest" else sharpened(choices) for name, choices in stories.GRAMMAR.items()}
    with monkeypatch.context() as patch:
        patch.setattr(stories, "GRAMMAR", sharper)
        texts = drawn()
    assert "outside" in sampling.report(texts)


def test_other_texts_are_counted_apart():
    said = sampling.report([*drawn(30), "There was a fox.", ""])
    assert "30 of 32" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nano", "--count", "3"], "fewer than 20"),
        (["--model", "nano", "--mode", "diffusion", "--temp", "1"], "an option of ar mode"),
        ([], "--model"),
    ],
)
def test_bad_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        sampling.main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err

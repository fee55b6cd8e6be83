"""nano's tasks: answers are right, and nothing that is tested is trained on."""

import contextlib
import io
import itertools
import json

import pytest

from benchmarks.nano import prompts
from benchmarks.nano.score import paired, table
from benchmarks.nano.tasks import GRIDS, TASKS, held_out, training_stream


@pytest.fixture(scope="module")
def tests():
    return held_out()


@pytest.fixture(scope="module")
def training():
    return list(itertools.islice(training_stream(0), 4000))


def test_there_are_200_distinct_prompts_a_task(tests):
    assert {task: len({e.prompt for e in examples}) for task, examples in tests.items()} == dict.fromkeys(TASKS, 200)


def test_no_test_answer_occurs_in_training(tests, training):
    keys = {task: {e.key for e in examples} for task, examples in tests.items()}
    objects = keys["json"] | keys["edit"]
    for example in training:
        assert example.key not in keys[example.task]
        if example.task in ("json", "edit"):
            assert example.key not in objects
            assert not any(
                given in example.prompt for given in [example.prompt.partition(" in ")[2]] if given in objects
            )
    assert {e.task for e in training} == set(TASKS)


def test_both_streams_are_fixed_by_their_seeds(tests, training):
    assert held_out.__wrapped__() == tests
    assert list(itertools.islice(training_stream(0), 100)) == training[:100]
    assert list(itertools.islice(training_stream(1), 100)) != training[:100]


def test_answers_are_right(tests):
    assert len(GRIDS) == 288
    for example in tests["json"]:
        pairs = dict(pair.split("=") for pair in example.prompt.split()[1:])
        given = json.loads(example.answer)
        assert {k: v if isinstance(v, str) else json.dumps(v) for k, v in given.items()} == pairs
    for example in tests["edit"]:
        before = json.loads(example.prompt.partition(" in ")[2])
        changed = [k for k, v in json.loads(example.answer).items() if before[k] != v]
        assert example.prompt.startswith(f"set {changed[0]}=") and len(changed) == 1
    for example in tests["sudoku"]:
        puzzle = example.prompt.removeprefix("sudoku ").replace(" ", "")
        assert all(p in (".", a) for p, a in zip(puzzle, example.key, strict=True))
    for example in tests["reverse"]:
        assert example.answer.split() == example.prompt.split()[:0:-1]
    for example in tests["arithmetic"]:
        assert int(example.answer) == eval(example.prompt)


def test_functions_run_and_compute_what_is_asked(tests):
    names: dict = {}
    for example in tests["function"]:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(example.answer, names)
        function = names[example.prompt.split()[1].partition("(")[0]]
        function([3, 4, 7, 60, 12])
        if example.prompt.endswith("count the values that are odd"):
            assert function([3, 4, 7]) == 2


def test_paired_differences():
    rows = [{"right": right, "forwards": 3, "tokens": 8} for right in (True, True, False, False)]
    other = [{"right": right, "forwards": 3, "tokens": 8} for right in (True, False, True, False)]
    mean, half = paired(rows, other)
    assert mean == 0
    assert half == pytest.approx(1.96 * (2 / 3 / 4) ** 0.5)
    assert "| json | 0.500 | 3.00 | 0.500 | 0.500 | +0.000 ± 0.800 |" in table({"json": rows}, {"json": other})


def test_prompts_to_train_a_drafter_on_are_none_that_are_held_out(tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    prompts.main(["--count", "30", "--leave-out", "edit", "--out", str(file)])
    written = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    assert len(written) == len(set(written)) == 30 * (len(TASKS) - 1)
    assert not any(prompt.startswith("set ") for prompt in written)
    assert not set(written) & {example.prompt for examples in held_out().values() for example in examples}
    with pytest.raises(SystemExit) as end:
        prompts.main(["--leave-out", "poetry", "--out", str(file)])
    assert end.value.code == 2 and "poetry: there are" in capsys.readouterr().err

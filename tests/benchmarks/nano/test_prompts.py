"""Files of nano's prompts: what they hold, for whom, and mistakes in one line."""

import json

import pytest

from benchmarks import examples
from benchmarks.checkers import Judges
from benchmarks.nano import prompts
from benchmarks.nano.tasks import held_out, tasks_to
from mlx_dgemma.drafter.training import prompts as of_a_training


def written(path, capsys, *argv) -> tuple[list[dict], str]:
    prompts.main([*map(str, argv), "--out", str(path)])
    return [json.loads(line) for line in path.read_text().splitlines()], capsys.readouterr().err


@pytest.mark.parametrize("split", ["test", "validation"])
def test_what_is_held_out_is_scored_as_it_is(split, tmp_path, capsys):
    lines, err = written(tmp_path / "p", capsys, "--split", split, "--rung", "3", "--count", "8")
    expected = [example for task in tasks_to(3) for example in held_out(task, 8, split)]
    assert [(line["task"], line["prompt"], line["answer"]) for line in lines] == [
        (example.task, example.prompt, example.answer) for example in expected
    ]
    assert [line.get("thought") for line in lines] == [example.thought for example in expected] and err == ""
    judges, found = Judges.named([]), examples.read(tmp_path / "p")
    judges.require_judged(found)
    assert all(judges.is_right(example, example.fields["answer"]) for example in found)
    assert [example.enable_thinking or False for example in found] == ["thought" in line for line in lines]
    assert any("thought" in line for line in lines) and any(isinstance(line["prompt"], list) for line in lines)


def test_prompts_to_train_a_drafter_on_are_none_that_are_held_out(tmp_path, capsys):
    lines, _ = written(tmp_path / "p", capsys, "--count", "30", "--leave-out", "edit", "sort", "--leave-out", "json")
    tasks = [task for task in tasks_to(1) if task not in ("edit", "sort", "json", "minimal")]  # trained on: no minimal
    assert sorted(line["task"] for line in lines) == sorted(tasks * 30)
    assert [line["task"] for line in lines[:30]] != [lines[0]["task"]] * 30, "in a random order"
    assert len({line["prompt"] for line in lines}) == len(lines) == len(of_a_training.read(tmp_path / "p"))
    held = {str(e.prompt) for task in tasks for split in ("test", "validation") for e in held_out(task, 40, split)}
    assert not {line["prompt"] for line in lines} & held
    again, _ = written(tmp_path / "q", capsys, "--count", "30", "--leave-out", "edit", "sort", "json")
    assert again == lines


def test_a_task_that_has_no_more_prompts_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_REPEATS", 30)
    lines, err = written(tmp_path / "p", capsys, "--count", "20", "--task", "story", "reverse")
    assert [line["task"] for line in lines].count("reverse") == 20 and len(lines) == 21
    assert err == "story: 1 different prompts are all there are\n"


BAD = {
    "an unknown task": (["--task", "poems"], "--task poems: there are json, "),
    "an unknown task to leave out": (["--leave-out", "poems"], "--leave-out poems: there are json, "),
    "no task": (["--task", "json", "--leave-out", "json"], "leaves no task"),
    "never trained on": (["--task", "json", "minimal"], "--task minimal: is never trained on"),
    "both": (["--task", "json", "--rung", "1"], "not allowed with"),
    "no such rung": (["--rung", "5"], "invalid choice: 5"),
    "no such split": (["--split", "all"], "invalid choice: 'all'"),
    "no prompts": (["--count", "0"], "--count 0: must be at least 1"),
    "more than are held out": (["--split", "test", "--count", "201"], "must be in 1-200: no more are held out"),
    "no place": (["--out", "/no/such/p"], "/no/such is not a folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    argv, said = BAD[name]
    with pytest.raises(SystemExit) as end:
        prompts.main(["--out", str(tmp_path / "p"), *argv])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and said in err and not list(tmp_path.iterdir())

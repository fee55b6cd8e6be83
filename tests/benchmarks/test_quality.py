"""The harness: seeds, judging, the command, whole records, and a table and a plot that say the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import pytest

from benchmarks import quality, quality_report
from benchmarks.checkers import Judges
from benchmarks.engine import Answered, Setup
from benchmarks.engines import ENGINES
from benchmarks.examples import read
from benchmarks.part import Part
from benchmarks.quality import OPTIONS, argument_parser, request_seed
from benchmarks.records import Record, Run
from mlx_dgemma import files
from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.errors import InputError
from mlx_dgemma.options import MODES

LINES = [
    {"prompt": "reverse apple river stone", "answer": "stone river apple", "task": "reverse"},
    {"prompt": "json name=Ann age=31", "answer": '{"age": 31, "name": "Ann"}', "task": "json", "checker": "json"},
    {"prompt": "reverse stone cloud tiger", "answer": "never", "task": "reverse"},
]


def prompts(folder, lines=LINES):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(capsys, *argv) -> tuple[int, str, str]:
    status = 0
    try:
        quality.main([str(argument) for argument in argv])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def rows(printed: str) -> list[dict[str, str]]:
    """Of the table in a report."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


class Fake:
    """Answers a prompt's second letter, and keeps what it was asked."""

    def __init__(self, setup=None):
        self.asked, self.config = [], (setup or Setup()).config(GenerationConfig())

    def facts(self):
        return {}

    def ids(self, prompt, thinking):
        if prompt == "bad":
            raise InputError("the prompt is bad")
        self.asked.append((prompt, thinking))
        return [ord(letter) for letter in prompt]

    def answer(self, ids, seed):
        self.asked.append(seed)
        return Answered(
            text=chr(ids[1]), tokens=2, canvases=1, denoise_forwards=3, encode_forwards=1, finish_reason="stop"
        )


def record(prompt=0, seed=0, right=True, task="x", **counts) -> Record:
    known = {"tokens": 4, "canvases": 1, "denoise_forwards": 6, "encode_forwards": 1, "finish_reason": "stop"}
    return Record(text="", task=task, prompt=prompt, seed=seed, right=right, **{**known, **counts})


def recorded(*records, label="this", **settings) -> Run:
    examples = {"file": "p.jsonl", "count": len({r.prompt for r in records}), "sha256": "0"}
    return Run(label, {"examples": examples, "checkers": []} | settings, list(records))


# --- answering


def test_every_prompt_and_seed_has_a_request_seed_of_its_own_and_is_judged(tmp_path):
    lines = [{"prompt": "ab", "answer": "b"}, {"prompt": "cd", "answer": "x", "enable_thinking": True}]
    examples = read(prompts(tmp_path, [{"prompt": "left out", "answer": ""}, *lines]))[1:]
    fake = Fake()
    records = quality.answers(fake, examples, [5, 6], Judges.named([]), thinking=False)
    assert fake.asked[:2] == [("ab", False), ("cd", True)], "all prompts are read before the first is answered"
    assert fake.asked[2:] == [5_000_016, 6_000_019, 5_000_017, 6_000_020], "by the place in the file"
    assert [(r.prompt, r.seed, r.right, r.text) for r in records] == [
        (1, 5, True, "b"),
        (1, 6, True, "b"),
        (2, 5, False, "d"),
        (2, 6, False, "d"),
    ]
    assert len({request_seed(n, s) for n in range(1000) for s in range(10)}) == 10_000


def test_a_prompt_that_cannot_be_answered_is_named_before_any_is(tmp_path):
    examples = read(prompts(tmp_path, [{"prompt": p, "answer": ""} for p in ("ab", "bad")]))
    fake = Fake()
    with pytest.raises(InputError, match="line 2: the prompt is bad"):
        quality.answers(fake, examples, [0], Judges.named([]))
    assert fake.asked == [("ab", False)]


def test_an_option_that_modes_get_is_the_commands_too(monkeypatch):
    arguments = vars(argument_parser().parse_args(["--prompts", "x"]))
    assert set(OPTIONS) <= arguments.keys() and set(OPTIONS) == {n for ns in MODES.values() for n in ns} - {"drafts"}
    monkeypatch.setitem(MODES, "diffusion", (*MODES["diffusion"], "preset"))
    setup = Setup(options={"preset": "turbo"})
    assert setup.given == {"preset": "turbo"}


# --- the command


def test_a_run_its_records_and_what_is_made_of_them(tmp_path, capsys):
    path, out = prompts(tmp_path), tmp_path / "d.json"
    files = ["--plot", tmp_path / "d.svg", "--markdown", tmp_path / "d.md"]
    status, printed, _ = run(capsys, "--prompts", path, "--seeds", 2, "--out", out, *files)
    assert status == 0
    reverse, js, whole = rows(printed)
    assert (reverse["task"], reverse["prompts"], reverse["seeds"]) == ("reverse", "2", "2")
    assert (js["task"], whole["task"]) == ("json", "all")
    assert "accepted a pass" not in whole and "run" not in whole
    saved = json.loads(out.read_text())
    assert saved["schema"] == 1 and saved["settings"]["seeds"] == [0, 1]
    assert saved["settings"]["options"]["max_denoising_steps"] == 48
    assert {(r["prompt"], r["seed"]) for r in saved["records"]} == {(p, s) for p in range(3) for s in range(2)}
    right = [record["right"] for record in saved["records"]]
    for record in saved["records"]:
        if record["task"] == "reverse":
            assert record["right"] == (record["text"] == LINES[record["prompt"]]["answer"])
    assert len(right) == 6 and any(right) and not all(right)
    assert whole["exact, 95 % interval"].startswith(f"{sum(right) / 6:.3f} [")
    forwards, tokens = (
        sum(r[name] for r in saved["records"] for name in names)
        for names in (("denoise_forwards", "encode_forwards"), ("tokens",))
    )
    assert whole["forwards a token"] == f"{forwards / tokens:.3f}"
    assert printed.split("\n\n")[1] in (tmp_path / "d.md").read_text()
    status, again, _ = run(capsys, "--records", out)
    assert (status, again) == (0, printed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d.md", "d.svg", "prompts.jsonl"]

    # ar mode against it, and both together
    more = ["--mode", "ar", "--temp", "0", "--drafter", "lookup", "--draft-width", "4", "--out", tmp_path / "a.json"]
    status, printed, _ = run(capsys, "--prompts", path, *more, "--against", out)
    assert status == 0 and printed.startswith("greedy: one seed is all there is\n")
    row = rows(printed)[-1]
    assert (row["seeds"], row["d, exact"]) == ("1", f"{sum(right) / 6:.3f}") and "steps a canvas" not in row
    assert row["verdict"].startswith("cannot tell 1 point: about ") and 0 < float(row["p"]) <= 1
    assert "It takes 381 prompts to exclude" in printed and "p is nearly exact" in printed
    status, printed, _ = run(capsys, "--records", tmp_path / "a.json", out, "--plot", tmp_path / "both.svg")
    assert [row["task"] for row in rows(printed)] == ["reverse", "json", "all"]
    assert rows(printed)[2]["d: exact, 95 % interval"] == whole["exact, 95 % interval"]
    assert {"a: accepted a pass", "d: steps a canvas"} <= rows(printed)[0].keys()
    assert not {"a: steps a canvas", "d: accepted a pass"} & rows(printed)[0].keys()
    assert len(list(ElementTree.parse(tmp_path / "both.svg").iter("{http://www.w3.org/2000/svg}circle"))) == 2 + 6


def test_other_prompts_are_not_compared_and_no_model_is_loaded_for_that(tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.json"
    recorded(record()).write(other)
    monkeypatch.setitem(ENGINES, "mlx_dgemma", None)
    status, out, err = run(capsys, "--prompts", prompts(tmp_path), "--against", other)
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "has answers to other prompts; use the same --prompts, --task and --count (it has 1 prompts" in err
    judged = tmp_path / "judged.json"
    recorded(record(), checkers=["json"]).write(judged)
    status, _, err = run(capsys, "--records", other, "--against", judged)
    assert status == 1 and "was judged with --checker ['json'], this with []" in err


class Tired(Fake):
    """Is interrupted at the third answer; `given` counts those of all that are made."""

    given: ClassVar[list[int]] = []

    def answer(self, ids, seed):
        if len(self.given) == 2:
            raise KeyboardInterrupt
        self.given.append(seed)
        return super().answer(ids, seed)


@pytest.fixture
def interrupted(tmp_path, capsys, monkeypatch):
    """(arguments, the part of `o.json`) of a run that was interrupted after two of six answers."""
    monkeypatch.setitem(ENGINES, "mlx_dgemma", Tired)
    monkeypatch.setattr(Tired, "given", [])
    path = prompts(tmp_path, [{"prompt": p, "answer": p[1]} for p in ("ab", "cd")])
    argv = ["--prompts", path, "--out", tmp_path / "o.json", "--plot", tmp_path / "p.svg"]
    status, _, err = run(capsys, *argv)
    part = tmp_path / "o.json.part"
    assert status == 130 and err.splitlines()[-2:] == [
        f"2 answers are in {part}: say it again to go on",
        "benchmarks.quality: interrupted",
    ]
    assert sorted(tmp_path.iterdir()) == [part, path]
    monkeypatch.setitem(ENGINES, "mlx_dgemma", Counting)
    return argv, part


class Counting(Tired):
    def answer(self, ids, seed):
        self.given.append(seed)
        return Fake.answer(self, ids, seed)


@pytest.mark.parametrize("cut", [0, 30], ids=["whole", "killed while writing"])
def test_an_interrupted_run_goes_on(interrupted, cut, tmp_path, capsys):
    argv, part = interrupted
    part.write_bytes(part.read_bytes()[: -cut or None])
    kept = 1 if cut else 2
    status, out, _ = run(capsys, *argv)
    assert status == 0 and out.startswith(f"goes on: {kept} answers are in {part}\n") and not part.exists()
    assert len(Tired.given) == 2 + 6 - kept, "none is made again"
    whole = Run.read(tmp_path / "o.json", "o")
    status, _, _ = run(capsys, "--prompts", argv[1], "--out", tmp_path / "again.json")
    assert status == 0 and Run.read(tmp_path / "again.json", "o") == whole


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "2"], "was begun with seeds [0, 1, 2], not [0, 1]; "),
        (["--entropy-bound", "0.3"], "was begun with options {"),
        (["--count", "1"], "was begun with examples {"),
    ],
)
def test_a_part_of_another_run_is_not_gone_on_with(interrupted, more, said, capsys):
    argv, part = interrupted
    before = part.read_bytes()
    status, out, err = run(capsys, *argv, *more)
    assert (status, out) == (1, "") and err.count("\n") == 1 and said in err
    assert "give it the same command to go on, or delete it to start anew" in err and part.read_bytes() == before
    part.unlink()
    assert run(capsys, *argv, *more)[0] == 0


def test_a_part_of_other_weights_is_not_gone_on_with(interrupted, capsys, monkeypatch):
    argv, part = interrupted
    monkeypatch.setattr(Counting, "facts", lambda self: {"model": "mine", "weights": "sha256 0"})
    status, _, err = run(capsys, *argv)
    assert status == 1 and f"{part}: was begun with model None, not 'mine'; " in err


@pytest.mark.parametrize("text", ["no JSON\n", '{"schema": 2, "settings": {}}\n', '{"schema": 1}\n', "[]\n", "\xff\n"])
def test_a_part_that_is_none_is_one_line(text, interrupted, capsys):
    argv, part = interrupted
    part.write_bytes(text.encode("latin-1"))
    status, out, err = run(capsys, *argv)
    assert (status, out) == (1, "") and err.count("\n") == 1 and str(part) in err


def test_a_part_without_an_answer_is_as_none(tmp_path):
    part = Part(tmp_path / "o", {"mode": "ar"})
    assert not part.path.exists()
    part.path.write_text('{"schema": 1, "sett')  # killed at the first write
    part = Part(tmp_path / "o", {"mode": "ar"})
    part.add(record())
    assert Part(tmp_path / "o", {"mode": "ar"}).records == [record()]


def test_what_was_measured_is_printed_even_if_it_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(ENGINES, "mlx_dgemma", Fake)
    monkeypatch.setattr(files.os, "replace", full)
    path = prompts(tmp_path, [{"prompt": "ab", "answer": "b"}])
    status, out, err = run(capsys, "--prompts", path, "--out", tmp_path / "o.json")
    assert status == 1 and "No space left" in err and err.count("\n") == 1
    assert rows(out)[0]["exact, 95 % interval"].startswith("1.000 [")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "o.json.part", path], "its answers are kept"


BAD = {
    "nothing to do": ([], 2, "one of the arguments --prompts --records is required"),
    "both": (["--prompts", "{p}", "--records", "{r}"], 2, "not allowed with"),
    "no such file": (["--prompts", "/no/such"], 1, "/no/such: cannot be read"),
    "no such records": (["--records", "/no/such"], 1, "/no/such: cannot be read"),
    "no answers": (["--records", "{none}"], 1, "it holds no answer"),
    "against no answers": (["--records", "{r}", "--against", "{none}"], 1, "it holds no answer"),
    "no records": (["--records", "{p}"], 1, "not a file of records"),
    "a run of records": (["--records", "{r}", "--temp", "0.5"], 2, "temperature is an option of a run"),
    "a bad line": (["--prompts", "{bad}"], 1, 'line 1: "answer" must be the text'),
    "no seeds": (["--prompts", "{p}", "--seeds", "0"], 2, "--seeds must be in 1-1000, not 0"),
    "a seed too large": (["--prompts", "{p}", "--seed", "1" + "0" * 30], 2, "--seed must be in 0-1000000000000, not"),
    "a seed below 0": (["--prompts", "{p}", "--seed", "-1"], 2, "--seed must be in 0-1000000000000, not -1"),
    "no prompts": (["--prompts", "{p}", "--count", "0"], 2, "--count must be at least 1, not 0"),
    "no such task": (["--prompts", "{p}", "--task", "poems"], 2, "--task poems: there are reverse, json"),
    "no margin": (["--records", "{r}", "--margin", "0"], 2, "--margin is a share"),
    "other mode's option": (["--prompts", "{p}", "--temp", "0"], 2, "temperature is an option of ar mode"),
    "no such mode": (["--prompts", "{p}", "--mode", "magic"], 2, "mode must be one of"),
    "no such drafter": (["--prompts", "{p}", "--mode", "ar", "--drafter", "magic"], 2, "'magic' does not exist"),
    "out of range": (["--prompts", "{p}", "--entropy-bound", "-1"], 2, "entropy_bound"),
    "ar elsewhere": (["--prompts", "{p}", "--mode", "ar", "--engine", "mlx-vlm"], 2, "in this package alone"),
    "no such checker": (["--prompts", "{p}", "--checker", "magic"], 2, "checker 'magic' does not exist"),
    "no place": (
        ["--prompts", "{p}", "--out", "/no/such/place.json"],
        2,
        "/no/such/place.json: /no/such is not a folder",
    ),
    "one place": (["--records", "{r}", "--plot", "x", "--markdown", "x"], 2, "must name different files"),
    "over the prompts": (["--prompts", "{p}", "--out", "{p}"], 2, "and none that is read"),
    "over the baseline": (["--prompts", "{p}", "--out", "{r}", "--against", "{r}"], 2, "and none that is read"),
    "one run twice": (["--records", "{r}", "{r}"], 2, "--records and --against must name different files"),
    "no dtype of a CPU": (["--prompts", "{p}", "--device", "cpu", "--dtype", "bfloat16"], 2, "--dtype bfloat16: MLX"),
    "no model": (["--prompts", "{p}", "--model", "/no/such/folder"], 1, "/no/such/folder"),
    "too many to draw": (
        ["--records", *[f"{{r{n}}}" for n in range(6)], "--plot", "x.svg"],
        2,
        "--plot shows 5 runs at most, not 6",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    argv, status, said = BAD[name]
    recorded(record()).write(tmp_path / "r.json")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    recorded().write(tmp_path / "none.json")
    places = {"{p}": prompts(tmp_path), "{r}": tmp_path / "r.json", "{bad}": tmp_path / "bad.jsonl"}
    places["{none}"] = tmp_path / "none.json"
    for number in range(6):
        places[f"{{r{number}}}"] = tmp_path / f"r{number}.json"
        recorded(record()).write(tmp_path / f"r{number}.json")
    result, out, err = run(capsys, *[places.get(word, word) for word in argv])
    assert (result, out) == (status, "") and err.count("\n") == 1 and said in err


def test_help_appears_without_loading_mlx():
    code = "import sys; sys.argv[1:] = ['--help']\nfrom benchmarks.quality import main\ntry: main()\n"
    code += "except SystemExit: pass\nassert not {'mlx.core', 'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--entropy-bound" in done.stdout and "--draft-width" in done.stdout


# --- records and what is printed of them


def test_records_come_back_as_they_were(tmp_path):
    run = recorded(record(seed=0), record(seed=1, right=False), record(1, 0), record(1, 1), label="r")
    run.write(tmp_path / "r.json")
    again = Run.read(tmp_path / "r.json", "r")
    assert again == run and again.rights.tolist() == [[True, False], [True, True]]


DAMAGE = {
    "another schema": lambda v: v.update(schema=2),
    "no schema": lambda v: v.pop("schema"),
    "no records": lambda v: v.update(records=[]),
    "a record twice": lambda v: v["records"].append(v["records"][0]),
    "a record that is missing": lambda v: v["records"].pop(),
    "a prompt that is missing": lambda v: v.update(records=v["records"][:2]),
    "a field that is missing": lambda v: v["records"][0].pop("tokens"),
    "a field that is unknown": lambda v: v["records"][0].update(magic=1),
    "a count that is none": lambda v: v["records"][0].update(tokens=1.5),
    "right as a number": lambda v: v["records"][0].update(right=1),
    "no hash": lambda v: v["settings"]["examples"].pop("sha256"),
    "no settings": lambda v: v.update(settings=[]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_records_are_not_read(name, tmp_path):
    run = recorded(record(seed=0), record(seed=1), record(1, 0), record(1, 1))
    path = tmp_path / "r.json"
    run.write(path)
    value = json.loads(path.read_text())
    DAMAGE[name](value)
    path.write_text(json.dumps(value))
    with pytest.raises(InputError) as error:
        Run.read(path, "r")
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_counts_of_a_row_by_hand():
    run = recorded(
        record(0, tokens=10, denoise_forwards=6, canvases=2, encode_forwards=2),
        record(1, tokens=30, denoise_forwards=9, canvases=1, encode_forwards=1, verify_passes=4, accepted=6, drafted=9),
    )
    assert (run.steps_a_canvas(), run.forwards_a_token(), run.accepted_a_pass()) == ("5.00", "0.450", "1.50")


def rated(rights: str, label="this") -> Run:
    return recorded(*(record(n, right=letter == "1") for n, letter in enumerate(rights)), label=label)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ("1" * 400, "no damage > 1 point"),
        ("0" * 6 + "1" * 394, "damage"),
        ("0" * 2 + "1" * 398, "cannot tell 1 point: about "),
        ("1" * 100, "cannot tell 1 point: about 381 prompts are needed"),
    ],
)
def test_verdicts(ours, said):
    theirs = rated("1" * len(ours), "other")
    (row,) = rows(quality_report.table([rated(ours)], theirs, 0.01))
    assert row["verdict"].startswith(said)
    assert quality_report.shown_points(0.005) == "0.5 points"


def test_a_task_may_be_called_all(tmp_path, capsys):
    answers = [record(n, task="all" if n < 2 else "sums", right=n != 1) for n in range(4)]
    recorded(*answers).write(tmp_path / "a.json")
    recorded(*answers).write(tmp_path / "b.json")
    both = ["--records", tmp_path / "a.json", tmp_path / "b.json"]
    for argv in (both[:2], both, [*both[:2], "--against", both[2], "--plot", tmp_path / "a.svg"]):
        status, printed, _ = run(capsys, *argv)
        assert status == 0
        assert [(row["task"], row["prompts"]) for row in rows(printed)] == [("all", "2"), ("sums", "2"), ("all", "4")]
        shares = [next(cell for title, cell in row.items() if "exact, 95" in title)[:5] for row in rows(printed)]
        assert shares == ["0.500", "1.000", "0.750"]
    assert len(list(ElementTree.parse(tmp_path / "a.svg").iter("{http://www.w3.org/2000/svg}circle"))) == 2 + 6
    assert [task for task, _ in recorded(*answers[:2]).tasks] == ["all"]


def test_a_bar_in_a_tasks_name_makes_no_column():
    printed = quality_report.report([recorded(record(task="a|b"))], None, 0.01)
    assert "| a\\|b | 1 |" in printed


def test_a_margin_that_is_wide_is_told_by_few():
    (row,) = rows(quality_report.table([rated("1" * 100)], rated("1" * 100, "other"), 0.05))
    assert row["verdict"] == "no damage > 5 points"


def test_a_drafter_that_was_turned_off_is_told():
    run = recorded(record(0), record(1, drafter_failure="X.propose raised KeyError"))
    assert quality_report.notes([run], None, 0.01) == [
        "this: the drafter was turned off in 1 answers (X.propose raised KeyError)"
    ]


def test_settings_that_are_alike_are_printed_once():
    printed = quality_report.report([recorded(record(), mode="ar", dtype="float32", label="a")], None, 0.01)
    assert "mode: ar" in printed
    both = [recorded(record(), label=label, mode=mode, dtype="float32") for label, mode in (("a", "ar"), ("b", "x"))]
    printed = quality_report.report(both, None, 0.01)
    assert printed.count("dtype: float32") == 1 and "mode: ar" in printed and "mode: x" in printed


def test_names_of_runs():
    a, b, far = Path("x/a.json"), Path("x/b.json"), Path("y/a.json")
    assert quality._labels([a, b, None]) == ["a", "b", "this run"]
    assert quality._labels([a, far]) == ["x/a.json", "y/a.json"]


def test_a_plot_shows_shares_where_they_are():
    half = recorded(*(record(n, right=n % 2 == 0, task="<x> & y") for n in range(40)), label="half")
    most = recorded(*(record(n, right=n > 3, task="<x> & y") for n in range(40)), label="most")
    tree = ElementTree.fromstring(quality_report.plot([half, most]))
    space = "{http://www.w3.org/2000/svg}"
    dots = [float(dot.get("cx")) for dot in tree.iter(f"{space}circle")][2:]
    lines = [line for line in tree.iter(f"{space}line") if line.get("class") == "whisker"]
    ticks = {text.text: float(text.get("x")) for text in tree.iter(f"{space}text")}
    for dot, share, line in zip(dots, (0.5, 0.9), lines, strict=True):
        at = ticks["40 %"] + (share - 0.4) / 0.6 * (ticks["100 %"] - ticks["40 %"])
        assert dot == pytest.approx(at, abs=0.2)
        assert float(line.get("x1")) < dot < float(line.get("x2"))
    assert {"<x> & y", "half", "most", "6.00", "1.750"} <= ticks.keys()
    assert tree.find(f"{space}rect").get("class") == "ground"

"""`mlx_dgemma.check` as a user runs it."""

import json
import subprocess
import sys

import pytest

from mlx_dgemma import __main__ as dispatcher
from mlx_dgemma.check import experts, speed
from mlx_dgemma.check.machine import shown_drafter
from mlx_dgemma.check.plan import PLAN
from mlx_dgemma.decoding import causal
from tests.check.test_sections import one_bundle  # noqa: F401


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_whole_report(run, tmp_path, one_bundle):  # noqa: F811
    status, out, err = run("--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md")
    assert (status, err) == (0, "")
    assert out.startswith(f"mlx_dgemma.check: {', '.join(PLAN)}; 180 s at most after loading")
    report, written = strict(tmp_path / "r.json"), (tmp_path / "r.md").read_text()
    assert (report["state"], report["passed"]) == ("complete", True)
    assert [section["name"] for section in report["sections"]] == list(PLAN)
    assert all(section["state"] == "complete" and section["rows"] for section in report["sections"])
    assert {"chip", "system", "versions", "device", "model", "weights"} <= report["facts"].keys()
    for section in report["sections"]:
        assert f"#### {section['title']}" in written and section["title"] in out
    assert "tiny: 3 layers" in written and str(tmp_path) not in written, "names of folders stay private"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["r.json", "r.md"]


def test_only_some_sections(run):
    status, out, _ = run("--only", "memory", "experts", "--device", "cpu")
    assert status == 0 and "Expert matmuls" in out and "Memory" in out and "Tokens per second" not in out
    assert out.rstrip().splitlines()[-1].startswith("nothing wrong")


def test_another_drafter_is_timed_too(run, tmp_path):
    run("--only", "costs", "--drafter", "canvas:8x1", "--json", tmp_path / "r.json")
    rows = strict(tmp_path / "r.json")["sections"][0]["rows"]
    assert "canvas:8x1 draft" in [row["pass"] for row in rows]


def test_interrupted(run, tmp_path, monkeypatch):
    real, calls = speed._answer, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(speed, "_answer", pressed)
    files = ["--json", tmp_path / "r.json", "--markdown", tmp_path / "r.md"]
    status, out, err = run("--only", "memory", "experts", "speed", *files)
    assert (status, err) == (130, "mlx_dgemma.check: interrupted\n")
    report = strict(tmp_path / "r.json")
    assert report["state"] == "interrupted"
    states = {section["name"]: section["state"] for section in report["sections"]}
    assert states == {"speed": "interrupted", "experts": "not run", "memory": "not run"}
    assert len(report["sections"][0]["rows"]) == 2, "what there is"
    for text in (out, (tmp_path / "r.md").read_text()):
        assert "PARTIAL REPORT (speed interrupted, experts not run, memory not run)" in text


def test_a_drafter_that_changes_tokens_fails_the_check(run, monkeypatch, tmp_path):
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    status, out, _ = run("--only", "speed", "--json", tmp_path / "r.json")
    assert status == 1 and "FAILED: speed: " in out and "WRONG: " in out
    assert strict(tmp_path / "r.json")["passed"] is False


def test_a_damaged_bundle_fails_the_check(run, one_bundle):  # noqa: F811
    (one_bundle / "bundle.json").write_text("{}")
    status, out, _ = run("--only", "parity")
    assert status == 1 and "FAILED: parity: bundle full on cpu" in out


def test_a_section_that_fails_keeps_its_traceback_for_debug(run, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(experts, "measure", broken)
    assert "Traceback" not in run("--only", "experts")[2]
    status, out, err = run("--only", "experts", "--debug")
    assert status == 1 and "no such kernel" in out and "Traceback" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--only", "speeds"], "no section 'speeds'"),
        (["--drafter", "magic"], "drafter 'magic' does not exist"),
        (["--drafter", "canvas:9999x1"], "canvas"),
        (["--seconds", "0"], "--seconds must be"),
        (["--seconds", "-5"], "--seconds must be"),
        (["--seconds", "nan"], "--seconds must be"),
        (["--seconds", "inf"], "--seconds must be"),
        (["--seconds", "soon"], "--seconds"),
        (["--device", "gpu"], "no GPU here"),
        (["--device", "tpu"], "--device"),
        (["--json", "nowhere/r.json"], "is not a folder"),
        (["--markdown", "/"], "is a folder"),
        (["--json", "r", "--markdown", "r"], "both name"),
    ],
)
def test_mistakes_are_one_line_and_bad_usage(run, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if says == "no GPU here" and __import__("mlx.core").core.is_available(__import__("mlx.core").core.gpu):
        pytest.skip("there is one")
    status, out, err = run(*args)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["nowhere", "/nowhere/at/all"])
def test_a_model_that_is_not_there(run, model):
    status, _, err = run(model=model)
    assert status == 1 and "no such folder" in err and err.count("\n") == 1


def test_a_drafter_of_another_model(run):
    status, _, err = run("--drafter", "block:nano")
    assert status in (1, 2) and err.count("\n") == 1


def test_nano_is_known_by_its_shape(run, tmp_path):
    status, out, _ = run("--only", "memory", model="nano")
    assert status == 0 and "nano: 4 layers" in out


def test_help_loads_no_mlx():
    code = """
import sys
from mlx_dgemma.check.command import main
try:
    main(["--help"])
finally:
    assert not {"mlx", "mlx.core", "transformers", "numpy"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "usage" in done.stdout and "experts" in done.stdout, done.stderr


def test_the_dispatcher_knows_it():
    assert dispatcher.COMMANDS["check"][0] == "mlx_dgemma.check.command"


def test_folders_of_drafters_stay_private(tmp_path):
    (tmp_path / "mine").mkdir()
    assert shown_drafter(f"block:{tmp_path}/mine") == "block:mine"
    assert [shown_drafter(name) for name in ("lookup", "block:z-lab/x", "canvas:64x2")] == [
        "lookup",
        "block:z-lab/x",
        "canvas:64x2",
    ]

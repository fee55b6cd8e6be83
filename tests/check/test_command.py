"""`mlx_dgemma.check` as a user runs it."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from datetime import UTC, datetime

import mlx.core as mx
import pytest

from mlx_dgemma import __main__ as dispatcher
from mlx_dgemma.check import experts, speed
from mlx_dgemma.check.plan import PLAN
from mlx_dgemma.check.subject import Subject
from mlx_dgemma.decoding import causal
from mlx_dgemma.parity import bundle, check
from tests.check.test_sections import one_bundle  # noqa: F401
from tests.helpers import NANO_TEXT


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
    assert report["facts"]["command"] == "mlx_dgemma.check --model tiny --json r.json --markdown r.md"
    written_at = datetime.strptime(report["facts"]["date"], "%Y-%m-%d %H:%M UTC").replace(tzinfo=UTC)
    assert abs((datetime.now(UTC) - written_at).total_seconds()) < 600
    for section in report["sections"]:
        assert f"#### {section['title']}" in written and section["title"] in out
    assert "tiny: 3 layers" in written and str(tmp_path) not in written, "names of folders stay private"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["r.json", "r.md"]


def test_only_some_sections(run, tmp_path):
    status, out, _ = run("--only", "memory", "experts", "--device", "cpu", "--json", tmp_path / "r.json")
    assert strict(tmp_path / "r.json")["passed"] is None, "nothing was compared with the reference"
    assert status == 0 and "Expert matmuls" in out and "Memory" in out and "Tokens per second" not in out
    assert "\nnothing wrong" in out


def test_nothing_is_right_that_was_not_measured(run, tmp_path):
    status, out, _ = run("--only", "memory", "--json", tmp_path / "r.json")
    assert status == 0 and "nothing measured" in out and "nothing wrong" not in out
    assert strict(tmp_path / "r.json")["passed"] is None


def test_no_bundle_at_all_fails_the_check(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "SHIPPED", tmp_path)
    status, out, _ = run("--only", "parity", "--json", tmp_path / "r.json")
    assert status == 1 and "FAILED: parity: no bundle was found" in out
    assert strict(tmp_path / "r.json")["passed"] is False


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


def test_interrupted_while_loading(run, tmp_path, monkeypatch):
    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Subject, "load", pressed)
    (tmp_path / "r.json").write_text("older")
    status, out, err = run("--only", "parity", "memory", "--json", tmp_path / "r.json")
    assert (status, err) == (130, "mlx_dgemma.check: interrupted\n") and "r.json: will be replaced" in out
    report = strict(tmp_path / "r.json")
    assert (report["state"], report["passed"]) == ("interrupted", None)
    assert [section["state"] for section in report["sections"]] == 2 * ["not run"]
    assert report["facts"]["model"] == "tiny, not loaded" and "chip" in report["facts"]


def test_the_ratio_of_the_gpu(run, one_bundle, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mlx_dgemma.check.subject.devices", lambda: ["gpu", "cpu"])
    monkeypatch.setattr("mlx_dgemma.check.bundles.on", lambda device: nullcontext())
    real, limits = check.check, []

    def noted(folder, model, max_ratio):
        limits.append(max_ratio)
        return real(folder, model, max_ratio)

    monkeypatch.setattr(check, "check", noted)
    _, out, _ = run("--only", "parity", "--max-ratio", "16")
    assert limits == [16.0, None] and "what passes: up to 16 on the GPU, up to 4 on the CPU" in " ".join(out.split())
    assert "up to 4 passes" in run("--only", "parity")[1] and limits[2:] == [None, None]


def test_what_is_no_file_is_left_alone(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("pipe", "circle"):
        status, out, err = run("--only", "memory", "--json", tmp_path / name)
        assert (status, out) == (2, "") and "is not a regular file" in err and err.count("\n") == 1
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "circle").is_symlink()


def test_a_link_is_followed(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "r.json").symlink_to(tmp_path / "there" / "real.json")
    assert run("--only", "memory", "--json", tmp_path / "r.json")[0] == 0
    assert (tmp_path / "r.json").is_symlink() and strict(tmp_path / "there" / "real.json")["schema"] == 1
    status, _, err = run("--json", tmp_path / "r.json", "--markdown", tmp_path / "there" / "real.json")
    assert status == 2 and "both name" in err


def test_a_drafter_that_changes_tokens_fails_the_check(run, monkeypatch, tmp_path):
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    status, out, _ = run("--only", "speed", "--json", tmp_path / "r.json")
    assert status == 1 and "FAILED: speed: " in out and "WRONG: " in out
    assert strict(tmp_path / "r.json")["passed"] is False


def test_a_damaged_bundle_fails_the_check(run, one_bundle):  # noqa: F811
    (one_bundle / "bundle.json").write_text("{}")
    status, out, _ = run("--only", "parity")
    assert status == 1 and "FAILED: parity: bundle full on cpu" in out
    assert str(one_bundle.parent) not in out


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
        (["--max-ratio", "0"], "--max-ratio must be"),
        (["--max-ratio", "-1"], "--max-ratio must be"),
        (["--max-ratio", "nan"], "--max-ratio must be"),
        (["--max-ratio", "inf"], "--max-ratio must be"),
        (["--device", "gpu"], "no GPU here"),
        (["--device", "tpu"], "--device"),
        (["--json", "nowhere/r.json"], "is not a folder"),
        (["--markdown", "/"], "is a folder"),
        (["--json", "r", "--markdown", "r"], "both name"),
    ],
)
def test_mistakes_are_one_line_and_bad_usage(run, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx.core.is_available", lambda device: device == mx.cpu)
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
    assert status == 0 and f"nano: {NANO_TEXT['num_hidden_layers']} layers" in out


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


@pytest.mark.parametrize("name", ["check", "parity"])
def test_run_as_a_module(name):
    done = subprocess.run([sys.executable, "-m", f"mlx_dgemma.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: mlx_dgemma.{name}" in done.stdout, done.stderr


def test_the_dispatcher_knows_it():
    assert dispatcher.COMMANDS["check"][0] == "mlx_dgemma.check.command"

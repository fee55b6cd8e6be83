"""The command's mistakes, a line each."""

import shutil
import sys

import pytest

from benchmarks.nano import train
from mlx_dgemma import convert
from mlx_dgemma.loading import EMBEDDED

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["--steps", "1"], "say what to train on", 2),
        (["--steps", "1", "--rung", "1", "--data", "x"], "say what to train on", 2),
        (["--steps", "1", "--data", "x"], "say which one (--init)", 2),
        (["--steps", "0", "--rung", "1"], "--steps", 2),
        (["--steps", "1", "--rung", "1", "--canvas", "0"], "--canvas", 2),
        (["--steps", "1", "--rung", "1", "--stepped", "1.5"], "--stepped", 2),
        (["--steps", "1", "--rung", "1", "--stepped", "0.5", "--self-conditioning", "0"], "--stepped", 2),
        (["--steps", "1", "--rung", "1", "--save-every", "0"], "--save-every", 2),
        (["--steps", "5", "--rung", "1", "--decay", "-1"], "--decay", 2),
        (["--steps", "5", "--rung", "1", "--decay", "6"], "--decay", 2),
        (["--steps", "1", "--rung", "1", "--lr", "nan"], "--lr", 2),
        (["--steps", "1", "--rung", "1", "--dtype", "bfloat16"], "--dtype", 2),
        (["--steps", "1", "--init", "nano", "--data", "x", "--shares", "json=1"], "--shares", 2),
        (["--steps", "1", "--rung", "1", "--shares", "poem=1"], "no task poem", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=0"], "not all 0", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=2,edit=-1"], "from 0 on", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=nan"], "from 0 on", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json"], "write json=0.2", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=1,minimal=1"], "minimal is never trained on", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=1,story=1"], "--shares story: of a rung above", 2),
        (["--steps", "1", "--rung", "1", "--seed", "1" + "0" * 15], "--seed must be in", 2),
        (["--steps", "1", "--rung", "1", "--minutes", "0"], "--minutes must be more than 0", 2),
        (["--steps", "1", "--rung", "1", "--minutes", "nan"], "--minutes must be more than 0", 2),
        (["--steps", "1", "--rung", "1", "--device", "cuda"], "no CUDA", 2),
        (["--steps", "1", "--init", "nano", "--data", "/missing.jsonl"], "cannot be read", 1),
        (["--steps", "1", "--init", "/missing", "--rung", "1"], "/missing", 1),
    ],
)
def test_bad_input_is_one_line(arguments, said, status, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == status
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_one_line_says_what_to_install(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "benchmarks.nano.faster", raising=False)
    with pytest.raises(SystemExit) as ended:
        train.main(["--rung", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "pip install" in said


def test_a_checkpoint_is_not_trained_over(tmp_path, capsys):
    shutil.copytree(EMBEDDED, tmp_path / "mine", ignore=shutil.ignore_patterns("drafter"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    with pytest.raises(SystemExit) as ended:
        train.main(["--rung", "1", "--steps", "1", "--init", "nano", "--out", str(tmp_path / "mine")])
    assert ended.value.code == 2 and "mine: holds a checkpoint, and no state.pt" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_weights_that_transformers_cannot_read_are_named(tmp_path, capsys):
    quantised = convert("nano", tmp_path / "q4", quant_recipe="default", progress=False)
    with pytest.raises(SystemExit) as ended:
        train.main(["--rung", "1", "--steps", "1", "--init", str(quantised), "--out", str(tmp_path / "out")])
    assert ended.value.code == 1 and "quantised as MLX does" in capsys.readouterr().err.splitlines()[-1]

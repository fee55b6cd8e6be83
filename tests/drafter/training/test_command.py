"""The command: whole runs, kills at random moments, leftovers, and what is refused in one line."""

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_dgemma.drafter import weights
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.training.command import main
from mlx_dgemma.drafter.training.result import command
from mlx_dgemma.drafter.training.trainer import Trainer
from mlx_dgemma.drafter.training.workspace import ANSWERS, STATE
from mlx_dgemma.generate import stream_generate
from mlx_dgemma.loading import load
from tests.convert.fixtures import Commands
from tests.drafter.training.small import FLAGS, write_prompts
from tests.helpers import NANO_VOCAB, with_text, write_checkpoint

KILLS = 10
COUNT, STEPS = 40, 12
QUICK = f"--max-tokens 10 --at-once 4 --steps {STEPS} --batch 2 --anchors 6 --held-out 0.2 --save-every 2".split()
DSPARK = "--family dspark --markov-rank 6".split()


class Trainings(Commands):
    """Runs mlx_dgemma.train_drafter, each time in a process of its own, and imports only once what tokenizers need."""

    SERVER = """
import mlx_dgemma.drafter.training.pipeline
from mlx_dgemma.loading import EMBEDDED
from transformers import AutoTokenizer
AutoTokenizer.from_pretrained(EMBEDDED)
""" + Commands.SERVER.replace("convert.command", "drafter.training.command")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Trainings(tmp_path_factory.mktemp("said")) as commands:
        yield commands


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """--model and --prompts."""
    folder = tmp_path_factory.mktemp("given")
    model = write_checkpoint(folder / "model", with_text(vocab_size=NANO_VOCAB))
    return ["--model", str(model), "--prompts", str(write_prompts(folder / "prompts.jsonl", COUNT))]


@pytest.fixture(scope="module")
def whole(commands, given, tmp_path_factory):
    """A run that nobody disturbs: its folder and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, stdout, stderr = commands.run(*given, *FLAGS, *DSPARK, *QUICK, "--out", out)
    assert (status, stdout) == (0, f"{out}\n"), stderr
    return out, stderr


def test_a_run(whole, given):
    out, stderr = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "curve.svg",
        "model.safetensors",
        "training.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert re.search(r"Needs about [\d.]+ GB \(main model", stderr) and "| width | accepted | most |" in stderr
    assert re.search(r"\d+ tokens/s, peak memory [\d.]+ GB", stderr) and "loss" in stderr
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == STEPS and record["options"]["seed"] == 0 and record["versions"]["mlx"]
    assert record["history"][0]["loss"] is None and record["history"][1]["loss"] > 0
    assert len(record["held_out"]["accepted"]) == 5 and record["peak_memory_gb"] > 0 < record["tokens_per_second"]
    assert record["prompts"] == COUNT and record["prompts_file"] == "prompts.jsonl"
    assert record["prompts_sha256"] == hashlib.sha256(Path(given[3]).read_bytes()).hexdigest()
    assert record["options"]["held_out"] == 0.2 and 0 < record["held_out_prompts"] < COUNT
    words = [*"mlx_dgemma.train_drafter --model model --prompts prompts.jsonl".split(), *FLAGS, *DSPARK, *QUICK]
    assert shlex.split(record["command"]) == [*words, "--out", "out"]
    model, tokenizer = load(given[1])
    network = weights.read(out, model)
    drafter = Block(network, Head(model))
    prompt = "reverse apple cloud"
    plain, drafted = (
        [r.token for r in stream_generate(model, tokenizer, prompt, mode="ar", max_tokens=12, drafter=d)]
        for d in (None, drafter)
    )
    assert plain == drafted


def step_of(state) -> int:
    """Of a checkpoint; -1 if there is none."""
    try:
        with state.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return json.loads(json.loads(file.read(length))["__metadata__"]["progress"])["step"]
    except FileNotFoundError:
        return -1


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_ends_with_the_same_weights(commands, given, whole, tmp_path):
    rng, out = random.Random(5), tmp_path / "out"
    answers, state = (tmp_path / ".out.partial" / name for name in (ANSWERS, STATE))
    argv = [*given, *FLAGS, *DSPARK, *QUICK, "--out", out]

    def lines() -> int:
        return answers.read_bytes().count(b"\n") if answers.exists() else -1

    moments = [(lines, wanted) for wanted in (-1, 0, *sorted(rng.sample(range(4, COUNT), 3)))]
    moments += [(lambda: step_of(state), wanted) for wanted in (0, *sorted(rng.sample(range(2, STEPS), 3)), STEPS)]
    killed, resumed = 0, 0
    for reached, wanted in moments:
        pid, deadline = commands.start(*argv), time.monotonic() + 50
        while not out.exists() and reached() < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status, _, stderr = commands.wait()
        assert status == -signal.SIGKILL, stderr
        assert "Traceback" not in stderr
        killed += 1
        resumed += step_of(state) > 0
    status, _, stderr = commands.run(*argv)
    assert status == 0, stderr
    expected = whole[0]
    for name in ("model.safetensors", "config.json", "curve.svg"):
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    records = [json.loads((folder / "training.json").read_text()) for folder in (out, expected)]
    assert records[0]["history"] == records[1]["history"] and records[0]["held_out"] == records[1]["held_out"]
    assert killed == KILLS and resumed >= 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refused(argv, capsys, status) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    said = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == status and said.startswith("mlx_dgemma.train_drafter: ")
    return said


@pytest.mark.slow
def test_leftovers_of_another_command_are_refused(given, tmp_path, capsys, monkeypatch):
    argv = [*given, *FLAGS, *QUICK, "--out", tmp_path / "out"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlx_dgemma.drafter.training.trainer.Trainer.run", stop)
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert end.value.code == 130 and "the same command goes on from there" in said
    answers = tmp_path / ".out.partial" / ANSWERS
    before = answers.read_bytes()
    assert "begun with other --max-tokens; give the same" in refused([*argv, "--max-tokens", 9], capsys, 2)
    assert "begun with other --at-once and --seed;" in refused([*argv, "--seed", 1, "--at-once", 2], capsys, 2)
    other = [*argv, "--prompts", write_prompts(tmp_path / "other.jsonl", COUNT - 1)]
    assert "begun with other prompts; give the same" in refused(other, capsys, 2)
    assert answers.read_bytes() == before

    rename = Path.rename

    def stopping(path, to):
        return stop() if to == tmp_path / "out" else rename(path, to)

    with monkeypatch.context() as patch:  # interrupted when all is done but the last renaming
        patch.setattr(Path, "rename", stopping)
        with pytest.raises(SystemExit):
            main([str(word) for word in argv])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial" / STATE).exists()
    main([str(word) for word in argv])
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / ".out.partial").exists()
    assert "exists already" in refused(argv, capsys, 2)

    # a drafter that is continued keeps its shape, and begins with its weights
    onward = [*given, *QUICK, "--out", tmp_path / "onward", "--init", tmp_path / "out"]
    assert "--layers 3 contradicts --init, whose drafter has 2" in refused([*onward, "--layers", 3], capsys, 2)
    assert "--family dspark contradicts --init" in refused([*onward, "--family", "dspark"], capsys, 2)
    main([str(word) for word in [*onward, "--layers", 2, "--lr", 1e-9]])
    old, new = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("out", "onward"))
    assert all(mx.abs(old[name] - new[name]).max().item() < 1e-2 for name in old)


@pytest.mark.slow
def test_other_training_options_keep_the_answers(given, tmp_path, capsys, monkeypatch):
    folder = tmp_path / ".out.partial"
    argv = [*given, *FLAGS, *QUICK, "--out", tmp_path / "out", "--answers", tmp_path / "kept.jsonl"]

    def train(*words) -> str:
        main([str(word) for word in [*argv, *words]])
        return capsys.readouterr().err

    # one that diverges: the checkpoint before it stays, nothing is published
    said = refused([*argv, "--lr", "1e30", "--save-every", 1], capsys, 1)
    assert re.search(r"step \d+: the (loss|gradient) is not finite; lower --lr", said)
    arrays = mx.load(str(folder / STATE))
    assert all(mx.isfinite(array).all().item() for array in arrays.values())
    assert not (tmp_path / "out").exists() and not (folder / "result").exists()
    before = (folder / ANSWERS).read_bytes()
    kept = (tmp_path / "kept.jsonl").read_bytes()
    assert kept.partition(b"\n")[0].startswith(b'{"fingerprint"')
    assert sorted(kept.splitlines()[1:]) == sorted(before.splitlines())

    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("mlx_dgemma.drafter.training.answers.answer", never)
    (tmp_path / "kept.jsonl").unlink()  # those of the working folder are enough
    rename = Path.rename

    def stopping(path, to):
        if to == tmp_path / "out":
            raise KeyboardInterrupt
        return rename(path, to)

    state = (folder / STATE).read_bytes()
    said = refused([*argv, "--lr", 1e-3, "--layers", 1], capsys, 2)
    assert f"{folder / STATE}: was trained with other --lr and drafter; give the same again" in said
    assert "or remove it to train anew (the answers are kept)" in said
    assert (folder / STATE).read_bytes() == state
    (folder / STATE).unlink()
    with monkeypatch.context() as patch:  # interrupted when the result is whole
        patch.setattr(Path, "rename", stopping)
        with pytest.raises(SystemExit):
            train("--lr", 1e-3, "--layers", 1)
    capsys.readouterr()
    assert (folder / "result").exists() and (tmp_path / "kept.jsonl").read_bytes() == kept
    said = refused(argv, capsys, 2)
    assert f"{folder / 'result'}: was trained with other --lr and drafter" in said
    shutil.rmtree(folder / "result")
    train()
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["options"]["lr"] == 6e-4 and record["steps"] == STEPS
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2

    # a later training, from the file
    said = train("--out", tmp_path / "later", "--lr", 1e-3)
    assert "begins at step 0" not in said and (tmp_path / "later" / "model.safetensors").exists()
    assert (tmp_path / "kept.jsonl").read_bytes() == kept


def test_what_a_checkpoint_does_not_depend_on_may_change(given, tmp_path, capsys, monkeypatch):
    argv = [*given, *FLAGS, *QUICK, "--out", tmp_path / "out", "--save-every", 2]
    step, seen = Trainer.step, []

    def stopping(trainer, number):
        seen.append(number)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(SystemExit):
        main([str(word) for word in argv])
    main([str(word) for word in [*argv, "--micro-batch-gb", 1, "--dtype", "float32"]])
    assert seen[:6] == [0, 1, 2, 3, 2, 3], "on from the checkpoint"
    arrays = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in arrays.values()} == {mx.float32}


def test_a_disk_that_is_full_and_a_damaged_checkpoint(given, tmp_path, capsys, monkeypatch):
    argv = [*given, *FLAGS, *QUICK, "--out", tmp_path / "out", "--save-every", 1]
    save, calls = mx.save_safetensors, []

    def full(*given):
        calls.append(given)
        if len(calls) == 3:
            raise RuntimeError("[write] Unable to write 12 bytes to file.")
        save(*given)

    state = tmp_path / ".out.partial" / STATE
    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", full)
        said = refused(argv, capsys, 1)
    assert "Unable to write 12 bytes" in said and "the same command goes on from there" in said
    whole = state.read_bytes()
    state.write_bytes(whole[:500])
    assert f"{state}: is damaged; remove it to train anew (the answers are kept)" in refused(argv, capsys, 1)
    state.write_bytes(whole)
    main([str(word) for word in argv])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_home_is_expanded(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main([str(word) for word in [*given, *FLAGS, *QUICK, "--out", "~/out", "--answers", "~/kept.jsonl"]])
    assert (tmp_path / "out").is_dir() and (tmp_path / "kept.jsonl").is_file() and not (tmp_path / "~").exists()
    assert "exists already" in refused([*given, *FLAGS, "--out", "~"], capsys, 2)
    assert "must be a path" in refused([*given, *FLAGS, "--out", ""], capsys, 2)
    assert "cannot be made" in refused([*given, *FLAGS, "--out", "/proc/out"], capsys, 1)


def test_answers_that_are_others(given, tmp_path, capsys, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    argv = [*given, *FLAGS, *QUICK, "--answers", kept]
    with monkeypatch.context() as patch:
        patch.setattr("mlx_dgemma.drafter.training.trainer.Trainer.run", lambda *_: None)
        main([str(word) for word in [*argv, "--held-out", 0, "--out", tmp_path / "first"]])
    data, argv = kept.read_bytes(), [*argv, "--out", tmp_path / "out"]
    said = refused([*argv, "--max-tokens", 9], capsys, 2)
    assert "kept.jsonl: holds answers of other --max-tokens; remove it or name another --answers" in said
    for wrong, reason in (
        (b"", "is no file of answers"),
        (b"mine\n", "is no file of answers"),
        (b"[1]\n", "is no file of answers"),
        (data[:-3], "is not whole"),
        (data[: data.rindex(b"\n", 0, -1) + 1], "is not whole"),
    ):
        kept.write_bytes(wrong)
        assert reason in refused(argv, capsys, 2) and kept.read_bytes() == wrong
    assert "cannot be read" in refused([*argv, "--answers", tmp_path], capsys, 1)
    assert "is what --out names" in refused([*argv, "--answers", tmp_path / "out"], capsys, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "kept.jsonl"]


def test_a_command_is_kept_without_paths(tmp_path):
    (tmp_path / "model").mkdir()
    model, prompts = str(tmp_path / "model"), str(tmp_path / "my prompts.jsonl")
    words = ["train", "--model", model, f"--prompts={prompts}", "--init", "z-lab/drafter", "--lr", "1e-3"]
    said = command(words, [model, "z-lab/drafter"], [prompts])
    assert said == "train --model model '--prompts=my prompts.jsonl' --init z-lab/drafter --lr 1e-3"


def test_what_is_no_unfinished_training_is_left_alone(given, tmp_path, capsys):
    folder = tmp_path / ".out.partial"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    assert "is not an unfinished training" in refused([*given, *FLAGS, "--out", tmp_path / "out"], capsys, 2)
    assert (folder / "mine.txt").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "--steps must be a whole number above 0"),
        ("--lr nan", "--lr must be a number above 0"),
        ("--held-out 1", "--held-out must be at least 0 and below 1"),
        ("--dtype int8", "--dtype must be one of"),
        ("--family eagle", "--family must be one of dflash, dspark"),
        ("--block 65", "--block must be at most 64"),
        ("--layers 1000000000", "num_hidden_layers must be a whole number in 1-1024"),
        ("--intermediate-size 99999999999", "intermediate_size must be a whole number in 1-"),
        ("--intermediate-size 16000000", "training needs about"),
        ("--answers none/file", "is not a folder; create it first"),
        ("--block 1", "--block must be a whole number of 2 at least"),
        ("--markov-rank 4", "--markov-rank is of --family dspark"),
        ("--taps 1,9", "are not layers 0-2"),
        ("--taps 4", "in a model of 3 layers; name layers instead"),
        ("--taps one", "must be a number, or layers"),
        ("--heads 3", "do not divide"),
        ("--prompts none.jsonl", "none.jsonl: cannot be read"),
        ("--out none/out", "is not a folder; create it first"),
        ("--init none", "no such folder"),
    ],
)
def test_what_is_refused(words, said, given, tmp_path, capsys):
    status = 1 if any(part in said for part in ("cannot be read", "no such", "needs about")) else 2
    assert said in refused([*given, *FLAGS, "--out", tmp_path / "out", *words.split()], capsys, status)
    assert not list(tmp_path.iterdir())


def test_too_little_memory(given, tmp_path, capsys, monkeypatch):
    """Is said once, before a weight is read or made."""

    def never(*_, **__):
        raise AssertionError

    for name in ("BlockNetwork", "weights.read", "mx.eval"):
        monkeypatch.setattr(f"mlx_dgemma.drafter.training.pipeline.{name}", never)
    monkeypatch.setattr("mlx_dgemma.drafter.training.estimate.machine_memory", lambda: 10**6)
    with pytest.raises(SystemExit):
        main([*given, *FLAGS, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "training needs about" in said and "this machine has 0.00 GB" in said
    assert len(said.splitlines()) == said.lower().count("needs about") == 1
    assert not list(tmp_path.iterdir())


def test_help_comes_without_mlx():
    code = (
        "import sys\nfrom mlx_dgemma.drafter.training.command import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print('loaded' if 'mlx.core' in sys.modules else 'quick')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'a folder, a Hub id, or "nano"' in " ".join(done.stdout.split())
    assert done.stdout.rstrip().endswith("quick") and "--prompts FILE" in done.stdout

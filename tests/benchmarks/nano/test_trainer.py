"""A training is stopped, saved, and goes on; another one does not."""

import json
import resource
import shutil
import signal
from contextlib import contextmanager

import pytest

from benchmarks.nano import train
from tests.benchmarks.nano.fixtures import tensors

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]


@pytest.fixture
def stopped(begun, tmp_path, monkeypatch, ended):
    """The arguments of a training that Ctrl-C stopped in the midst of the first of three steps, and its folder."""
    from benchmarks.nano.trainer import Trainer

    out, update = tmp_path / "stopped", Trainer._update
    command = ["--init", str(begun), "--rung", "1", "--steps", "3", "--batch", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda *a: (signal.raise_signal(signal.SIGINT), update(*a)))
        status, said = ended(command)
    assert status == 130 and said.splitlines()[-2:] == [
        f"{out}: what is done stays in {out}, the same command goes on from there",
        "benchmarks.nano.train: interrupted",
    ]
    return command, out


def state_of(out):
    """The step of the state, and its weights."""
    import torch

    state = torch.load(out / "state.pt", weights_only=True)
    return state["step"], state["optimizers"]["weights"]


def test_ctrl_c_saves_a_whole_step_and_the_same_command_goes_on(begun, stopped, ended, monkeypatch):
    from benchmarks.nano import trainer

    command, out = stopped
    step, weights = state_of(out)
    first = tensors(out)
    both = [name for name in first if name in weights]  # ties have one name here and another there
    assert step == 1 and both and all(first[name].equal(weights[name].bfloat16()) for name in both)
    assert not first["model.decoder.embed_tokens.weight"].equal(tensors(begun)["model.decoder.embed_tokens.weight"])
    saved, save = [], trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *a: (saved.append(1), save(*a)))
    assert ended([*command, "--save-every", "1", "--minutes", "9"])[0] == 0
    assert state_of(out)[0] == 3 and len(saved) == 2, "the last step is saved once"


def test_a_second_ctrl_c_does_not_wait(ended):
    from benchmarks.nano.trainer import deferred_interrupt

    usual, passed = signal.default_int_handler, []
    signal.signal(signal.SIGINT, usual)  # a job in the background may have been told to ignore it
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        passed.append(is_interrupted())
        signal.raise_signal(signal.SIGINT)
        passed.append("not reached")
    assert passed == [True] and signal.getsignal(signal.SIGINT) is usual


@contextmanager
def full_disk():
    """No file may be longer than this, so that the writers of torch and safetensors fail as they do."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


@contextmanager
def no_room_for(part, monkeypatch):
    """One part of what is saved."""
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from benchmarks.nano import trainer

    owner, name = {
        "state": (trainer, "write_atomically"),
        "weights": (PreTrainedModel, "save_pretrained"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
    }[part]
    write = getattr(owner, name)

    def fail(*arguments):
        with full_disk():
            write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


@pytest.mark.parametrize("part", ["state", "weights", "tokenizer"])
def test_a_save_that_fails_leaves_what_goes_on(stopped, ended, monkeypatch, part):
    command, out = stopped
    before = tensors(out)
    with no_room_for(part, monkeypatch):
        status, said = ended(command)
    assert status == 1 and "cannot be written; is the disk full?" in said.splitlines()[-1]
    after = tensors(out)
    assert state_of(out)[0] == (1 if part == "state" else 3)
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)
    assert ended(command)[0] == 0 and state_of(out)[0] == 3
    assert not all(tensors(out)[name].equal(before[name]) for name in before), "the checkpoint is the last step's"
    assert not [path for path in out.iterdir() if path.name.startswith((".", "new-"))]


@pytest.mark.parametrize("part", ["state", "weights", "tokenizer"])
def test_a_first_save_that_fails_is_no_foreign_checkpoint(begun, tmp_path, ended, monkeypatch, part):
    out = tmp_path / "out"
    command = ["--init", str(begun), "--rung", "1", "--steps", "1", "--batch", "2", "--out", str(out)]
    with no_room_for(part, monkeypatch):
        assert ended(command)[0] == 1
    assert ended(command)[0] == 0 and state_of(out)[0] == 1 and tensors(out)


def test_what_goes_on_goes_on_with_its_own_tokenizer(tmp_path, ended, monkeypatch):
    out = tmp_path / "out"
    command = ["--rung", "1", "--steps", "2", "--batch", "2", "--out", str(out)]
    assert ended([*command, "--minutes", "1e-9"])[0] == 0 and state_of(out)[0] == 0
    before = (out / "tokenizer.json").read_bytes()
    monkeypatch.setattr(train, "TOKENIZER_SAMPLE", 5000)  # another one would be made now
    assert ended(command)[0] == 0 and state_of(out)[0] == 2
    assert (out / "tokenizer.json").read_bytes() == before


def test_what_is_frozen_stays_what_it_was_whatever_becomes_of_init(begun, tmp_path, ended):
    out, init = tmp_path / "out", tmp_path / "init"
    shutil.copytree(begun, init)
    command = ["--init", str(init), "--freeze", "experts", "--rung", "1", "--steps", "1", "--batch", "2"]
    assert ended([*command, "--out", str(out), "--minutes", "1e-9"])[0] == 0
    shutil.rmtree(init)
    assert ended([*command, "--out", str(out)])[0] == 0 and state_of(out)[0] == 1
    after, first = tensors(out), tensors(begun)
    same = {name for name in after if after[name].equal(first[name])}
    assert {name for name in after if "experts" in name} <= same < after.keys()


def test_what_is_no_state_is_said(stopped, ended):
    import torch

    command, out = stopped
    for write in (lambda path: path.write_bytes(b"x"), lambda path: torch.save({"step": 1}, path)):
        write(out / "state.pt")
        status, err = ended(command)
        assert status == 1 and f"state.pt: is not the state of a training; remove {out}" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--lr", "1e-3", "--batch", "3"], "--batch and --lr"),
        (["--steps", "4", "--decay", "0"], "--steps"),
        (["--rung", "2"], "--shares"),
        (["--init", "nano"], "--init"),
        (["--seed", "1", "--dtype", "bfloat16"], "--dtype and --seed"),
    ],
)
def test_another_training_does_not_go_on(stopped, ended, monkeypatch, changed, said):
    command, out = stopped
    monkeypatch.setattr(train, "_initial", None)  # nothing is loaded for that
    before = (out / "state.pt").read_bytes()
    status, err = ended([*command, *changed])
    assert status == 2 and f"{out}: was begun with other {said}; give the same" in err.splitlines()[-1]
    assert (out / "state.pt").read_bytes() == before


def test_without_a_sampler_no_canvas_is_taken_further(begun, tmp_path, ended):
    other = tmp_path / "other"
    shutil.copytree(begun, other)
    path = other / "generation_config.json"
    config = json.loads(path.read_text())
    del config["sampler_config"]
    path.write_text(json.dumps(config))
    command = ["--init", str(other), "--rung", "1", "--steps", "1", "--stepped", "0.5", "--out", str(tmp_path / "out")]
    status, said = ended(command)
    assert status == 1
    assert said.splitlines()[-1] == f"benchmarks.nano.train: {path} has no sampler_config, which training needs"

"""A tiny model to check, and clocks that tests move."""

import signal

import pytest

from mlx_dgemma.check import command, flips, speed
from mlx_dgemma.check.machine import on
from mlx_dgemma.check.subject import Subject
from mlx_dgemma.model import DiffusionGemma
from tests.helpers import NANO_VOCAB, with_text, write_checkpoint

RAW = with_text(vocab_size=NANO_VOCAB, max_position_embeddings=1024)  # nano's tokenizer


class Clock:
    """A clock that stands still unless it is told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def short_and_exact(monkeypatch):
    """Short answers, on a CPU: there is nothing that kernels round differently there."""
    monkeypatch.setattr("mlx_dgemma.check.subject.devices", lambda: ["cpu"])
    monkeypatch.setattr(speed, "LONGEST", 12)
    monkeypatch.setattr(flips, "LONGEST", 16)
    with on("cpu"):
        yield


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Random weights never settle on an answer: a few steps a canvas are enough."""
    folder = write_checkpoint(tmp_path_factory.mktemp("check") / "tiny", RAW)
    (folder / "generation_config.json").write_text('{"max_denoising_steps": 4}')
    return folder


@pytest.fixture(scope="session")
def loaded(folder):
    return Subject.load(str(folder), [])


@pytest.fixture
def subject(loaded):
    return Subject(loaded.name, loaded.model, loaded.drafters, loaded.prompts)


@pytest.fixture
def every_pass(monkeypatch):
    """Have a function called before every pass of any model."""

    def install(hook):
        for name in ("encode", "denoise_hidden"):
            original = getattr(DiffusionGemma, name)

            def changed(self, *args, original=original, **options):
                hook()
                return original(self, *args, **options)

            monkeypatch.setattr(DiffusionGemma, name, changed)

    return install


@pytest.fixture
def run(capsys, folder):
    """(status, stdout, stderr) of the command on the tiny model, in this process."""
    handler = signal.getsignal(signal.SIGINT)

    def call(*args, model=folder):
        status = 0
        try:
            command.main(["--model", str(model), *map(str, args)])
        except SystemExit as end:
            status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield call
    signal.signal(signal.SIGINT, handler)

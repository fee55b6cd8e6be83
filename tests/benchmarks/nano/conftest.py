"""A checkpoint of one step of training, and how the training's command ends."""

import signal

import pytest

from benchmarks.nano import train


@pytest.fixture(scope="session")
def not_compiled():
    """Compiling takes longer than all the steps here."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="session")
def begun(not_compiled, tmp_path_factory):
    """nano with random weights after one step."""
    out = tmp_path_factory.mktemp("begun") / "nano"
    train.main(["--rung", "1", "--steps", "1", "--batch", "2", "--out", str(out)])
    return out


@pytest.fixture
def loaded(begun):
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(begun, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(begun)


@pytest.fixture
def ended(capsys):
    """(status, what is said) of the command, in this process; SIGINT is left as it was."""
    handler = signal.getsignal(signal.SIGINT)

    def call(arguments):
        status = 0
        try:
            train.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGINT, handler)

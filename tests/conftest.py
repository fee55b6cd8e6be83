"""Fixtures; the environment is set before MLX is imported."""

import os
import tempfile

os.environ.setdefault("MLX_ENABLE_TF32", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MLX_DGEMMA_CACHE"] = tempfile.mkdtemp()  # costs of passes that tests measure are theirs alone

import mlx.core as mx
import pytest

from mlx_dgemma.loading import load
from mlx_dgemma.model import DiffusionGemma
from tests.helpers import random_model

if device := os.environ.get("MLX_DGEMMA_TEST_DEVICE"):  # cpu or gpu; what is exact on a CPU is not on Metal
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])


@pytest.fixture(scope="session")
def tiny() -> DiffusionGemma:
    return random_model()


@pytest.fixture(scope="session")
def nano():
    """(model, tokenizer) of the embedded checkpoint."""
    return load("nano")

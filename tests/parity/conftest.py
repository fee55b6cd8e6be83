from functools import cache

import mlx.core as mx
import pytest

from mlx_dgemma.loading import EMBEDDED, load_model
from mlx_dgemma.parity import bundle as bundles
from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.check import Report, check, judge


class Replay:
    """A committed bundle and its model, freshly loaded so that a test may damage it."""

    def __init__(self, name: str):
        self.bundle = bundles.read(BUNDLES / name)
        inside = BUNDLES / name / "model"
        self.model = load_model(inside if inside.is_dir() else EMBEDDED, dtype=mx.float32)

    def judge(self) -> Report:
        return judge(self.bundle, self.model)


@pytest.fixture(scope="session")
def report():
    """Name of a committed bundle -> what `check` says of it, replayed once."""
    return cache(lambda name: check(BUNDLES / name))


@pytest.fixture
def replay():
    return Replay

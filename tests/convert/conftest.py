"""Checkpoints that several files convert."""

from pathlib import Path

import pytest

import mlx_dgemma
from tests.convert.fixtures import QUIET
from tests.convert.ways import with_vision


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def wide(workplace) -> Path:
    return with_vision(workplace / "wide")


@pytest.fixture(scope="module")
def quantised(workplace, wide) -> Path:
    """A folder in 8 bits."""
    return mlx_dgemma.convert(wide, workplace / "quantised", quant_recipe="8bit", **QUIET)

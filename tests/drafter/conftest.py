"""A main model, and random drafters for it."""

from __future__ import annotations

from functools import cache

import pytest

from mlx_dgemma.model import DiffusionGemma
from tests.decoding.runs import lively_model
from tests.drafter.blocks import HIDDEN, RAW
from tests.drafter.files import write_drafter


@pytest.fixture(scope="module")
def model() -> DiffusionGemma:
    return lively_model(hidden_size=HIDDEN)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> the folder of a random drafter."""
    place = tmp_path_factory.mktemp("drafters")

    @cache
    def of(name: str) -> str:
        return str(write_drafter(place / name.replace(", ", "-").replace(" ", "-"), RAW[name]))

    return of

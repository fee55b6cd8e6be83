import pytest

from tests.decoding.runs import lively_model


@pytest.fixture(scope="session")
def model():
    return lively_model()

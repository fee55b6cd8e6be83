"""What a drafter guesses with, as options say it: bits, and a part of the vocabulary."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.drafter.head import read_vocabulary, spelled
from mlx_dgemma.errors import InputError, UsageError
from tests.drafter.files import refused, write_drafter


@pytest.mark.parametrize(
    ("options", "said", "kind"),
    [
        ({"drafter_bits": 3}, "drafter_bits must be 4 or 8, not 3", UsageError),
        ({"drafter_bits": True}, "drafter_bits must be 4 or 8", UsageError),
        ({"drafter_bits": "4"}, "drafter_bits must be 4 or 8", UsageError),
        ({"drafter_bits": 4}, "cannot be quantised in groups", InputError),
        ({"draft_head_bits": 16}, "draft_head_bits must be 4 or 8, not 16", UsageError),
        ({"draft_head_bits": 4}, "draft_head_bits: matrices 24 wide cannot be quantised", UsageError),
        ({"draft_vocab": 0}, "draft_vocab: must hold ids in 0-130", UsageError),
        ({"draft_vocab": 132}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": -1}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": 10**30}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": True}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": 1.5}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": "999999999999999999999999"}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [131]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": []}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": ["3"]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [-1]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [3, True]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [3, 4.0]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": b"ab"}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": bytearray(b"ab")}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": memoryview(b"ab")}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([3.0])}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([[3]])}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([True])}, "draft_vocab: must hold ids", UsageError),
        (
            {"draft_vocab": "no/such/file.json"},
            "draft_vocab no/such/file.json: neither a number nor a file",
            UsageError,
        ),
    ],
)
def test_options_that_are_refused(tmp_path, tiny, options, said, kind):
    refused(tiny, write_drafter(tmp_path), said, kind, **options)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 131]", "must hold ids in 0-130"),
        (b"[]", "must hold ids in 0-130"),
        (b'{"ids": [1]}', "must hold a JSON list of ids"),
        (b"[1,", "not a list of ids in JSON"),
        (b"\xff\xfe", "not a list of ids in JSON"),
        (b"[" * 100_000, "not a list of ids in JSON"),
        (b"[" + b"1" * 5000 + b"]", "not a list of ids in JSON"),
        (b"[true]", "must hold ids in 0-130"),
    ],
    ids=range(8),
)
def test_a_vocabulary_file_that_is_refused(tmp_path, content, said):
    path = tmp_path / "ids.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_vocabulary(spelled(str(path)), 131)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabularies(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[5, 3, 5]")

    def read(given):
        ids = read_vocabulary(spelled(given), 131)
        return None if ids is None else list(ids)

    assert read(None) is None
    for three in (3, "3", range(3), (0, 1, 2), np.int64(3), np.arange(3), np.arange(3, dtype=np.uint8), mx.arange(3)):
        assert read(three) == [0, 1, 2]
    assert read(list(np.arange(3))) == [0, 1, 2]
    assert read(path) == read(str(path)) == [5, 3, 5]

"""What a drafter guesses with, as options say it: bits, and a part of the vocabulary."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.drafter.head import Head, read_vocabulary, spelled
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.model import DiffusionGemma
from tests.decoding.runs import VOCAB, lively_model
from tests.drafter.blocks import HIDDEN
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


def test_smaller_heads_are_the_same_head(model):
    hidden = mx.random.normal((5, HIDDEN))
    whole = model.logits(hidden)
    assert mx.array_equal(Head(model)(hidden), whole)
    ids = [100, 3, 77, 3]
    part = Head(model, ids=ids)(hidden)
    assert mx.allclose(part[:, [3, 77, 100]], whole[:, [3, 77, 100]], atol=1e-5)
    assert mx.isinf(part).sum().item() == 5 * (VOCAB - 3)
    for bits, near in ((4, 0.5), (8, 0.03)):
        for chosen in (None, ids):
            quantised = Head(model, bits, chosen)(hidden)
            known = mx.isfinite(quantised)
            error = mx.where(known, quantised - whole, 0).abs().max().item()
            assert 0 < error < near
            assert known.sum().item() == 5 * (VOCAB if chosen is None else 3)


def packed(mode: str, group: int, bits: int) -> DiffusionGemma:
    """A main model with a quantised embedding."""
    model = lively_model(hidden_size=HIDDEN)
    kind = model.model.decoder.embed_tokens.to_quantized(group_size=group, bits=bits, mode=mode)
    model.model.decoder.embed_tokens = kind
    return model


@pytest.mark.parametrize(
    ("mode", "group", "bits"),
    [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)],
)
def test_rows_of_a_quantised_head_stay_packed(monkeypatch, mode, group, bits):
    model, ids = packed(mode, group, bits), [3, 77, 100]
    embedding = model.model.decoder.embed_tokens
    hidden = mx.random.normal((5, HIDDEN))
    whole = model.logits(hidden)
    monkeypatch.setattr(type(embedding), "__call__", None)  # it dequantises
    head = Head(model, ids=ids)
    assert mx.allclose(head(hidden)[:, ids], whole[:, ids], atol=1e-4)
    assert sum(array.nbytes for array in head._project._arrays) * VOCAB == 3 * sum(
        array.nbytes for _, array in tree_flatten(embedding.parameters())
    )
    # no copy where the head has no more bits than are asked for
    assert mx.array_equal(Head(model, bits=8)(hidden), whole)
    assert not hasattr(Head(model, bits=8)._project, "_arrays")
    assert mx.array_equal(Head(model, bits=8, ids=ids)(hidden), head(hidden))
    monkeypatch.undo()
    if bits == 8:
        assert Head(model, bits=4)._project._mode == {"group_size": 64, "bits": 4}

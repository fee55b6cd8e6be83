"""Weights of block drafters are read once for a model, and go with it."""

from __future__ import annotations

import gc
import shutil
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.drafter import block, weights
from mlx_dgemma.drafter.block import Shared, make
from mlx_dgemma.errors import UsageError
from tests.decoding.runs import VOCAB, lively_model
from tests.drafter.blocks import HIDDEN, RAW
from tests.drafter.files import write_drafter


@pytest.fixture
def shared(monkeypatch):
    """Caches of this test alone; the folders that were read, and the heads that were made."""
    made = {"networks": [], "heads": []}
    own_read, own_head = weights.read, block.Head
    monkeypatch.setattr(weights, "read", lambda *given: made["networks"].append(given) or own_read(*given))
    monkeypatch.setattr(block, "Head", lambda *given: made["heads"].append(given) or own_head(*given))
    monkeypatch.setattr(block, "networks", Shared())
    monkeypatch.setattr(block, "heads", Shared())
    return made


def test_weights_are_read_once_for_a_model_and_its_options(model, folders, shared):
    one, other = make(model, folders("dflash")), make(model, folders("dflash"))
    assert one is not other
    assert one.network is other.network
    assert one._head is other._head
    assert one._cache is not other._cache
    for options in ({"draft_head_bits": 4}, {"draft_vocab": 9}, {"draft_vocab": [3]}):
        for _ in range(2):
            again = make(model, folders("dflash"), **options)
            assert again.name != one.name
            assert again.network is one.network  # its heads differ alone
    assert len(shared["networks"]) == 1
    assert len(shared["heads"]) == 4
    quantised = make(model, folders("dflash"), drafter_bits=4)
    assert quantised.network is not one.network
    assert quantised.name != one.name
    by_range, by_count = (make(model, folders("dflash"), draft_vocab=given) for given in (range(9), 9))
    assert by_range.name == by_count.name
    make(model, folders("dspark"))
    make(lively_model(hidden_size=HIDDEN), folders("dflash"))
    assert len(shared["networks"]) == 4


def test_a_folder_that_is_written_again_is_read_again(model, folders, shared, tmp_path):
    folder = shutil.copytree(folders("dflash"), tmp_path / "drafter")
    one = make(model, str(folder))
    for file in folder.iterdir():
        file.touch()
    other = make(model, str(folder))
    assert other.network is not one.network
    assert mx.array_equal(other.network.fc.weight, one.network.fc.weight)
    write_drafter(folder, RAW["dspark"])
    assert make(model, str(folder)).network.config.markov_rank == 8
    assert len(shared["networks"]) == 3
    assert len(shared["heads"]) == 1


def test_a_vocabulary_is_read_and_checked_once(model, folders, shared, tmp_path, monkeypatch):
    file, reads = tmp_path / "ids.json", []
    own = block.read_vocabulary
    monkeypatch.setattr(block, "read_vocabulary", lambda *given: reads.append(given) or own(*given))
    file.write_text("[3, 4]")
    for given in (file, str(file), [5, 6], (5, 6), np.array([5, 6])):
        for _ in range(2):
            drafter = make(model, folders("dflash"), draft_vocab=given)
            assert drafter._head.size == 2
    assert len(reads) == 2
    file.write_text("[3, 4, 5]")
    assert make(model, folders("dflash"), draft_vocab=file)._head.size == 3
    assert len(reads) == 3


def test_the_latest_few_are_kept(model, folders, shared):
    for count in range(1, 9):
        make(model, folders("dflash"), draft_vocab=count)
        make(model, folders("dflash"), draft_vocab=1)  # in use
    assert len(block.heads.entries) == block.KEPT
    assert len(shared["heads"]) == 8
    make(model, folders("dflash"), draft_vocab=2)
    assert len(shared["heads"]) == 9


def test_what_fails_is_not_kept(model, folders, shared):
    for _ in range(2):
        with pytest.raises(UsageError):
            make(model, folders("dflash"), draft_vocab=VOCAB + 1)
    assert block.heads.entries == []


def test_weights_go_with_their_model(folders, shared):
    model = lively_model(hidden_size=HIDDEN)
    options = ({}, {"draft_head_bits": 4}, {"draft_vocab": 9})
    drafters = [weakref.ref(make(model, folders("dflash"), **given).network) for given in options]
    gc.collect()
    assert all(reference() is not None for reference in drafters)
    for made in shared.values():
        made.clear()
    alive, embedding = weakref.ref(model), weakref.ref(model.model.decoder.embed_tokens)
    del model
    gc.collect()
    assert alive() is None
    assert embedding() is None
    assert block.heads.entries == block.networks.entries == []
    assert all(reference() is None for reference in drafters)

"""The block drafter against mlx-vlm's modules, with a drafter in plain float64 NumPy as the arbiter.

The measure is that of `mlx_dgemma.parity`: our error in float32 is at most 4 times what mlx-vlm makes
of float32, or 4 roundings of the largest value. Needs mlx-vlm: without it these fail, they never skip.
"""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.drafter import block, weights
from tests.drafter.arbiter import CONFIGS, MIDDLE, SHORT, arbiter, random_weights, shapes
from tests.drafter.files import write
from tests.drafter.judge import (
    MAX_RATIO,
    embedding,
    main_model,
    our_drafter,
    ours,
    random_features,
    ratio,
    their_drafter,
    theirs,
)

pytestmark = pytest.mark.reference


# --- judged


def judged(raw: dict, length: int, chunk: int, seed: int = 0) -> float:
    """The worst ratio of a case; the tokens are compared too, nan if they differ."""
    given, features = random_weights(raw, seed), random_features(raw, length)
    truth = arbiter(raw, given, embedding(raw), features)
    other = theirs(their_drafter(raw, given), features)
    own = ours(our_drafter(raw, given), features, chunk)
    assert other.tokens == truth.tokens
    worst = ratio(own, truth, other)
    return worst if own.tokens == truth.tokens else float("nan")


@pytest.mark.parametrize("length", [SHORT, MIDDLE])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_near_to_the_truth_as_mlx_vlm(name, length):
    for chunk in (1000, 33, 1):
        assert judged(CONFIGS[name], length, chunk) <= MAX_RATIO


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", ["sliding", "dspark", "confidence, sliding"])
def test_with_other_weights(name, seed):
    assert judged(CONFIGS[name], 37, 8, seed=seed) <= MAX_RATIO


LONG = 2600


@pytest.mark.parametrize("chunk", [512, 4000])
@pytest.mark.parametrize(
    "name",
    ["full", "sliding", "dspark, not from the anchor"],
)
def test_far_from_the_start(name, chunk):
    """mlx-vlm's frequencies drift there, so float32 NumPy with the right ones is the floor."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, LONG)
    truth = arbiter(raw, given, embedding(raw), features)
    floor = arbiter(raw, given, embedding(raw), features, dtype=np.float32)
    own = ours(our_drafter(raw, given), features, chunk)
    assert ratio(own, truth, floor) <= MAX_RATIO
    assert own.tokens == truth.tokens


@pytest.mark.parametrize("name", ["full", "sliding", "dspark", "confidence", "causal, sliding"])
def test_without_context(name):
    """A prompt of one token."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, 0)
    truth, floor = (arbiter(raw, given, embedding(raw), features, dtype=dtype) for dtype in (np.float64, np.float32))
    own = ours(our_drafter(raw, given), features, 1)
    assert ratio(own, truth, floor) <= MAX_RATIO
    assert own.tokens == truth.tokens


def test_the_correction_decides():
    """Or the comparisons would say nothing about it."""
    for name in ("dspark", "dspark, not from the anchor"):
        raw = CONFIGS[name]
        given, features = random_weights(raw), random_features(raw, MIDDLE)
        plain = {key: 0 * array if "markov" in key else array for key, array in given.items()}
        corrected, uncorrected = (arbiter(raw, some, embedding(raw), features).tokens for some in (given, plain))
        assert sum(a != b for a, b in zip(corrected, uncorrected, strict=True)) >= 2
        assert len(set(corrected)) >= 4


# --- files


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_either_spelling_are_read_alike(tmp_path, name, prefix):
    raw, length = CONFIGS[name], 40
    given, features = random_weights(raw), random_features(raw, length)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    named = {prefix + key: mx.array(array) for key, array in given.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), named)
    drafter = block.make(main_model(raw["vocab_size"]), str(tmp_path))
    expected = ours(our_drafter(raw, given), features, 9)
    got = ours(drafter, features, 9)
    assert (got.logits == expected.logits).all()
    assert got.tokens == expected.tokens
    assert sorted(given) == sorted(shapes(raw))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_is_read_by_mlx_vlm(tmp_path, name):
    from mlx_vlm.speculative.drafters import load_drafter

    raw, length = CONFIGS[name], MIDDLE
    given, features = random_weights(raw), random_features(raw, length)
    drafter = our_drafter(raw, given)
    write(drafter.network, tmp_path / "ours", mx.float32)
    loaded, kind = load_drafter(str(tmp_path / "ours"))
    assert kind == "dflash"
    assert type(loaded).__name__ == (
        "DSparkDraftModel" if "markov_rank" in raw["dflash_config"] else "DFlashDraftModel"
    )
    got = theirs(loaded, features)
    truth = arbiter(raw, given, embedding(raw), features)
    assert got.tokens == truth.tokens == ours(drafter, features, 1000).tokens
    direct = theirs(their_drafter(raw, given), features)
    assert (got.logits == direct.logits).all()


def test_written_in_bfloat16_it_is_read_by_mlx_vlm(tmp_path):
    from mlx_vlm.speculative.drafters import load_drafter

    raw = CONFIGS["confidence, sliding"]
    write(our_drafter(raw, random_weights(raw)).network, tmp_path / "ours")
    loaded, _ = load_drafter(str(tmp_path / "ours"))
    assert loaded.fc.weight.dtype == mx.bfloat16
    read = weights.read(tmp_path / "ours", main_model(131))
    assert mx.array_equal(read.fc.weight, loaded.fc.weight.astype(mx.float32))

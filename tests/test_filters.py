"""Filters of ar mode against their definitions, written out in numpy, and against transformers' own."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.filters import process, recent, shape

VOCAB = 61
OFF = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GRID = [
    OFF.replace(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 1.7), (0, 1, 9, VOCAB, 999), (0.01, 0.5, 0.95, 1.0), (0.0, 0.05, 0.4, 1.0)
    )
]


def logits(rows: int = 6, vocab: int = VOCAB, seed: int = 0) -> mx.array:
    return mx.random.normal((rows, vocab), key=mx.random.key(seed)) * 2.5


def softmax(z: np.ndarray) -> np.ndarray:
    shares = np.exp(z - z.max())
    return shares / shares.sum()


def kept_by_definition(row: np.ndarray, config: GenerationConfig) -> np.ndarray:
    """The ids that are left after each filter in turn, most likely first; no two logits are equal."""
    z = row.astype(np.float64) / config.temperature
    ids = np.argsort(-z)
    if config.top_k:
        ids = ids[: config.top_k]
    if config.top_p < 1:
        ids = ids[: 1 + np.count_nonzero(np.cumsum(softmax(z[ids])) < config.top_p)]
    shares = softmax(z[ids])
    return ids[shares >= config.min_p * shares[0]]


def kept(scores: mx.array) -> list[set[int]]:
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in np.array(scores)]


@pytest.mark.parametrize("config", GRID, ids=lambda c: f"T{c.temperature}-k{c.top_k}-p{c.top_p}-m{c.min_p}")
def test_shape_is_each_filter_in_turn(config):
    z = logits()
    scores = shape(z, config)
    wanted = [kept_by_definition(row, config) for row in np.array(z)]
    assert kept(scores) == [set(ids.tolist()) for ids in wanted]
    for row, scored, ids in zip(np.array(z), np.array(scores), wanted, strict=True):
        np.testing.assert_allclose(scored[ids], row[ids] / config.temperature, rtol=1e-6)


def of(*shares: float) -> mx.array:
    """Logits of these probabilities, in one row."""
    return mx.log(mx.array([shares]))


def test_the_order_of_filters():
    """Cases by hand, each of which another order would decide otherwise."""
    z = of(0.5, 0.2, 0.1, 0.1, 0.1)
    assert kept(shape(z, OFF.replace(top_p=0.69))) == [{0, 1}]
    assert kept(shape(z, OFF.replace(top_p=0.69, top_k=2))) == [{0}], "top-k leaves the first a share of 0.71"
    z = of(0.6, 0.3, 0.1)
    assert kept(shape(z, OFF.replace(top_p=0.55))) == [{0}]
    assert kept(shape(z, OFF.replace(top_p=0.55, temperature=3.0))) == [{0, 1}], "top-p after temperature"
    assert kept(shape(z, OFF.replace(min_p=0.3))) == [{0, 1}]
    assert kept(shape(z, OFF.replace(min_p=0.3, temperature=0.5))) == [{0}], "min-p after temperature"
    assert kept(shape(z, OFF.replace(min_p=0.3, temperature=2.0))) == [{0, 1, 2}]


def test_min_p_is_a_share_of_the_most_likely():
    """0.2 of 0.4 is 0.08: just above stays, just below goes."""
    assert kept(shape(of(0.0801, 0.0799, 0.4, 0.36), OFF.replace(min_p=0.2))) == [{0, 2, 3}]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, range(VOCAB)),
        ({"top_k": VOCAB}, range(VOCAB)),
        ({"top_k": 10 * VOCAB}, range(VOCAB)),
        ({"top_k": VOCAB - 1}, set(range(VOCAB)) - {17}),
        ({"top_k": 1}, [40]),
        ({"top_p": 1e-6}, [40]),
        ({"min_p": 1.0}, [40]),
        ({"temperature": 1e-6, "top_p": 0.99}, [40]),
        ({"temperature": 1e-6, "min_p": 1e-30}, [40]),
        ({"temperature": 1e6, "min_p": 0.9999}, range(VOCAB)),
    ],
)
def test_the_ends_of_every_range(options, left):
    z = np.random.default_rng(0).uniform(-20, 20, (1, VOCAB)).astype(np.float32)
    z[0, 40], z[0, 17] = 25, -25
    scores = shape(mx.array(z), OFF.replace(**options))
    assert kept(scores) == [set(left)]
    assert mx.isfinite(scores[0, 40]) and not mx.isnan(scores).any()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 2}, {0, 1, 3, 4}),
        ({"top_k": 4}, {0, 1, 3, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.45}, {0, 1, 3, 4}),
        ({"min_p": 0.49}, {0, 1, 3, 4}),
        ({"min_p": 0.51}, {1}),
        ({"top_k": 2, "top_p": 0.9}, {0, 1, 3, 4}),
    ],
)
def test_equals_are_kept_together(options, left):
    assert kept(shape(of(0.19, 0.38, 0.04, 0.19, 0.19, 0.01), OFF.replace(**options))) == [left]
    for every in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}):
        assert kept(shape(mx.zeros((1, 8)), OFF.replace(**every))) == [set(range(8))]


def test_minus_infinity_stays_out():
    """What a bias or a mask has forbidden is not drawn, also where every filter is off."""
    z = mx.where(mx.arange(VOCAB) < 5, logits(2), -mx.inf)
    for config in GRID:
        assert all(ids <= set(range(5)) for ids in kept(shape(z, config)))


@pytest.mark.parametrize("config", GRID[::7])
def test_a_row_scores_the_same_in_any_company(config):
    """Bit for bit."""
    z = logits(17, 3000)
    together = shape(z, config)
    for first, last in [(0, 1), (5, 6), (3, 8), (16, 17), (1, 17)]:
        assert mx.array_equal(shape(z[first:last], config), together[first:last])


# ---- bias and penalty

PENALTIES = [OFF.replace(repetition_penalty=penalty, repetition_context_size=6) for penalty in (1.6, 0.7)]


def penalised(row: np.ndarray, seen: set[int], config: GenerationConfig) -> np.ndarray:
    row = row.astype(np.float64)
    for token, value in config.logit_bias.items():
        row[token] += value
    for token in seen:
        row[token] *= config.repetition_penalty if row[token] < 0 else 1 / config.repetition_penalty
    return row


TEXT = [5, 9, 9, 5, 5, 60, 0, 31, 9, 2, 2, 2, 44, 9, 17, 5, 0, 60, 1, 3]


@pytest.mark.parametrize("config", PENALTIES)
@pytest.mark.parametrize("bias", [{}, {9: 30.0, 60: -30.0, 8: 1, 0: 0.5}])
@pytest.mark.parametrize("start", [0, 1, 4, 6, 11, 16])
def test_process_is_bias_then_a_penalty_for_what_a_row_has_seen(config, bias, start):
    """However often an id was seen, it is penalised once; a bias may turn the sign that the penalty goes by."""
    config = config.replace(logit_bias=bias)
    known, block = TEXT[:start], TEXT[start : start + 4]
    z = logits(len(block))
    before = np.array(z)
    got = np.array(process(z, recent(known, mx.array(block), config), config))
    for i, row in enumerate(before):
        seen = set([*known, *block[: i + 1]][-6:])
        np.testing.assert_allclose(got[i], penalised(row, seen, config), rtol=1e-5, atol=1e-6)
    assert np.array_equal(np.array(z), before)


def test_without_bias_and_penalty_nothing_changes():
    z = logits()
    assert recent(TEXT, mx.array([1, 2]), OFF) is None
    assert mx.array_equal(process(z, None, OFF), z)


def test_the_bias_can_forbid_and_force():
    z = process(logits(), None, OFF.replace(logit_bias={4: 1e4, 5: -1e4}))
    assert mx.argmax(z, axis=-1).tolist() == [4] * 6
    assert mx.argmin(z, axis=-1).tolist() == [5] * 6


@pytest.mark.parametrize("size", [1, 2, 6, 20, 500])
@pytest.mark.parametrize("start", [0, 1, 3, 10, 19])
def test_recent_is_the_end_of_what_each_row_has_seen(size, start):
    config = OFF.replace(repetition_penalty=2.0, repetition_context_size=size)
    known, block = TEXT[:start], TEXT[start:]
    seen = recent(known, mx.array(block), config)
    assert seen.shape == (len(block), min(size, len(TEXT))), "no wider than there are tokens"
    for i, row in enumerate(seen.tolist()):
        assert set(row) == set([*known, *block[: i + 1]][-size:])
    alone = [recent(TEXT[:end], mx.array(TEXT[end : end + 1]), config) for end in range(start, len(TEXT))]
    assert [set(row) for row in seen.tolist()] == [set(row[0].tolist() if row.ndim > 1 else row) for row in alone]


@pytest.mark.parametrize("config", PENALTIES)
def test_a_row_is_penalised_the_same_in_any_company(config):
    z, known, block = logits(5), TEXT[:8], TEXT[8:13]
    config = config.replace(logit_bias={3: 1.25})
    together = process(z, recent(known, mx.array(block), config), config)
    for i in range(5):
        seen = recent(known + block[:i], mx.array(block[i : i + 1]), config)
        assert mx.array_equal(process(z[i : i + 1], seen, config), together[i : i + 1])


# ---- transformers


@pytest.mark.reference
@pytest.mark.parametrize("config", [config for config in GRID if config.top_k <= VOCAB])
def test_shape_equals_transformers(config):
    import torch
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    z = logits(12, seed=5)
    warpers = [TemperatureLogitsWarper(config.temperature)]
    warpers += [TopKLogitsWarper(config.top_k)] if config.top_k else []
    warpers += [TopPLogitsWarper(config.top_p), MinPLogitsWarper(config.min_p)]
    scores = torch.tensor(np.array(z))
    for warper in warpers:
        scores = warper(None, scores)
    ours = shape(z, config)
    assert kept(ours) == kept(scores.numpy())
    np.testing.assert_allclose(np.array(ours), scores.numpy(), rtol=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_penalty_equals_transformers(penalty):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    config = OFF.replace(repetition_penalty=penalty, repetition_context_size=len(TEXT))
    processor, known, block = RepetitionPenaltyLogitsProcessor(penalty), TEXT[:12], TEXT[12:]
    z = logits(len(block), seed=6)
    ours = process(z, recent(known, mx.array(block), config), config)
    for i, row in enumerate(np.array(z)):
        theirs = processor(torch.tensor([known + block[: i + 1]]), torch.tensor(row[None]))
        np.testing.assert_allclose(np.array(ours[i]), theirs[0].numpy(), rtol=1e-6)

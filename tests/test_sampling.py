import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.draws import TILE, Draws
from mlx_dgemma.sampling import SoftmaxSums, StopRule, accept, summarise, temperature
from tests.helpers import random_model, with_text


def test_temperature_falls_from_t_max_to_just_above_t_min():
    config = GenerationConfig(t_min=0.4, t_max=0.8, max_denoising_steps=48)
    assert temperature(config, 48) == pytest.approx(0.8, abs=1e-7)
    assert temperature(config, 1) == pytest.approx(0.4 + 0.4 / 48, abs=1e-7)


def test_entropy_in_slices_at_the_real_vocabulary():
    """Peaked logits over 262,144 ids, against float64: 1.5e-5 at most, as measured for this formula."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 262_144)) * np.array([[0.1], [1.0], [3.0], [0.5]])
    z[3, 77] += 30.0
    z = z.astype(np.float32)
    exact = z.astype(np.float64)
    shares = np.exp(exact - exact.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    expected = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
    sums = SoftmaxSums()
    for first in range(0, z.shape[1], 5 * TILE):
        sums.add(mx.array(z[:, first : first + 5 * TILE]))
    np.testing.assert_allclose(np.array(sums.entropy), expected, atol=2e-5)
    np.testing.assert_allclose(np.array(sums.shares(mx.array(z[:, 70:80]))), shares[:, 70:80], rtol=2e-5)


@pytest.mark.parametrize("softcapped", [True, False])
def test_summaries_do_not_depend_on_the_slices(softcapped):
    """The vocabulary of three tiles and a bit, in slices of one tile and whole."""
    model = random_model(with_text(vocab_size=3 * TILE + 77, final_logit_softcapping=30.0 if softcapped else 1e4))
    mx.random.seed(3)
    hidden = mx.random.normal((2, 5, 24)) * 4
    steps = [
        summarise(model, hidden, 0.7, Draws([1, 2], model.config.vocab_size).token(0, 0, 5), chunk)
        for chunk in (TILE, 2 * TILE, 8 * TILE)
    ]
    for step in steps[1:]:
        assert mx.array_equal(step.best, steps[0].best)
        assert mx.array_equal(step.draw, steps[0].draw)
        assert mx.allclose(step.entropy, steps[0].entropy, atol=1e-5)
        assert mx.allclose(step.soft, steps[0].soft, rtol=1e-4, atol=1e-5)
    z = model.logits(hidden) / 0.7
    assert mx.array_equal(steps[0].best, mx.argmax(z, axis=-1))
    assert mx.allclose(steps[0].soft, model.soft_embedding(z), rtol=1e-4, atol=1e-5)


def test_in_bf16_slices_round_as_the_whole_does():
    """The shares are rounded to bf16 and multiplied once, however the vocabulary was cut up."""
    model = random_model(with_text(vocab_size=3 * TILE + 77))
    model.set_dtype(mx.bfloat16)
    hidden = (mx.random.normal((1, 5, 24)) * 4).astype(mx.bfloat16)
    draws = Draws([1], model.config.vocab_size)
    sliced, whole = (summarise(model, hidden, 0.7, draws.token(0, 0, 5), chunk) for chunk in (TILE, 8 * TILE))
    assert sliced.soft.dtype == mx.bfloat16
    assert mx.allclose(sliced.soft, whole.soft, rtol=0.004, atol=1e-5)
    assert mx.array_equal(whole.soft, model.soft_embedding(model.logits(hidden) / 0.7))
    assert mx.array_equal(sliced.best, whole.best)


def test_summaries_never_hold_the_whole_vocabulary():
    """Peak memory grows by slices, not by the (C, V) float32 array, which would be 21 MB here."""
    model = random_model(with_text(vocab_size=20 * TILE))
    hidden = mx.random.normal((1, 64, 24))
    mx.eval(hidden)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    step = summarise(model, hidden, 0.7, Draws([1], model.config.vocab_size).token(0, 0, 64), TILE)
    mx.eval(step.best, step.draw, step.entropy, step.soft)
    assert mx.get_peak_memory() - before < 0.75 * 64 * 20 * TILE * 4


def test_acceptance_is_anew_by_ascending_entropy_until_the_bound():
    entropy = mx.array([[0.06, 0.01, 0.5, 0.03, 0.02], [0.2, 0.3, 0.4, 0.5, 0.6]])
    # sums of what is before: 0, .01, .03, .06 (within .1), .12 (not)
    assert accept(entropy, 0.1).tolist() == [[True, True, False, True, True], [True, False, False, False, False]]
    assert accept(entropy, 0.05).tolist()[0] == [False, True, False, True, True]


def test_acceptance_against_a_plain_loop():
    rng = np.random.default_rng(1)
    for _ in range(50):
        entropy = rng.exponential(0.05, size=(1, 33)).astype(np.float32)
        kept, before = np.zeros(33, bool), 0.0
        for position in np.argsort(entropy[0], kind="stable"):
            kept[position] = before <= 0.1
            before += float(entropy[0, position])
        got = np.array(accept(mx.array(entropy), 0.1))[0]
        near = abs(np.cumsum(np.sort(entropy[0])) - np.sort(entropy[0]) - 0.1).min() < 1e-6
        assert near or (got == kept).all()


def canvases(*rows: list[int]) -> list[mx.array]:
    return [mx.array([row]) for row in rows]


def test_the_stop_rule_wants_equal_canvases_and_low_entropy():
    sure, unsure = mx.array([[0.001, 0.002]]), mx.array([[0.001, 0.02]])
    config = GenerationConfig(stability_threshold=2, confidence_threshold=0.005)
    a, b = canvases([1, 2], [1, 3])
    stop = StopRule(config)
    seen = [stop(*step).item() for step in [(a, sure), (a, sure), (b, sure), (b, sure), (b, unsure), (b, sure)]]
    assert seen == [False, False, False, False, False, True]
    assert StopRule(GenerationConfig(stability_threshold=0))(a, sure).item()
    assert not StopRule(GenerationConfig(stability_threshold=0))(a, unsure).item()

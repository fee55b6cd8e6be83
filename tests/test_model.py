"""Properties of the model that need no reference; sameness with it is in tests/parity."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import layers
from mlx_dgemma.layers import Rotary, gated_gelu, rotary_periods
from mlx_dgemma.model import Taps
from tests.helpers import random_model, with_text

PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 33, 23, 84, 62, 64]])


@pytest.mark.parametrize(("head_dim", "theta", "factor"), [(32, 1e4, 1.0), (64, 1e6, 0.25), (512, 1e6, 0.25)])
def test_rotation_by_the_reference_frequencies_at_any_position(head_dim, theta, factor):
    """Against sin and cos of float32 angles in float64: 2.4e-7 of the largest value, up to position 262,000."""
    turning = int(factor * head_dim // 2)
    inverse = np.zeros(head_dim // 2, np.float32)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(head_dim)
    inverse[:turning] = 1.0 / (np.float32(theta) ** exponents)
    x = np.random.default_rng(0).normal(size=(1, 2, 3, head_dim)).astype(np.float32)
    rotary = Rotary.__new__(Rotary)
    rotary.periods = mx.array(rotary_periods(head_dim, theta, factor))
    for offset in (0, 2_100, 262_000):
        angles = (np.arange(offset, offset + 3, dtype=np.float32)[:, None] * inverse).astype(np.float64)
        left, right = np.split(x.astype(np.float64), 2, axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        expected = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
        np.testing.assert_allclose(np.array(rotary(mx.array(x), offset)), expected, atol=3e-6)


def test_taps_are_the_outputs_of_layers_in_the_order_asked(tiny):
    taps = Taps([2, 0])
    hidden = tiny.encode(PROMPT, tiny.make_cache(), taps)
    assert taps.features.shape == (1, 20, 48)
    normed = tiny.model.decoder.norm(taps.features[..., :24])
    assert mx.array_equal(normed, hidden)
    only = Taps([0])
    tiny.encode(PROMPT, tiny.make_cache(), only)
    assert mx.array_equal(only.features, taps.features[..., 24:])


def test_logits_of_a_slice_are_a_slice_of_the_logits(tiny):
    hidden = tiny.encode(PROMPT, tiny.make_cache())
    whole = tiny.logits(hidden)
    assert whole.dtype == mx.float32
    assert mx.abs(whole).max() <= 30
    assert mx.allclose(tiny.logits(hidden, slice(40, 90)), whole[..., 40:90], atol=1e-5)
    ids = mx.array([5, 130, 7])
    assert mx.allclose(tiny.logits(hidden, ids), whole[..., ids], atol=1e-5)


def test_no_self_conditioning_is_self_conditioning_on_zeros(tiny):
    cache = tiny.make_cache()
    tiny.encode(PROMPT, cache)
    canvas = mx.arange(12)[None]
    zeros = mx.zeros((1, 12, 24))
    assert mx.array_equal(tiny.denoise_hidden(canvas, cache), tiny.denoise_hidden(canvas, cache, zeros))


def test_an_empty_prefix_can_be_denoised_behind(tiny):
    assert tiny.denoise_hidden(mx.arange(12)[None], tiny.make_cache()).shape == (1, 12, 24)


def test_attention_in_tiles_is_attention(tiny, monkeypatch):
    whole = tiny.encode(PROMPT, tiny.make_cache())
    monkeypatch.setattr(layers, "SCORES_BUDGET", 4 * 20 * 3)  # three queries a tile
    cache = tiny.make_cache()
    tiled = mx.concatenate([tiny.encode(PROMPT[:, :7], cache), tiny.encode(PROMPT[:, 7:], cache)], axis=1)
    assert mx.allclose(tiled, whole, rtol=1e-4, atol=1e-5)


def test_sorting_by_expert_changes_nothing(tiny, monkeypatch):
    few = tiny.encode(PROMPT, tiny.make_cache())
    monkeypatch.setattr(layers, "SORT_FROM", 1)
    assert mx.allclose(tiny.encode(PROMPT, tiny.make_cache()), few, rtol=1e-5, atol=1e-6)


def test_the_canvas_sees_the_window_of_the_prefix_and_no_more():
    """With sliding layers alone (but for the forced last one, cut off here) older tokens cannot matter."""
    model = random_model(with_text(num_hidden_layers=2, layer_types=["sliding_attention"] * 2))
    canvas = mx.arange(12)[None]

    def first_layer(prompt: mx.array) -> mx.array:
        cache = model.make_cache()
        model.encode(prompt, cache)
        run = layers.Pass(cache, model.config.sliding_window, 12, causal=False)
        return model.layers[0](model.embed(canvas), run, mx.ones((1,)))

    changed_far, changed_near = np.array(PROMPT), np.array(PROMPT)
    changed_far[0, 20 - 9] = 99  # window 9: a canvas sees the last 8
    changed_near[0, 20 - 8] = 99
    base = first_layer(PROMPT)
    assert mx.array_equal(first_layer(mx.array(changed_far)), base)
    assert not mx.array_equal(first_layer(mx.array(changed_near)), base)


def test_gelu_without_a_compiler():
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(np.array(gated_gelu(mx.array(x), mx.ones(101))), expected, atol=1e-6)

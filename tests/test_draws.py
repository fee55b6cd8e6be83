"""Golden values: changing them changes the output of every seed."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.draws import CANVAS, NEXT, TILE, TOKEN, Draws, GumbelDraw, RecordedDraws, address_hash


def test_golden_hashes():
    assert [hex(h) for h in address_hash(0, CANVAS, 0, 0, np.arange(2))] == ["0xf42d6406c73d0f29", "0xc2a676f48f334d1c"]
    assert hex(address_hash(2**64 - 1, TOKEN, 3, 7, 255)[0]) == "0xf7bc48dab3b5a3a3"


def documented_hash(*fields: int) -> int:
    """The hash as the module's docstring has it, in Python integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    state = 0x243F6A8885A308D3
    for field in fields:
        state = mix(state ^ mix((field + 0x9E3779B97F4A7C15) % 2**64))
    return state


def test_the_hash_is_the_documented_one():
    for fields in [(0, 0, 0, 0, 0), (17, 1, 2, 3, 4), (2**64 - 1, 2, 1 << 20, 47, 255, 63)]:
        assert int(address_hash(*fields)[0]) == documented_hash(*fields)


def test_golden_ids_and_noise():
    draws = Draws([0, 123], 262_144)
    assert draws.canvas(0, 3).tolist() == [[250037, 199321, 81775], [188127, 258278, 222291]]
    assert draws.renoise(1, 2, 2).tolist() == [[23658, 235375], [57265, 158884]]
    noise = np.array(draws.token(0, 0, 2).noise(TILE, 3))
    np.testing.assert_allclose(noise[0, 0], [-0.821026802, 1.098838806, 1.273656964], rtol=1e-5)
    np.testing.assert_allclose(noise[1, 1], [0.048432615, 1.662603617, 2.353646517], rtol=1e-5)


def test_a_position_draws_the_same_whatever_the_shape():
    whole = Draws([5, 6], 10_000)
    alone = Draws([6], 10_000)
    assert whole.canvas(2, 40)[1, :7].tolist() == alone.canvas(2, 7)[0].tolist()
    a, b = whole.token(1, 3, 40), alone.token(1, 3, 7)
    assert mx.array_equal(a.noise(TILE, 3000)[1, :7], b.noise(0, 9000)[0, :, TILE : TILE + 3000])


def test_neighbours_draw_differently():
    draws = Draws([5], 1 << 20)
    seen = [draws.canvas(c, 8) for c in (0, 1)] + [draws.renoise(c, s, 8) for c in (0, 1) for s in (0, 1)]
    ids = np.array(mx.concatenate(seen, axis=1))[0]
    assert len(set(ids.tolist())) == len(ids)


def test_slices_make_the_same_choice_as_the_whole():
    mx.random.seed(1)
    z = mx.random.normal((2, 3, 3 * TILE - 100)) * 2
    whole, sliced = (Draws([1, 2], z.shape[-1]).token(0, 0, 3) for _ in range(2))
    whole.add(z, 0)
    for first in range(0, z.shape[-1], TILE):
        sliced.add(z[..., first : first + TILE], first)
    assert mx.array_equal(whole.ids, sliced.ids)
    with pytest.raises(ValueError, match="multiple of 4096"):
        sliced.add(z, 100)


def test_draws_follow_the_distribution():
    """Chi-square of 40,000 draws over 8 ids against softmax(z); 24.3 is the 0.999 quantile at 7 degrees."""
    z = mx.array([0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 0.2, -3.0])
    draw = GumbelDraw(address_hash(7, TOKEN, 0, 0, np.arange(40_000))[None])
    draw.add(mx.broadcast_to(z, (1, 40_000, 8)), 0)
    counts = np.bincount(np.array(draw.ids)[0], minlength=8)
    expected = np.array(mx.softmax(z)) * 40_000
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


def test_uniform_ids_are_uniform():
    counts = np.bincount(np.array(Draws([3], 16).canvas(0, 64_000))[0], minlength=16)
    assert ((counts - 4000) ** 2 / 4000).sum() < 37.7  # 0.999 quantile at 15 degrees


def test_recorded_ids_take_the_place_of_draws():
    draws = RecordedDraws([[[1, 2]]], [[[[3, 4]]]], [[[[5, 6]]]])
    token = draws.token(0, 0, 2)
    token.add(mx.zeros((1, 2, 9)), 0)
    assert token.ids.tolist() == [[3, 4]]
    assert draws.canvas(0, 2).tolist() == [[1, 2]]
    assert draws.renoise(0, 0, 2).tolist() == [[5, 6]]
    with pytest.raises(ValueError, match="shape"):
        draws.canvas(0, 3)


def test_golden_draws_of_ar_mode():
    draws = Draws([7], 262_144)
    assert hex(address_hash(7, NEXT, 0, 0, 1000)[0]) == "0xae0cb9eb43ba9488"
    noise = np.array(draws.next_token(999, 2).noise(0, 2))
    np.testing.assert_allclose(noise[0, 1], [0.068208568, 0.462595522], rtol=1e-5)


def test_an_absolute_position_draws_the_same_in_any_block():
    z = mx.random.normal((1, 9, 500), key=mx.random.key(3))
    draws = Draws([11], 500)
    whole = draws.next_token(20, 9)
    whole.add(z, 0)
    for first in range(9):
        one = draws.next_token(20 + first, 1)
        one.add(z[:, first : first + 1], 0)
        assert one.ids.item() == whole.ids[0, first].item()


def test_recorded_text_takes_the_place_of_draws():
    draws = RecordedDraws(text=[[5, 6, 7, 8]])
    draw = draws.next_token(1, 2)
    draw.add(mx.zeros((1, 2, 9)), 0)
    assert draw.ids.tolist() == [[6, 7]]
    with pytest.raises(ValueError, match="shape"):
        draws.next_token(3, 2)

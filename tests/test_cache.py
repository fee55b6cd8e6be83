import mlx.core as mx
import pytest

from mlx_dgemma.cache import GROWTH, LayerRows, PrefixCache
from mlx_dgemma.config import ModelConfig
from tests.helpers import TINY

WINDOW, SLACK = 8, 5  # TINY's window of 9 sees 8 rows before a position


def rows(first: int, count: int) -> mx.array:
    """(1, 1, count, 2) rows that tell their position."""
    return mx.broadcast_to(mx.arange(first, first + count, dtype=mx.float32)[None, None, :, None], (1, 1, count, 2))


def positions(array: mx.array) -> list[int]:
    return array[0, 0, :, 0].astype(mx.int32).tolist()


@pytest.mark.parametrize("chunks", [[1] * 700, [3, 200, 40, 300], [600], [255, 1, 256, 257], [5]])
def test_sliding_rows_are_the_last_window_in_order(chunks):
    layer, done = LayerRows(WINDOW, WINDOW + SLACK), 0
    for count in chunks:
        keys, values = layer.extend(rows(done, count), rows(done, count))
        expected = list(range(max(0, done - WINDOW), done + count))
        assert positions(keys) == positions(values) == expected
        done += count
    keys, _ = layer.beside(rows(done, 4), rows(done, 4))
    assert positions(keys) == list(range(max(0, done - WINDOW), done + 4))
    assert layer.end == done
    assert layer.keys.shape[2] <= WINDOW + SLACK + 3 * GROWTH


def test_full_rows_are_all_kept():
    layer = LayerRows()
    for first in range(0, 900, 100):
        keys, _ = layer.extend(rows(first, 100), rows(first, 100))
    assert positions(keys) == list(range(900))


@pytest.mark.parametrize("length", [3, 20, 700])
@pytest.mark.parametrize("count", range(SLACK + 1))
def test_slack_can_always_be_rolled_back(length, count):
    if count > length:
        return
    for chunk in (1, length):
        layer = LayerRows(WINDOW, WINDOW + SLACK)
        for first in range(0, length, chunk):
            layer.extend(rows(first, chunk), rows(first, chunk))
        assert layer.can_return_to(length - count)
        layer.end -= count
        keys, _ = layer.extend(rows(length - count, 2), rows(length - count, 2))
        after = length - count
        assert positions(keys) == list(range(max(0, after - WINDOW), after + 2))


def cache_of(length: int, chunk: int) -> PrefixCache:
    cache = PrefixCache(ModelConfig.from_dict(TINY).windows, slack=SLACK)
    for first in range(0, length, chunk):
        for layer in cache.layers:
            layer.extend(rows(first, chunk), rows(first, chunk))
    return cache


def test_rolling_back_more_than_is_there_raises_and_changes_nothing():
    cache = cache_of(1000, 500)
    with pytest.raises(ValueError, match="roll back"):
        cache.rollback(SLACK + 1)
    with pytest.raises(ValueError, match="roll back"):
        cache.rollback(-1)
    assert cache.length == 1000
    cache.rollback(SLACK)
    assert cache.length == 1000 - SLACK


def test_a_snapshot_survives_what_follows():
    cache = cache_of(300, 100)
    snapshot = cache.snapshot()
    cache.rollback(2)
    for layer in cache.layers:  # overwrite the rolled-back rows, and run on past a compaction
        layer.extend(rows(-50, 2), rows(-50, 2))
        for _ in range(400):
            layer.extend(rows(-7, 1), rows(-7, 1))
    other = PrefixCache(ModelConfig.from_dict(TINY).windows, slack=SLACK)
    for target in (cache, other):
        target.restore(snapshot)
        assert target.length == 300
        keys, _ = target.layers[0].extend(rows(300, 1), rows(300, 1))
        assert positions(keys) == list(range(300 - WINDOW, 301))
        keys, _ = target.layers[-1].extend(rows(300, 1), rows(300, 1))
        assert positions(keys) == list(range(301))
        target.restore(snapshot)


def test_a_snapshot_survives_writing_over_what_was_restored():
    cache = cache_of(300, 100)
    snapshot = cache.snapshot()
    for _ in range(2):
        cache.restore(snapshot)
        keys, _ = cache.layers[-1].beside(rows(0, 1), rows(0, 1))
        assert positions(keys)[-3:-1] == [298, 299]
        cache.restore(snapshot)
        cache.rollback(2)
        for layer in cache.layers:
            layer.extend(rows(-9, 2), rows(-9, 2))


def test_a_canvas_leaves_the_cache_as_it_was(tiny):
    cache = tiny.make_cache()
    prompt = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]])
    tiny.encode(prompt, cache)
    following = mx.array([[11, 12]])
    expected = tiny.encode(following, cache)
    cache.rollback(2)
    tiny.denoise_hidden(mx.arange(12)[None], cache)
    assert cache.length == prompt.shape[1]
    assert mx.array_equal(tiny.encode(following, cache), expected)


@pytest.mark.parametrize("length", [3, 40])
def test_an_interrupted_pass_leaves_the_cache_as_it_was(tiny, monkeypatch, length):
    """Ctrl-C between two layers: some have the new rows, some do not."""
    cache = tiny.make_cache()
    tiny.encode(mx.arange(2, 2 + length)[None], cache)
    following = mx.array([[11, 12]])
    expected = tiny.encode(following, cache)
    cache.rollback(2)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(tiny.layers[1].mlp), "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.encode(mx.array([[5, 6, 7]]), cache)
    assert {layer.end for layer in cache.layers} == {length}
    assert mx.array_equal(tiny.encode(following, cache), expected)

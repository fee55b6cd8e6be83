"""K/V of the encoded prefix, in order, for every layer.

    full layer      [0 ............................................. length)
    sliding layer                       [window - 1 | slack | room to grow )

Full layers keep every row. Sliding layers keep at least the last `window - 1 + slack` rows, in
order, in a buffer with room to grow: when it is full, it is compacted to those rows. So the last
`slack` tokens can be rolled back at any time and a whole window is still there. There is no ring.

No other module touches the arrays: they come in through `extend` and `beside`, and go out as views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .options import WIDEST_DRAFT

SLACK = WIDEST_DRAFT  # tokens that can be rolled back, unless another number is asked for
GROWTH = 256  # rows by which the buffer of a full layer grows at least, as in mlx_lm
# Free rows behind a compaction. While steps are launched ahead, MLX copies the buffer that a step writes
# into, so room that is not used costs time; a compaction every 64 tokens costs less.
SPARE = 64


@dataclass(frozen=True)
class Snapshot:
    """The state of a `PrefixCache` at one moment; holds views, copies nothing until rows are overwritten."""

    length: int
    layers: tuple[tuple[int, mx.array | None, mx.array | None], ...]  # (first position, keys, values)


class PrefixCache:
    """The keys and values of tokens [0, length), one `LayerRows` per layer.

    Args:
        windows: for each layer how many rows before a position it may see; None: all.
        slack: how many tokens can be rolled back after any number of tokens.
    """

    def __init__(self, windows: Sequence[int | None], slack: int = SLACK):
        if slack < 0:
            raise ValueError(f"slack must not be negative, not {slack}")
        self.slack = slack
        self.layers = [LayerRows() if window is None else LayerRows(window, window + slack) for window in windows]

    @property
    def length(self) -> int:
        """Tokens encoded so far."""
        return self.layers[-1].end

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens. Raises ValueError if rows needed then are gone."""
        if not 0 <= count <= self.length:
            raise ValueError(f"cannot roll back {count} of {self.length} tokens")
        after = self.length - count
        if any(not layer.can_return_to(after) for layer in self.layers):
            raise ValueError(f"cannot roll back {count} tokens: sliding layers keep {self.slack} beyond their window")
        for layer in self.layers:  # to the same length, also where a pass was interrupted between two layers
            layer.end = after

    def snapshot(self) -> Snapshot:
        """The present state, to `restore` later; unaffected by what happens to this cache."""
        return Snapshot(self.length, tuple(layer.state() for layer in self.layers))

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this cache, or of another one of the same model and slack."""
        if len(snapshot.layers) != len(self.layers):
            raise ValueError(f"a snapshot of {len(snapshot.layers)} layers does not fit {len(self.layers)}")
        for layer, (start, keys, values) in zip(self.layers, snapshot.layers, strict=True):
            layer.start, layer.end = start, snapshot.length
            # handles of our own: writing into an array in place must not reach the snapshot
            layer.keys, layer.values = (None, None) if keys is None else (keys[:], values[:])

    def arrays(self) -> list[mx.array]:
        """What has to be evaluated for the cache to be complete."""
        return [rows for layer in self.layers for rows in (layer.keys, layer.values) if rows is not None]


class CacheReader:
    """A `PrefixCache` to denoise behind, not to change: what a drafter is given."""

    def __init__(self, cache: PrefixCache):
        self._cache = cache
        self.layers = [_RowsReader(layer) for layer in cache.layers]

    @property
    def length(self) -> int:
        return self._cache.length


class _RowsReader:
    def __init__(self, rows: LayerRows):
        self.beside = rows.beside


class LayerRows:
    """Rows of one layer, positions [start, end), at the front of a larger buffer (B, H, capacity, D).

    Args:
        window: how many rows before a position it may see; None: all.
        kept: how many rows survive a compaction; None: all.
    """

    def __init__(self, window: int | None = None, kept: int | None = None):
        self.window, self.kept = window, kept
        self.start = self.end = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def extend(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append rows (B, H, L, D) for good; return the rows that the new ones may see, themselves last."""
        added = keys.shape[2]
        if self.kept is not None and added > GROWTH:  # a chunk of a prompt
            seen = self._replace(keys, values)
        else:
            seen = self._write(keys, values)
        self.end += added
        return seen

    def beside(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The visible prefix followed by rows that are not kept: a canvas."""
        return self._write(keys, values)

    def visible(self) -> int:
        """Rows of the prefix that the next position may see."""
        return self.end if self.window is None else min(self.window, self.end)

    def can_return_to(self, end: int) -> bool:
        needed = 0 if self.window is None else max(0, end - self.window)
        return self.start <= needed

    def state(self) -> tuple[int, mx.array | None, mx.array | None]:
        if self.keys is None:
            return self.start, None, None
        rows = self.end - self.start
        return self.start, self.keys[:, :, :rows], self.values[:, :, :rows]

    def _write(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Put rows behind the last kept one, where they stay until something else is written there."""
        self._make_room(keys, values)
        first = self.end - self.start
        last = first + keys.shape[2]
        self.keys[:, :, first:last] = keys
        self.values[:, :, first:last] = values
        seen = first - self.visible()
        return self.keys[:, :, seen:last], self.values[:, :, seen:last]

    def _replace(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append a long chunk to a sliding layer without a buffer that could hold it: keep its tail alone."""
        used, visible = self.end - self.start, self.visible()
        if self.keys is not None:
            keys = mx.concatenate([self.keys[:, :, :used], keys], axis=2)
            values = mx.concatenate([self.values[:, :, :used], values], axis=2)
        total = keys.shape[2]
        dropped = max(0, total - self.kept)
        self.keys = _resized(keys, keys, dropped, total, self.kept + SPARE)
        self.values = _resized(values, values, dropped, total, self.kept + SPARE)
        self.start += dropped
        return keys[:, :, used - visible :], values[:, :, used - visible :]

    def _make_room(self, keys: mx.array, values: mx.array) -> None:
        used, added = self.end - self.start, keys.shape[2]
        if self.keys is not None and used + added <= self.keys.shape[2]:
            return
        dropped = 0 if self.kept is None else max(0, used - self.kept)
        needed = used - dropped + added
        grown = -(-needed // GROWTH) * GROWTH if self.kept is None else needed + SPARE
        self.keys = _resized(self.keys, keys, dropped, used, grown)
        self.values = _resized(self.values, values, dropped, used, grown)
        self.start += dropped


def _resized(rows: mx.array | None, like: mx.array, first: int, last: int, capacity: int) -> mx.array:
    """Rows [first, last) of a buffer at the front of a new one."""
    batch, heads, _, size = like.shape
    room = mx.zeros((batch, heads, capacity - (last - first), size), like.dtype)
    return room if rows is None else mx.concatenate([rows[:, :, first:last], room], axis=2)

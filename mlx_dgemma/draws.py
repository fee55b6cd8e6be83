"""Every random draw, addressed by (seed, purpose, canvas, step, position), and its replacement by recorded ones.

Positions are relative to the canvas in diffusion mode; in ar mode, where canvas and step are 0, they
count from the first token of the prompt. No shape, chunk, width or batch enters an address, so the
same seed gives the same output however the work is cut up. MLX has no fold-in: a key comes from a
fixed hash of the address,

    h = PI;  for each field:  h = mix(h xor mix(field + GOLDEN))        (64 bits, wrapping)
    mix(x):  x ^= x >> 30;  x *= 0xBF58476D1CE4E5B9;  x ^= x >> 27;  x *= 0x94D049BB133111EB;  x ^= x >> 31

(mix is splitmix64's finaliser). A uniform id is `(h >> 32) * vocab_size >> 32`. A categorical draw
is argmax(z + g), where the Gumbel noise g of ids [4096 t, 4096 t + 4096) comes from the MLX key
(h >> 32, h & 0xFFFFFFFF) of the address with field t appended; the last tile is made whole and cut.
Changing any of this changes the output of every seed: golden values stand in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np

TILE = 4096
CANVAS, TOKEN, RENOISE, NEXT = 0, 1, 2, 3  # purposes

_PI, _GOLDEN = 0x243F6A8885A308D3, 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def address_hash(*fields: int | np.ndarray) -> np.ndarray:
    """The 64-bit hash of addresses; fields broadcast against each other."""
    state = np.array([_PI], dtype=np.uint64)
    for field in fields:
        field = np.asarray(field % (1 << 64) if isinstance(field, int) else field).astype(np.uint64)
        state = _mix(state ^ _mix(field + np.array([_GOLDEN], dtype=np.uint64)))
    return state


class TokenDraw(Protocol):
    """A categorical draw at every position, fed with the vocabulary slice by slice."""

    def add(self, z: mx.array, first: int) -> None:
        """Take in z (B, C, n), the processed logits of ids [first, first + n)."""

    @property
    def ids(self) -> mx.array:
        """The drawn ids, (B, C)."""


class Draws:
    """The draws of a batch, one seed per row."""

    def __init__(self, seeds: Sequence[int], vocab_size: int):
        self.vocab_size = vocab_size
        self._seeds = np.array([seed % (1 << 64) for seed in seeds], dtype=np.uint64)[:, None]  # (B, 1)

    def canvas(self, canvas: int, length: int) -> mx.array:
        """Uniform ids that a canvas starts from, (B, C)."""
        return self._uniform_ids(CANVAS, canvas, 0, length)

    def renoise(self, canvas: int, step: int, length: int) -> mx.array:
        """Uniform ids for the positions that `step` (0 is the first) does not accept, (B, C)."""
        return self._uniform_ids(RENOISE, canvas, step, length)

    def token(self, canvas: int, step: int, length: int) -> TokenDraw:
        """The categorical draw of every canvas position at `step`."""
        return GumbelDraw(address_hash(self._seeds, TOKEN, canvas, step, np.arange(length)))

    def next_token(self, first: int, length: int) -> TokenDraw:
        """The categorical draw, in ar mode, of the tokens at positions [first, first + length)."""
        return GumbelDraw(address_hash(self._seeds, NEXT, 0, 0, np.arange(first, first + length)))

    def _uniform_ids(self, purpose: int, canvas: int, step: int, length: int) -> mx.array:
        high = address_hash(self._seeds, purpose, canvas, step, np.arange(length)) >> np.uint64(32)
        return mx.array((high * np.uint64(self.vocab_size) >> np.uint64(32)).astype(np.int32))


class GumbelDraw:
    """argmax(z + g) over the vocabulary; addresses (B, C) are the hashes without the tile."""

    def __init__(self, addresses: np.ndarray):
        self._addresses = addresses
        self._best = RunningMax()

    def add(self, z: mx.array, first: int) -> None:
        if first % TILE:
            raise ValueError(f"vocabulary slices must start at a multiple of {TILE}, not at {first}")
        self._best.add(z + self.noise(first, z.shape[-1]), first)

    @property
    def ids(self) -> mx.array:
        return self._best.ids

    def noise(self, first: int, count: int) -> mx.array:
        """Gumbel noise of ids [first, first + count), (B, C, count)."""
        tiles = np.arange(first // TILE, -(-(first + count) // TILE))
        hashes = _mix(self._addresses[..., None] ^ _mix(tiles.astype(np.uint64) + np.array([_GOLDEN], np.uint64)))
        keys = np.stack([hashes >> np.uint64(32), hashes & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)
        uniform = mx.vmap(lambda key: mx.random.uniform(shape=(TILE,), key=key))(mx.array(keys.reshape(-1, 2)))
        uniform = uniform.reshape(*self._addresses.shape, -1)[..., :count]
        return -mx.log(-mx.log(uniform))


class RunningMax:
    """Maximum and its id over slices of the vocabulary; the first of equals wins, as in argmax."""

    def __init__(self) -> None:
        self.values: mx.array | None = None
        self.ids: mx.array | None = None

    def add(self, z: mx.array, first: int) -> None:
        ids = mx.argmax(z, axis=-1)
        values = mx.take_along_axis(z, ids[..., None], axis=-1)[..., 0]
        ids = ids.astype(mx.int32) + first
        if self.values is not None:
            better = values > self.values
            ids, values = mx.where(better, ids, self.ids), mx.where(better, values, self.values)
        self.ids, self.values = ids, values


class RecordedDraws:
    """Draws that were made elsewhere, put in place of ours.

    Args:
        canvases: the ids that canvas i started from, each (B, C).
        tokens: tokens[i][s], what step s of canvas i drew, each (B, C).
        renoise: renoise[i][s], the uniform ids of step s of canvas i, each (B, C).
        text: (B, N), the ids at positions 0 to N - 1 of ar mode, prompt included.
    """

    def __init__(
        self,
        canvases: Sequence = (),
        tokens: Sequence[Sequence] = (),
        renoise: Sequence[Sequence] = (),
        text: Sequence = ((),),
    ):
        self._canvases, self._tokens, self._renoise, self._text = canvases, tokens, renoise, text

    def canvas(self, canvas: int, length: int) -> mx.array:
        return self._checked(self._canvases[canvas], length)

    def renoise(self, canvas: int, step: int, length: int) -> mx.array:
        return self._checked(self._renoise[canvas][step], length)

    def token(self, canvas: int, step: int, length: int) -> TokenDraw:
        return RecordedToken(self._checked(self._tokens[canvas][step], length))

    def next_token(self, first: int, length: int) -> TokenDraw:
        return RecordedToken(self._checked([row[first : first + length] for row in self._text], length))

    @staticmethod
    def _checked(ids: Sequence, length: int) -> mx.array:
        ids = mx.array(ids).astype(mx.int32)
        if ids.ndim != 2 or ids.shape[1] != length:
            raise ValueError(f"recorded ids must have the shape (B, {length}), not {ids.shape}")
        return ids


class RecordedToken:
    """A categorical draw whose outcome is known."""

    def __init__(self, ids: mx.array):
        self.ids = ids

    def add(self, z: mx.array, first: int) -> None:
        pass

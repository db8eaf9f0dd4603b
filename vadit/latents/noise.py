"""Standard normal noise for posterior samples: a function of (seed, image id, place in the latent) alone.

`rng.normal` seeds a generator per row, which costs as much as all else that a loader does with a row of moments, four
times over. Here a row is hashed at once: word j of a row is a fixed random word, XORed with one key of the row,
multiplied by the other (odd) and mixed. Its two halves of 16 bits each pick one of 65,536 equally likely points of the
plane, two values: Box & Muller (1958) with the radius at the quantiles of its law and the angle turned by the golden
section from one point to the next. Mean and variance are those of the normal law to 1e-4, the largest value is 4.9.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from torch import Tensor

from vadit.runtime import rng

NUM_POINTS = 1 << 16
VALUES_PER_WORD = 4
_MIX = np.uint32(0x846CA68B)  # of lowbias32, https://nullprogram.com/blog/2018/07/31/
_GOLDEN_SECTION = 0.6180339887498949


def row_keys(seed: int, ids: Tensor) -> np.ndarray:
    """Two keys per row, uint32 (B, 2); the second is odd."""
    first = rng.integers(rng.fold(seed, "xor"), ids, 1 << 32).numpy()
    second = rng.integers(rng.fold(seed, "multiply"), ids, 1 << 32).numpy()
    return np.stack([first, second | 1], axis=1).astype(np.uint32)


class NoiseScratch:
    """Memory for the noise of up to `rows` rows of `size` values: one thread's, used again and again."""

    def __init__(self, rows: int, size: int) -> None:
        self._size = size
        self._num_words = -(-size // VALUES_PER_WORD)
        self._words = np.empty((rows, self._num_words), np.uint32)
        self._shifted = np.empty_like(self._words)
        self._points = np.empty((rows, 2 * self._num_words), np.intp)
        # four values come at a time; where rows are no multiple of that, they are cut out of this
        self._values = np.empty((rows, 2 * self._num_words), np.float64) if size % VALUES_PER_WORD else None

    def fill(self, keys: np.ndarray, out: np.ndarray) -> None:
        """Noise of the rows with these keys (see `row_keys`) to `out`, float32 (rows, size), contiguous."""
        rows = len(keys)
        words, shifted = self._words[:rows], self._shifted[:rows]
        np.bitwise_xor(_fixed_words(self._num_words), keys[:, :1], out=words)
        words *= keys[:, 1:]
        np.right_shift(words, 15, out=shifted)
        words ^= shifted
        words *= _MIX
        np.right_shift(words, 16, out=shifted)
        words ^= shifted
        points = self._points[:rows]
        np.copyto(points, words.view("<u2"))
        values = out.view(np.float64) if self._values is None else self._values[:rows]
        np.take(_plane(), points, out=values, mode="clip")  # "raise" would go through a second buffer
        if self._values is not None:
            out[...] = values.view(np.float32)[:, : self._size]


@lru_cache(maxsize=8)
def _fixed_words(count: int) -> np.ndarray:
    return rng.integers(rng.fold(0, "posterior words"), range(count), 1 << 32).numpy().astype(np.uint32)


@lru_cache(maxsize=1)
def _plane() -> np.ndarray:
    """The points, each two float32 in the bytes of a float64, (65536,)."""
    edges = np.arange(NUM_POINTS + 1) / NUM_POINTS
    # r^2 = -2 ln u; a cell of u stands for its mean of r^2, so that the variance is exact. Primitive: u ln u - u.
    primitive = edges * np.log(np.maximum(edges, 1e-300)) - edges
    radius = np.sqrt(-2 * NUM_POINTS * np.diff(primitive))
    angle = 2 * math.pi * (np.arange(NUM_POINTS) * _GOLDEN_SECTION % 1)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)
    return points.view(np.float64)[:, 0].copy()

"""Standard normal noise for posterior samples: a function of (seed, image id, place in the latent) alone.

`rng.normal` seeds a generator per row, which costs as much as all else that a loader does with a row of moments, four
times over. Here a row is hashed at once: word j of a row is a fixed random word, XORed with one key of the row,
multiplied by the other (odd) and mixed. Its two halves of 16 bits each pick one of 65,536 equally likely points of the
plane, two values: Box & Muller (1958) with the radius at the quantiles of its law and the angle turned by the golden
section from one point to the next. Mean and variance are those of the normal law to 1e-4, the largest value is 4.9.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vadit.runtime import rng

NUM_POINTS = 1 << 16
VALUES_PER_WORD = 4
_MIX = np.uint32(0x846CA68B)  # of lowbias32, https://nullprogram.com/blog/2018/07/31/
_GOLDEN_SECTION = 0.6180339887498949


def posterior_noise(seed: int, ids: Tensor, size: int) -> Tensor:
    """Float32 (B, size); row i is a function of (seed, ids[i]), the start of that of any larger size."""
    first = rng.integers(rng.fold(seed, "xor"), ids, 1 << 32).numpy()[:, None].astype(np.uint32)
    second = rng.integers(rng.fold(seed, "multiply"), ids, 1 << 32).numpy()[:, None].astype(np.uint32) | np.uint32(1)
    fixed, plane = _fixed_words(-(-size // VALUES_PER_WORD)), _plane()
    words = (fixed ^ first) * second
    words ^= words >> np.uint32(15)
    words *= _MIX
    words ^= words >> np.uint32(16)
    values = np.take(plane, words.view("<u2"), mode="clip")  # two float32 each; "raise" would go through another buffer
    return torch.from_numpy(values.view(np.float32)[:, :size])


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

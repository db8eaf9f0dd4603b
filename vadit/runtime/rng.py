"""Counter-based randomness: every value is a function of (seed, id) alone.

Nothing here holds state, so results do not depend on batch size, on the number of processes or on where a run was
resumed. Streams are told apart by the seed: `fold(seed, "flip", epoch)` and `fold(seed, "noise", epoch)` are
unrelated. The hash is SplitMix64 (Steele, Lea & Flood 2014), applied once per folded part.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_FEISTEL_ROUNDS = 8


def fold(*parts: int | str) -> int:
    """Hash integers (and names) into one seed in [0, 2**63); the order of the parts matters."""
    state = 0
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "little")
        state = _mix_int(((state ^ (part & _MASK64)) + _GOLDEN) & _MASK64)
    return state >> 1


def normal(seed: int, ids: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise (len(ids), *shape), float32 on the CPU; row i depends on (seed, ids[i]) alone."""
    row_seeds = seeds(seed, ids)
    noise = torch.empty((len(row_seeds), *shape), dtype=torch.float32)
    generator = torch.Generator()
    for row, row_seed in zip(noise, row_seeds, strict=True):
        generator.manual_seed(row_seed)
        row.normal_(generator=generator)
    return noise


def uniform(seed: int, ids: Sequence[int] | Tensor) -> Tensor:
    """Uniform float32 in [0, 1), shape (len(ids),): 24 random bits, so that 1.0 never comes out by rounding."""
    bits = _hash(seed, _as_uint64(ids)) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def integers(seed: int, ids: Sequence[int] | Tensor, high: int) -> Tensor:
    """Uniform int64 in [0, high), shape (len(ids),); 1 <= high <= 2**32 (bias below high / 2**32)."""
    assert 1 <= high <= 1 << 32, f"high {high} is outside [1, 2**32]"
    bits = _hash(seed, _as_uint64(ids)) >> np.uint64(32)
    return torch.from_numpy(((bits * np.uint64(high)) >> np.uint64(32)).astype(np.int64))


def seeds(seed: int, ids: Sequence[int] | Tensor) -> list[int]:
    """`fold(seed, id)` of each id."""
    return (_hash(seed, _as_uint64(ids)) >> np.uint64(1)).tolist()


def permute(positions: Tensor, n: int, seed: int) -> Tensor:
    """Where a keyed bijection of [0, n) sends `positions` (int64, any shape, each in [0, n)).

    A Feistel network permutes the next power of two; results outside [0, n) are sent through it again until they
    fall inside ("cycle walking", Black & Rogaway 2002), fewer than two passes on average. No table of n entries.
    """
    assert n >= 1, f"n {n} must be at least 1"
    values = positions.numpy().astype(np.uint64).ravel()
    assert values.size == 0 or int(values.max()) < n, f"positions must be in [0, {n})"
    num_bits = (n - 1).bit_length()
    keys = [fold(seed, "permute", number) for number in range(_FEISTEL_ROUNDS)]
    values = _feistel(values, num_bits, keys)
    while (outside := np.flatnonzero(values >= np.uint64(n))).size:
        values[outside] = _feistel(values[outside], num_bits, keys)
    return torch.from_numpy(values.astype(np.int64).reshape(positions.shape))


def _feistel(values: np.ndarray, num_bits: int, keys: Sequence[int]) -> np.ndarray:
    """A bijection of [0, 2**num_bits): each half in turn is XORed with a hash of the other (uint64 in and out)."""
    low_bits, high_bits = np.uint64(num_bits // 2), np.uint64(num_bits - num_bits // 2)
    low_mask, high_mask = np.uint64((1 << int(low_bits)) - 1), np.uint64((1 << int(high_bits)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_hash(key, high) & low_mask)
        else:
            high = high ^ (_hash(key, low) & high_mask)
    return (high << low_bits) | low


def _hash(seed: int, ids: np.ndarray) -> np.ndarray:
    """64 hashed bits per id (uint64 in and out); `_hash(s, i) >> 1` equals `fold(s, i)`."""
    state = np.uint64(_mix_int(((seed & _MASK64) + _GOLDEN) & _MASK64))
    mixed = (ids ^ state) + np.uint64(_GOLDEN)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(_MIX_1)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(_MIX_2)
    return mixed ^ (mixed >> np.uint64(31))


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK64
    return value ^ (value >> 31)


def _as_uint64(ids: Sequence[int] | Tensor) -> np.ndarray:
    """Ids as a flat uint64 array (negative ones wrap)."""
    tensor = ids if isinstance(ids, Tensor) else torch.tensor(list(ids), dtype=torch.int64)
    return tensor.cpu().to(torch.int64).reshape(-1).numpy().astype(np.uint64)

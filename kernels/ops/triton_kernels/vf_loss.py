"""The two matrix kernels of the vision-foundation loss in Triton. Formulas: kernels/ops/vf_loss.py.

Both compute the upper triangle of symmetric (N, N) matrices in tiles of 64x64 (larger ones spill registers on the
GPUs before Hopper) and store each value twice. `vf_gram` multiplies bfloat16 in tensor cores with float32 sums, float32
in float32; the norms are the diagonal of the raw product, so the tiles on it go first, in a launch of their own.
Shape suffixes: B batch, d latent channels, D feature channels, N positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

TILE = 64


@triton.jit
def _upper_tile(index, tiles):
    """(row, column) of the index-th tile of an upper triangle with `tiles` tiles per side, row by row."""
    row = 0
    while index >= tiles - row:
        index -= tiles - row
        row += 1
    return row, row + index


@triton.jit
def _product(a, b, rows, columns, positions, channels, STEP: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """a^T b of two (channels, positions) matrices, at `rows` and `columns`."""
    sums = tl.zeros((TILE, TILE), tl.float32)
    for first in range(0, channels, STEP):
        channel = first + tl.arange(0, STEP)[:, None]
        start = channel * positions
        left = tl.load(a + start + rows[None, :], mask=(channel < channels) & (rows < positions)[None, :], other=0.0)
        right = tl.load(
            b + start + columns[None, :], mask=(channel < channels) & (columns < positions)[None, :], other=0.0
        )
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
    return sums


@triton.jit
def _symmetric(values, rows, columns):
    """The part on and above the diagonal, mirrored: rounding may differ below it. Tiles above the diagonal stay."""
    return tl.where(rows[:, None] <= columns[None, :], values, tl.trans(values))


@triton.jit
def _store_twice(matrix, values, rows, columns, positions):
    """Store a tile and its mirror image (a tile on the diagonal, which is its own, twice in one place)."""
    inside = (rows < positions)[:, None] & (columns < positions)[None, :]
    tl.store(matrix + rows[:, None] * positions + columns[None, :], values, mask=inside)
    mirrored = (columns < positions)[:, None] & (rows < positions)[None, :]
    tl.store(matrix + columns[:, None] * positions + rows[None, :], tl.trans(values), mask=mirrored)


@triton.jit
def _inverse(squared_norm):
    """1 / norm; 0 for a vector without a direction (kernels/ops/vf_loss.py, MIN_SQUARED_NORM)."""
    return tl.where(squared_norm > 1e-24, tl.rsqrt(squared_norm), 0.0)


@triton.jit
def _gram(
    cosines,
    inverse_norm,
    features,
    positions,
    channels,
    tiles,
    tiles_per_image,
    DIAGONAL: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    image = (tl.program_id(0) // tiles_per_image).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_image
    features += image * channels * positions
    cosines += image * positions * positions
    inverse_norm += image * positions
    if DIAGONAL:
        rows = tile * TILE + tl.arange(0, TILE)
        raw = _product(features, features, rows, rows, positions, channels, STEP, TILE, UPCAST)
        squares = tl.where(rows[:, None] == rows[None, :], raw, 0.0)
        row_inverse = _inverse(tl.sum(squares, axis=1))
        column_inverse = _inverse(tl.sum(squares, axis=0))
        tl.store(inverse_norm + rows, row_inverse, mask=rows < positions)
        values = _symmetric(raw * row_inverse[:, None] * column_inverse[None, :], rows, rows)
        _store_twice(cosines, values, rows, rows, positions)
    else:
        row_tile, column_tile = _upper_tile(tile, tiles - 1)
        rows = row_tile * TILE + tl.arange(0, TILE)
        columns = (column_tile + 1) * TILE + tl.arange(0, TILE)
        raw = _product(features, features, rows, columns, positions, channels, STEP, TILE, UPCAST)
        row_inverse = tl.load(inverse_norm + rows, mask=rows < positions, other=0.0)
        column_inverse = tl.load(inverse_norm + columns, mask=columns < positions, other=0.0)
        _store_twice(cosines, raw * row_inverse[:, None] * column_inverse[None, :], rows, columns, positions)


@triton.jit
def _distmat(
    sign,
    sums,
    u,
    v,
    cosines,
    positions,
    channels,
    tiles,
    tiles_per_image,
    margin,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
):
    image = (tl.program_id(0) // tiles_per_image).to(tl.int64)
    row_tile, column_tile = _upper_tile(tl.program_id(0) % tiles_per_image, tiles)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    u += image * channels * positions
    v += image * channels * positions
    gram = _product(u, v, rows, columns, positions, channels, STEP, TILE, False)
    inside = (rows < positions)[:, None] & (columns < positions)[None, :]
    target = cosines + image * positions * positions + rows[:, None] * positions + columns[None, :]
    gap = gram - tl.load(target, mask=inside, other=0.0)
    excess = tl.abs(gap) - margin
    # Written so that a NaN stays one. The values above the diagonal stand for their mirror images too.
    times = tl.where(rows[:, None] < columns[None, :], 2.0, tl.where(rows[:, None] == columns[None, :], 1.0, 0.0))
    loss = tl.where(inside, tl.where(excess <= 0, 0.0, excess) * times, 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(loss, axis=1), axis=0))
    direction = tl.where(gap > 0, 1, tl.where(gap < 0, -1, 0))
    values = _symmetric(tl.where(excess > 0, direction, 0).to(tl.int8), rows, columns)
    _store_twice(sign + image * positions * positions, values, rows, columns, positions)


def _decide_gram(images: int, channels: int, positions: int, diagonal: bool, dtype: torch.dtype) -> common.Decision:
    """bfloat16: steps of 64 channels, three of them in flight. float32 has no tensor cores to wait for."""
    tiles, narrow = triton.cdiv(positions, TILE), dtype == torch.bfloat16
    tiles_per_image = tiles if diagonal else tiles * (tiles - 1) // 2
    constants = {"DIAGONAL": diagonal, "STEP": 64 if narrow else 32, "TILE": TILE, "UPCAST": common.INTERPRETED}
    options = {"num_warps": 4, "num_stages": 3 if narrow else 2}
    return images * tiles_per_image, (positions, channels, tiles, tiles_per_image), constants | options


def _decide_distmat(images: int, channels: int, positions: int, margin: float) -> common.Decision:
    tiles = triton.cdiv(positions, TILE)
    tiles_per_image = tiles * (tiles + 1) // 2
    options = {"STEP": 32, "TILE": TILE, "num_warps": 4, "num_stages": 2}
    return images * tiles_per_image, (positions, channels, tiles, tiles_per_image, margin), options


def vf_gram(features_BDN: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines between the positions of each image, (B, N, N), and the inverse norms of the features, (B, N)."""
    features_BDN = features_BDN.contiguous()
    B, D, N = features_BDN.shape
    cosines_BNN = torch.empty((B, N, N), dtype=torch.float32, device=features_BDN.device)
    inverse_norm_BN = torch.empty((B, N), dtype=torch.float32, device=features_BDN.device)
    if not features_BDN.numel():
        return cosines_BNN.zero_(), inverse_norm_BN.zero_()
    for diagonal in (True, False) if N > TILE else (True,):
        sizes = (B, D, N, diagonal, features_BDN.dtype)
        common.launch(_gram, _decide_gram, sizes, cosines_BNN, inverse_norm_BN, features_BDN)
    return cosines_BNN, inverse_norm_BN


def vf_distmat(u_BdN: Tensor, v_BdN: Tensor, cosines_BNN: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """mean(relu(|gap| - margin)) of gap = u^T v - cosines, which is symmetric, and sign(gap), 0 within the margin."""
    u_BdN, v_BdN, cosines_BNN = u_BdN.contiguous(), v_BdN.contiguous(), cosines_BNN.contiguous()
    B, d, N = u_BdN.shape
    tiles = triton.cdiv(N, TILE)
    sign_BNN = torch.empty((B, N, N), dtype=torch.int8, device=u_BdN.device)
    sums = torch.empty(B * tiles * (tiles + 1) // 2, dtype=torch.float32, device=u_BdN.device)
    if sums.numel():
        common.launch(_distmat, _decide_distmat, (B, d, N, margin), sign_BNN, sums, u_BdN, v_BdN, cosines_BNN)
    # Without images this is 0 / 0: a mean over nothing is NaN, as in plain torch.
    return sums.sum() / sign_BNN.numel(), sign_BNN

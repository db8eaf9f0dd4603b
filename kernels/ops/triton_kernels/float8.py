"""Rows in float8 in Triton, and SwiGLU that writes them beside its bfloat16. Formulas: kernels/ops/float8.py.

A program sees whole rows, whose largest magnitude is their scale. Bytes moved: `float8_rows` reads 2K (of float32 4K)
and writes K per row; SwiGLU moves what kernels/ops/swiglu.py says and writes H (forward) or 2H bytes (backward) more.
Shape suffixes: M rows, K their width, H hidden width.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .swiglu import gate, gate_gradients

TILE = 4096
"""Elements of a program's tile, for 8 warps: two loads of 128 bits per thread in bfloat16."""
MAX: tl.constexpr = tl.constexpr(448.0)
TINY: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def _rows(program, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, rows):
    """Offsets (64 bits: rows times width passes 2^31) and mask of a tile, and its row numbers."""
    row = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    return row, row[:, None] * WIDTH + column[None, :], (row[:, None] < rows) & (column[None, :] < WIDTH)


@triton.jit
def _scale(largest):
    """Of rows by their largest magnitude; a row of zeros has some."""
    return tl.maximum(largest, TINY) / MAX


@triton.jit
def _cast(x8, scales, x, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, place, mask = _rows(tl.program_id(0), tl.arange(0, COLUMNS), WIDTH, ROWS, rows)
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    scale = _scale(tl.max(tl.abs(value), axis=1))
    tl.store(scales + row, scale, mask=row < rows)
    tl.store(x8 + place, (value / scale[:, None]).to(tl.float8e4nv), mask=mask)


@triton.jit
def _gate(y, y8, scales, x12, bias, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    row, place, mask = _rows(tl.program_id(0), column, WIDTH, ROWS, rows)
    first = x12 + place + row[:, None] * WIDTH
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + WIDTH, mask=mask, other=0.0).to(tl.float32)
    x1 += tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    x2 += tl.load(bias + WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]
    value = tl.where(mask, gate(x1, x2), 0.0)
    scale = _scale(tl.max(tl.abs(value), axis=1))
    tl.store(scales + row, scale, mask=row < rows)
    tl.store(y + place, value, mask=mask)
    tl.store(y8 + place, (value / scale[:, None]).to(tl.float8e4nv), mask=mask)


@triton.jit
def _gate_backward(
    dx12,
    dx12_8,
    scales,
    sums,
    dy,
    x12,
    bias,
    rows,
    tiles_per_program,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some tiles; `sums` (programs, 2 WIDTH) gets their column sums."""
    column = tl.arange(0, COLUMNS)
    bias_1 = tl.load(bias + column, mask=column < WIDTH, other=0.0)[None, :]
    bias_2 = tl.load(bias + WIDTH + column, mask=column < WIDTH, other=0.0)[None, :]
    sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tiles_per_program):
        row, place, mask = _rows(tl.program_id(0) * tiles_per_program + tile, column, WIDTH, ROWS, rows)
        grad = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        place += row[:, None] * WIDTH
        x1 = tl.load(x12 + place, mask=mask, other=0.0).to(tl.float32) + bias_1
        x2 = tl.load(x12 + place + WIDTH, mask=mask, other=0.0).to(tl.float32) + bias_2
        dx1, dx2 = gate_gradients(grad, x1, x2)
        scale = _scale(tl.max(tl.maximum(tl.abs(dx1), tl.abs(dx2)), axis=1))
        tl.store(scales + row, scale, mask=row < rows)
        tl.store(dx12 + place, dx1, mask=mask)
        tl.store(dx12 + place + WIDTH, dx2, mask=mask)
        tl.store(dx12_8 + place, (dx1 / scale[:, None]).to(tl.float8e4nv), mask=mask)
        tl.store(dx12_8 + place + WIDTH, (dx2 / scale[:, None]).to(tl.float8e4nv), mask=mask)
        sum_1 += dx1
        sum_2 += dx2
    out = sums + tl.program_id(0).to(tl.int64) * (2 * WIDTH) + column
    tl.store(out, tl.sum(sum_1, axis=0), mask=column < WIDTH)
    tl.store(out + WIDTH, tl.sum(sum_2, axis=0), mask=column < WIDTH)


@functools.cache
def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    warps = 8 if columns <= TILE else 16
    return {"WIDTH": width, "COLUMNS": columns, "ROWS": max(TILE // columns, 1), "num_warps": warps, "num_stages": 1}


def _decide(rows: int, width: int) -> common.Decision:
    tile = _tile(width)
    return triton.cdiv(rows, tile["ROWS"]), (rows,), tile


@functools.cache
def _tiles_per_program(rows: int, width: int) -> int:
    """Up to 64, as long as there are programs enough."""
    return min(max(triton.cdiv(rows, _tile(width)["ROWS"]) // common.PROGRAMS, 1), 64)


def _decide_backward(rows: int, width: int) -> common.Decision:
    # column sums are a lot of registers: twice the warps of the forward pass
    tile, tiles = {**_tile(width), "num_warps": 16}, _tiles_per_program(rows, width)
    return triton.cdiv(rows, tile["ROWS"] * tiles), (rows, tiles), tile


def _empty(like: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """A tensor for float8 rows (M, K), and one for their scales (M, 1)."""
    return like.new_empty(shape, dtype=torch.float8_e4m3fn), like.new_empty(shape[0], 1, dtype=torch.float32)


def float8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 and their scales (M, 1)."""
    x_MK = x_MK.contiguous()
    x8_MK, scales_M1 = _empty(x_MK, *x_MK.shape)
    if x_MK.numel():
        common.launch(_cast, _decide, tuple(x_MK.shape), x8_MK, scales_M1, x_MK)
    return x8_MK, scales_M1


def float8_swiglu(x12: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SwiGLU's product (M, H) in x12's dtype, its rows in float8, and their scales (M, 1)."""
    x12, rows, width = x12.contiguous(), x12.shape[0], x12.shape[1] // 2
    y_MH = x12.new_empty(rows, width)
    y8_MH, scales_M1 = _empty(x12, rows, width)
    if y_MH.numel():
        common.launch(_gate, _decide, (rows, width), y_MH, y8_MH, scales_M1, x12, bias.contiguous())
    return y_MH, y8_MH, scales_M1


def float8_swiglu_backward(dy_MH: Tensor, x12: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient for x12 (M, 2H), its rows in float8, their scales (M, 1), and the gradient for the bias."""
    dy_MH, x12 = dy_MH.contiguous(), x12.contiguous()
    sizes = rows, width = tuple(dy_MH.shape)
    dx12 = torch.empty_like(x12)
    dx12_8, scales_M1 = _empty(x12, rows, 2 * width)
    if not dy_MH.numel():
        return dx12, dx12_8, scales_M1, torch.zeros_like(bias)
    sums = bias.new_empty(_decide_backward(*sizes)[0], 2 * width)
    tensors = (dx12, dx12_8, scales_M1, sums, dy_MH, x12, bias.contiguous())
    common.launch(_gate_backward, _decide_backward, sizes, *tensors)
    return dx12, dx12_8, scales_M1, sums.sum(0)

"""SwiGLU in Triton: y = silu(x1) * x2 with x12 = [x1 | x2], and its gradient. Formulas: kernels/ops/swiglu.py.

Bytes moved: forward reads 2H and writes H elements per token, backward reads 3H and writes 2H, each once.
Shape suffixes: H hidden width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _tile(WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rows (64 bits: rows times width passes 2^31) and columns of this program's tile."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % parts) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column


@triton.jit
def _forward(y, x12, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column = _tile(WIDTH, COLUMNS, ROWS)
    mask = (row < rows) & (column < WIDTH)
    first = x12 + row * (2 * WIDTH) + column
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + WIDTH, mask=mask, other=0.0).to(tl.float32)
    # exp may overflow to infinity: the quotient is then the 0 that it should be.
    tl.store(y + row * WIDTH + column, x1 / (1 + tl.exp(-x1)) * x2, mask=mask)


@triton.jit
def _backward(dx12, dy, x12, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column = _tile(WIDTH, COLUMNS, ROWS)
    mask = (row < rows) & (column < WIDTH)
    first = row * (2 * WIDTH) + column
    x1 = tl.load(x12 + first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x12 + first + WIDTH, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-x1))
    tl.store(dx12 + first, grad * x2 * s * (1 + x1 * (1 - s)), mask=mask)
    tl.store(dx12 + first + WIDTH, grad * x1 * s, mask=mask)


def _decide(rows: int, width: int) -> common.Decision:
    """Tiles of 1024 elements for 4 warps, which is one 128-bit load of bfloat16 per thread and tensor (two of float32).

    Narrower tiles of several rows, where more than an eighth of the lanes would hang over the ends of rows.
    """
    sizes = (size for size in (1024, 512, 256) if 7 / 8 * triton.cdiv(width, size) * size <= width)
    columns = next(sizes, min(256, triton.next_power_of_2(width)))
    tile_rows = 1024 // columns
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns)
    return programs, (rows,), {"WIDTH": width, "COLUMNS": columns, "ROWS": tile_rows, "num_warps": 4, "num_stages": 1}


def swiglu(x12: Tensor) -> Tensor:
    """silu(first half) * second half along the last axis."""
    x12, width = x12.contiguous(), x12.shape[-1] // 2
    y = x12.new_empty(*x12.shape[:-1], width)
    if count := y.numel():
        common.launch(_forward, _decide, (count // width, width), y, x12)
    return y


def swiglu_backward(dy: Tensor, x12: Tensor) -> Tensor:
    """The gradient for x12."""
    dy, x12, width = dy.contiguous(), x12.contiguous(), x12.shape[-1] // 2
    dx12 = torch.empty_like(x12)
    if count := dy.numel():
        common.launch(_backward, _decide, (count // width, width), dx12, dy, x12)
    return dx12

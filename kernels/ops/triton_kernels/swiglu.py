"""SwiGLU in Triton: y = silu(x1) * x2 with [x1 | x2] = x12 + bias, and its gradients. Formulas: kernels/ops/swiglu.py.

Bytes moved: forward reads 2H and writes H elements per token, backward reads 3H and writes 2H, each once; with a bias a
program of the backward pass takes up to 64 tiles, and leaves their column sums.
Shape suffixes: H hidden width.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _columns(WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's number among those of its columns, and the columns."""
    parts: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    return program // parts, (program % parts) * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _rows(tile, ROWS: tl.constexpr):
    """64 bits: rows times width passes 2^31."""
    return (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)


@triton.jit
def _load_bias(bias, column, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """For every row of a tile: a broadcast would go through shared memory."""
    place = tl.broadcast_to(bias + column, (ROWS, column.shape[1]))
    return tl.load(place, mask=tl.broadcast_to(column < WIDTH, place.shape), other=0.0)


@triton.jit
def gate(x1, x2):
    """silu(x1) * x2. exp may overflow to infinity: the quotient is then the 0 that it should be."""
    return x1 / (1 + tl.exp(-x1)) * x2


@triton.jit
def gate_gradients(grad, x1, x2):
    """Those of `gate` for x1 and x2."""
    s = 1 / (1 + tl.exp(-x1))
    return grad * x2 * s * (1 + x1 * (1 - s)), grad * x1 * s


@triton.jit
def _forward(y, x12, bias, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    tile, column = _columns(WIDTH, COLUMNS)
    row = _rows(tile, ROWS)
    mask = (row < rows) & (column < WIDTH)
    first = x12 + row * (2 * WIDTH) + column
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + WIDTH, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        x1 += _load_bias(bias, column, WIDTH, ROWS)
        x2 += _load_bias(bias + WIDTH, column, WIDTH, ROWS)
    tl.store(y + row * WIDTH + column, gate(x1, x2), mask=mask)


@triton.jit
def _backward(
    dx12,
    sums,
    dy,
    x12,
    bias,
    rows,
    tiles,
    tiles_per_program,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx12 of some tiles; with a bias `sums` (programs, 2 WIDTH) gets their column sums."""
    program, column = _columns(WIDTH, COLUMNS)
    if bias is not None:
        bias_1 = _load_bias(bias, column, WIDTH, ROWS)
        bias_2 = _load_bias(bias + WIDTH, column, WIDTH, ROWS)
        sum_1 = tl.zeros((ROWS, COLUMNS), tl.float32)
        sum_2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = program * tiles_per_program
    for tile in range(begin, tl.minimum(begin + tiles_per_program, tiles)):
        row = _rows(tile, ROWS)
        mask = (row < rows) & (column < WIDTH)
        first = row * (2 * WIDTH) + column
        x1 = tl.load(x12 + first, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x12 + first + WIDTH, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            x1 += bias_1
            x2 += bias_2
        dx1, dx2 = gate_gradients(grad, x1, x2)
        tl.store(dx12 + first, dx1, mask=mask)
        tl.store(dx12 + first + WIDTH, dx2, mask=mask)
        if bias is not None:
            sum_1 += dx1
            sum_2 += dx2
    if bias is not None:
        out = sums + program.to(tl.int64) * (2 * WIDTH) + column
        tl.store(out, tl.sum(sum_1, axis=0, keep_dims=True), mask=column < WIDTH)
        tl.store(out + WIDTH, tl.sum(sum_2, axis=0, keep_dims=True), mask=column < WIDTH)


@functools.cache
def _tile(width: int) -> dict[str, int]:
    """Tiles of 1024 elements for 4 warps, which is one 128-bit load of bfloat16 per thread and tensor (two of float32).

    Narrower tiles of several rows, where more than an eighth of the lanes would hang over the ends of rows.
    """
    sizes = (size for size in (1024, 512, 256) if 7 / 8 * triton.cdiv(width, size) * size <= width)
    columns = next(sizes, min(256, triton.next_power_of_2(width)))
    return {"WIDTH": width, "COLUMNS": columns, "ROWS": 1024 // columns, "num_warps": 4, "num_stages": 1}


def _decide_forward(rows: int, width: int) -> common.Decision:
    tile = _tile(width)
    return triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(width, tile["COLUMNS"]), (rows,), tile


@functools.cache
def _programs(rows: int, width: int, biased: bool) -> tuple[int, int, int]:
    """Of the backward pass and a program's columns: tiles, tiles per program (up to 64 with sums), programs."""
    tile = _tile(width)
    tiles, parts = triton.cdiv(rows, tile["ROWS"]), triton.cdiv(width, tile["COLUMNS"])
    tiles_per_program = min(max(tiles * parts // common.PROGRAMS, 1), 64) if biased else 1
    return tiles, tiles_per_program, triton.cdiv(tiles, tiles_per_program)


def _decide_backward(rows: int, width: int, biased: bool) -> common.Decision:
    tile, (tiles, tiles_per_program, programs) = _tile(width), _programs(rows, width, biased)
    return programs * triton.cdiv(width, tile["COLUMNS"]), (rows, tiles, tiles_per_program), tile


def swiglu(x12: Tensor, bias: Tensor | None) -> Tensor:
    """silu(first half) * second half along the last axis, after adding the bias, if any."""
    x12, width = x12.contiguous(), x12.shape[-1] // 2
    bias = None if bias is None else bias.contiguous()
    y = x12.new_empty(*x12.shape[:-1], width)
    if count := y.numel():
        common.launch(_forward, _decide_forward, (count // width, width), y, x12, bias)
    return y


def swiglu_backward(dy: Tensor, x12: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients for x12 and the bias; the latter is of size 0 where there is none."""
    dy, x12, width = dy.contiguous(), x12.contiguous(), x12.shape[-1] // 2
    dx12 = torch.empty_like(x12)
    count = dy.numel()
    if bias is None or not count:
        if count:
            common.launch(_backward, _decide_backward, (count // width, width, False), dx12, None, dy, x12, None)
        return dx12, dy.new_zeros(0 if bias is None else 2 * width, dtype=torch.float32)
    sizes = (count // width, width, True)
    sums = bias.new_empty(_programs(*sizes)[2], 2 * width)
    common.launch(_backward, _decide_backward, sizes, dx12, sums, dy, x12, bias.contiguous())
    return dx12, sums.sum(0)

"""RMSNorm with modulation in Triton, and its gradients. Formulas: kernels/ops/rms_norm.py.

One warp holds one row in registers, in pieces that it reads with one 128-bit load per lane: 256 bfloat16 or 128 float32
columns. Rows of 1152 are 5 pieces, the last one half empty, where the next power of two (2048) would leave 44% of the
lanes idle; means over a row need no shared memory and no barrier. Wider rows, and those of 1152 in the backward pass,
which holds three times as much per row, get several warps (`_tile`).
Bytes moved: forward reads x and writes y; backward reads dy and x and writes dx, each once. Partial sums add 1/64 of
the float32 size of a tensor each.
Shape suffixes: B images, D channels.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _gain(weight, scale, offset, column, mask):
    """weight * (1 + scale), of the image whose modulation starts at `offset`.

    Loaded for every row of the tile: rows share cache lines, and a broadcast would go through shared memory.
    """
    gain = tl.load(tl.broadcast_to(weight + column, mask.shape), mask=mask, other=0.0)
    if scale is not None:
        gain *= 1 + tl.load(tl.broadcast_to(scale + offset + column, mask.shape), mask=mask, other=0.0)
    return gain


@triton.jit
def _forward(
    y, x, weight, scale, shift, rows, rows_per_image, eps, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    offset = (row // rows_per_image).to(tl.int64) * D
    start = row.to(tl.int64) * D
    pieces = ()
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        piece = tl.load(x + start + column, mask=(row < rows) & (column < D), other=0.0).to(tl.float32)
        squares += piece * piece
        pieces = pieces + (piece,)
    r = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < D)
        result = pieces[first // COLUMNS] * r * _gain(weight, scale, offset, column, mask)
        if shift is not None:
            result += tl.load(shift + offset + column, mask=mask, other=0.0)
        tl.store(y + start + column, result, mask=mask)


@triton.jit
def _backward(
    dx,
    sums,
    dy,
    x,
    weight,
    scale,
    rows_per_image,
    chunk,
    chunks,
    eps,
    MODULATED: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx of one chunk of an image's rows, and the chunk's sums of dy x r and (where MODULATED) of dy."""
    program = tl.program_id(0)
    image = program // chunks
    begin = (program % chunks) * chunk
    end = tl.minimum(begin + chunk, rows_per_image)
    offset = image.to(tl.int64) * D
    scaled_sums = ()
    plain_sums = ()
    for _ in tl.static_range(0, D, COLUMNS):
        scaled_sums = scaled_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        if MODULATED:
            plain_sums = plain_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for tile in range(begin, end, ROWS):
        row = tile + tl.arange(0, ROWS)[:, None]
        start = (image.to(tl.int64) * rows_per_image + row) * D
        x_pieces = ()
        dy_pieces = ()
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            mask = (row < end) & (column < D)
            x_piece = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
            dy_piece = tl.load(dy + start + column, mask=mask, other=0.0).to(tl.float32)
            squares += x_piece * x_piece
            products += x_piece * dy_piece * _gain(weight, scale, offset, column, mask)
            x_pieces = x_pieces + (x_piece,)
            dy_pieces = dy_pieces + (dy_piece,)
        r = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
        slope = r * r * (tl.sum(products, axis=1) / D)[:, None]
        new_scaled = ()
        new_plain = ()
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            x_piece = x_pieces[first // COLUMNS]
            dy_piece = dy_pieces[first // COLUMNS]
            mask = (row < end) & (column < D)
            g = dy_piece * _gain(weight, scale, offset, column, mask)
            tl.store(dx + start + column, r * (g - x_piece * slope), mask=mask)
            new_scaled = new_scaled + (scaled_sums[first // COLUMNS] + dy_piece * x_piece * r,)
            if MODULATED:
                new_plain = new_plain + (plain_sums[first // COLUMNS] + dy_piece,)
        scaled_sums = new_scaled
        plain_sums = new_plain
    kinds: tl.constexpr = 2 if MODULATED else 1
    sums += program.to(tl.int64) * kinds * D
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        tl.store(sums + column, tl.sum(scaled_sums[first // COLUMNS], axis=0), mask=column < D)
        if MODULATED:
            tl.store(sums + D + column, tl.sum(plain_sums[first // COLUMNS], axis=0), mask=column < D)


@triton.jit
def _finish(dscale, dshift, products, sums, weight, scale, chunks, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds an image's chunks: dscale = w P, dshift, and (1 + scale) P, whose sum over images is dweight."""
    parts: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    image = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < D
    scaled = tl.zeros((COLUMNS,), tl.float32)
    plain = tl.zeros((COLUMNS,), tl.float32)
    for chunk in range(chunks):
        first = sums + (image * chunks + chunk) * (2 * D) + column
        scaled += tl.load(first, mask=mask, other=0.0)
        plain += tl.load(first + D, mask=mask, other=0.0)
    out = image * D + column
    tl.store(dscale + out, scaled * tl.load(weight + column, mask=mask, other=0.0), mask=mask)
    tl.store(dshift + out, plain, mask=mask)
    if scale is not None:
        scaled *= 1 + tl.load(scale + out, mask=mask, other=0.0)
    tl.store(products + out, scaled, mask=mask)


def _tile(width: int, dtype: torch.dtype, elements: int) -> dict[str, int]:
    """Columns of a piece, rows of a tile, warps; a thread holds at most `elements` of a row."""
    vector = common.VECTOR_BYTES // dtype.itemsize
    columns = common.WARP * vector
    while triton.cdiv(width, columns) * vector > elements:
        columns *= 2
    warps = min(max(4, columns // (common.WARP * vector)), 16)
    rows = max(4 * common.WARP * vector // columns, 1)
    if width < columns:
        narrow = triton.next_power_of_2(width)
        columns, rows = narrow, rows * columns // narrow
    return {"COLUMNS": columns, "ROWS": rows, "num_warps": warps, "num_stages": 1}


@functools.cache
def _chunk(rows: int, width: int, dtype: torch.dtype) -> int:
    """Rows per program of the backward pass, of `rows` in all."""
    tile_rows = _tile(width, dtype, elements=24)["ROWS"]
    return max(min(triton.next_power_of_2(rows // common.PROGRAMS), 64), 16, tile_rows)


def _decide_forward(rows: int, rows_per_image: int, width: int, dtype: torch.dtype, eps: float) -> common.Decision:
    tile = _tile(width, dtype, elements=64)
    return triton.cdiv(rows, tile["ROWS"]), (rows, rows_per_image, eps), {"D": width, **tile}


def _decide_backward(
    images: int, rows_per_image: int, chunk: int, width: int, dtype: torch.dtype, modulated: bool, eps: float
) -> common.Decision:
    chunks = triton.cdiv(rows_per_image, chunk)
    constants = {"MODULATED": modulated, "D": width, **_tile(width, dtype, elements=24)}
    return images * chunks, (rows_per_image, chunk, chunks, eps), constants


def _decide_finish(images: int, chunks: int, width: int) -> common.Decision:
    columns = min(256, triton.next_power_of_2(width))
    constants = {"D": width, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
    return images * triton.cdiv(width, columns), (chunks,), constants


def rms_norm(x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight * (1 + scale) + shift, one scale and shift per image (first axis)."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    scale_BD = None if scale_BD is None else scale_BD.contiguous()
    shift_BD = None if shift_BD is None else shift_BD.contiguous()
    y = torch.empty_like(x)
    if count := x.numel():
        D = x.shape[-1]
        rows = count // D
        rows_per_image = rows if scale_BD is None and shift_BD is None else rows // x.shape[0]
        sizes = (rows, rows_per_image, D, x.dtype, eps)
        common.launch(_forward, _decide_forward, sizes, y, x, weight_D, scale_BD, shift_BD)
    return y


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, modulated: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for x, weight, scale and shift; the last two have no rows where nothing was modulated."""
    dy, x, weight_D = dy.contiguous(), x.contiguous(), weight_D.contiguous()
    scale_BD = None if scale_BD is None else scale_BD.contiguous()
    D, B = x.shape[-1], x.shape[0] if modulated else 0
    dx = torch.empty_like(x)
    count = x.numel()
    if not count:
        return dx, torch.zeros_like(weight_D), weight_D.new_zeros(B, D), weight_D.new_zeros(B, D)
    # Without modulation the rows of all images are alike: one image.
    rows, images = count // D, B if modulated else 1
    chunk = _chunk(rows, D, x.dtype)
    chunks = -(-rows // images // chunk)
    sums = weight_D.new_empty(images * chunks, 2 if modulated else 1, D)
    sizes = (images, rows // images, chunk, D, x.dtype, modulated, eps)
    common.launch(_backward, _decide_backward, sizes, dx, sums, dy, x, weight_D, scale_BD)
    dscale_BD, dshift_BD = weight_D.new_empty(B, D), weight_D.new_empty(B, D)
    if not modulated:
        return dx, sums[:, 0].sum(0), dscale_BD, dshift_BD
    products_BD = weight_D.new_empty(B, D)
    tensors = (dscale_BD, dshift_BD, products_BD, sums, weight_D, scale_BD)
    common.launch(_finish, _decide_finish, (B, chunks, D), *tensors)
    return dx, products_BD.sum(0), dscale_BD, dshift_BD

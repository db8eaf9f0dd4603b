"""RMSNorm with modulation in Triton, after a gated residual sum or alone, and its gradients: what the launchers of
rms_norm.py and gated_norm.py share. Formulas: kernels/ops/rms_norm.py and gated_norm.py.

One warp holds one row in registers, in pieces that it reads with one 128-bit load per lane: 256 bfloat16 or 128 float32
columns. Rows of 1152 are 5 pieces, the last one half empty, where the next power of two (2048) would leave 44% of the
lanes idle; means over a row need no shared memory and no barrier. Wider rows, and those of 1152 in the backward pass,
which holds several times as much per row, get several warps (`_tile`).
Where h is None there is no residual sum, and all that it needs vanishes at compile time.
Partial sums of the backward pass add 1/64 of the float32 size of a tensor for each kind of sum.
Weights and modulations are read and their gradients written in the dtypes that they have; rows of modulation may lie
apart, as parts of one linear layer's output do.
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
def _row(start, column, mask):
    """A row of a weight or modulation, for every row of the tile.

    Loaded again for each: they share cache lines, and a broadcast would go through shared memory.
    """
    return tl.load(tl.broadcast_to(start + column, mask.shape), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gain(weight, scale, offset, column, mask):
    """weight * (1 + scale), of the image whose scale starts at `offset`."""
    gain = _row(weight, column, mask)
    if scale is not None:
        gain *= 1 + _row(scale + offset, column, mask)
    return gain


@triton.jit
def _forward(
    y,
    total,
    x,
    h,
    gate,
    bias,
    weight,
    scale,
    shift,
    rows,
    rows_per_image,
    gate_stride,
    scale_stride,
    shift_stride,
    eps,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    image = (row // rows_per_image).to(tl.int64)
    start = row.to(tl.int64) * D
    pieces = ()
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < D)
        piece = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
        if h is not None:
            branch = tl.load(h + start + column, mask=mask, other=0.0).to(tl.float32)
            if bias is not None:
                branch += _row(bias, column, mask)
            piece += branch * _row(gate + image * gate_stride, column, mask)
            rounded = piece.to(total.dtype.element_ty)  # the backward pass norms what was stored
            tl.store(total + start + column, rounded, mask=mask)
            piece = rounded.to(tl.float32)
        squares += piece * piece
        pieces = pieces + (piece,)
    r = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < D)
        result = pieces[first // COLUMNS] * r * _gain(weight, scale, image * scale_stride, column, mask)
        if shift is not None:
            result += _row(shift + image * shift_stride, column, mask)
        tl.store(y + start + column, result, mask=mask)


@triton.jit
def _backward(
    dx,
    dh,
    sums,
    dy,
    dtotal,
    x,
    h,
    gate,
    weight,
    scale,
    rows_per_image,
    chunk,
    chunks,
    gate_stride,
    scale_stride,
    eps,
    SHIFTED: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx and dh of one chunk of an image's rows, and the chunk's sums of dy x r; dx h, dx (with h); dy (SHIFTED).

    x is what was normed: with h, the sum, and dtotal the gradient that reaches it from elsewhere.
    """
    program = tl.program_id(0)
    image = (program // chunks).to(tl.int64)
    begin = (program % chunks) * chunk
    end = tl.minimum(begin + chunk, rows_per_image)
    scale_row = image * scale_stride
    scaled_sums = ()
    branch_sums = ()
    total_sums = ()
    plain_sums = ()
    for _ in tl.static_range(0, D, COLUMNS):
        scaled_sums = scaled_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        if h is not None:
            branch_sums = branch_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
            total_sums = total_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
        if SHIFTED:
            plain_sums = plain_sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for tile in range(begin, end, ROWS):
        row = tile + tl.arange(0, ROWS)[:, None]
        start = (image * rows_per_image + row) * D
        # All loads of a tile start at once; pieces wait in the dtype that they have, which takes fewer registers.
        x_pieces = ()
        dy_pieces = ()
        h_pieces = ()
        dtotal_pieces = ()
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            mask = (row < end) & (column < D)
            x_pieces = x_pieces + (tl.load(x + start + column, mask=mask, other=0.0),)
            dy_pieces = dy_pieces + (tl.load(dy + start + column, mask=mask, other=0.0),)
            if h is not None:
                h_pieces = h_pieces + (tl.load(h + start + column, mask=mask, other=0.0),)
                dtotal_pieces = dtotal_pieces + (tl.load(dtotal + start + column, mask=mask, other=0.0),)
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            x_piece = x_pieces[first // COLUMNS].to(tl.float32)
            squares += x_piece * x_piece
            gain = _gain(weight, scale, scale_row, column, (row < end) & (column < D))
            products += x_piece * dy_pieces[first // COLUMNS].to(tl.float32) * gain
        r = tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]
        slope = r * r * (tl.sum(products, axis=1) / D)[:, None]
        new_scaled = ()
        new_branch = ()
        new_total = ()
        new_plain = ()
        for first in tl.static_range(0, D, COLUMNS):
            column = first + tl.arange(0, COLUMNS)[None, :]
            mask = (row < end) & (column < D)
            x_piece = x_pieces[first // COLUMNS].to(tl.float32)
            dy_piece = dy_pieces[first // COLUMNS].to(tl.float32)
            gradient = r * (dy_piece * _gain(weight, scale, scale_row, column, mask) - x_piece * slope)
            if h is not None:
                gradient += dtotal_pieces[first // COLUMNS].to(tl.float32)
                branch = h_pieces[first // COLUMNS].to(tl.float32)
                gated = gradient * _row(gate + image * gate_stride, column, mask)
                tl.store(dh + start + column, gated, mask=mask)
                new_branch = new_branch + (branch_sums[first // COLUMNS] + gradient * branch,)
                new_total = new_total + (total_sums[first // COLUMNS] + gradient,)
            tl.store(dx + start + column, gradient, mask=mask)
            new_scaled = new_scaled + (scaled_sums[first // COLUMNS] + dy_piece * x_piece * r,)
            if SHIFTED:
                new_plain = new_plain + (plain_sums[first // COLUMNS] + dy_piece,)
        scaled_sums = new_scaled
        branch_sums = new_branch
        total_sums = new_total
        plain_sums = new_plain
    before: tl.constexpr = 1 if h is None else 3
    kinds: tl.constexpr = before + 1 if SHIFTED else before
    sums += program.to(tl.int64) * kinds * D
    for first in tl.static_range(0, D, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < D
        tl.store(sums + column, tl.sum(scaled_sums[first // COLUMNS], axis=0), mask=mask)
        if h is not None:
            tl.store(sums + D + column, tl.sum(branch_sums[first // COLUMNS], axis=0), mask=mask)
            tl.store(sums + 2 * D + column, tl.sum(total_sums[first // COLUMNS], axis=0), mask=mask)
        if SHIFTED:
            tl.store(sums + before * D + column, tl.sum(plain_sums[first // COLUMNS], axis=0), mask=mask)


@triton.jit
def _finish(
    products,
    dgate,
    dscale,
    dshift,
    sums,
    gate,
    bias,
    weight,
    scale,
    chunks,
    gate_stride,
    scale_stride,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds an image's chunks: its modulation's gradients, and what it adds to those of weight and (with gate) bias."""
    parts: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    before: tl.constexpr = 1 if gate is None else 3
    kinds: tl.constexpr = before if dshift is None else before + 1
    shares: tl.constexpr = 1 if gate is None else 2
    image = (tl.program_id(0) // parts).to(tl.int64)
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < D
    scaled = tl.zeros((COLUMNS,), tl.float32)
    branch = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    plain = tl.zeros((COLUMNS,), tl.float32)
    for chunk in range(chunks):
        first = sums + (image * chunks + chunk) * (kinds * D) + column
        scaled += tl.load(first, mask=mask, other=0.0)
        if gate is not None:
            branch += tl.load(first + D, mask=mask, other=0.0)
            total += tl.load(first + 2 * D, mask=mask, other=0.0)
        if dshift is not None:
            plain += tl.load(first + before * D, mask=mask, other=0.0)
    out = image * D + column
    share = products + image * (shares * D) + column
    if dshift is not None:
        tl.store(dshift + out, plain, mask=mask)
    if gate is not None:
        tl.store(share + D, total * _row(gate + image * gate_stride, column, mask), mask=mask)
        if bias is not None:
            branch += total * _row(bias, column, mask)
        tl.store(dgate + out, branch, mask=mask)
    if scale is not None:
        tl.store(dscale + out, scaled * _row(weight, column, mask), mask=mask)
        scaled *= 1 + _row(scale + image * scale_stride, column, mask)
    tl.store(share, scaled, mask=mask)


@triton.jit
def _add_up(
    dweight,
    dbias,
    products,
    count,
    SHARES: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums over `count` images (or chunks, where there are none) of products (count, SHARES, D)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    weights = tl.zeros((ROWS, COLUMNS), tl.float32)
    biases = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(0, count, ROWS):
        row = (tile + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < count) & (column[None, :] < D)
        first = products + row * (SHARES * D) + column[None, :]
        weights += tl.load(first, mask=mask, other=0.0)
        if dbias is not None:
            biases += tl.load(first + D, mask=mask, other=0.0)
    tl.store(dweight + column, tl.sum(weights, axis=0), mask=column < D)
    if dbias is not None:
        tl.store(dbias + column, tl.sum(biases, axis=0), mask=column < D)


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


def _decide_forward(
    rows: int, rows_per_image: int, width: int, dtype: torch.dtype, strides: tuple[int, ...], eps: float
) -> common.Decision:
    tile = _tile(width, dtype, elements=64)
    return triton.cdiv(rows, tile["ROWS"]), (rows, rows_per_image, *strides, eps), {"D": width, **tile}


@functools.cache
def _chunk(rows: int, width: int, dtype: torch.dtype) -> int:
    """Rows per program of the backward pass, of `rows` in all."""
    tile_rows = _tile(width, dtype, elements=24)["ROWS"]
    return max(min(triton.next_power_of_2(rows // common.PROGRAMS), 64), 16, tile_rows)


def _decide_backward(
    images: int,
    rows_per_image: int,
    chunk: int,
    width: int,
    dtype: torch.dtype,
    shifted: bool,
    strides: tuple[int, ...],
    eps: float,
) -> common.Decision:
    chunks = triton.cdiv(rows_per_image, chunk)
    constants = {"SHIFTED": shifted, "D": width, **_tile(width, dtype, elements=24)}
    return images * chunks, (rows_per_image, chunk, chunks, *strides, eps), constants


def _decide_finish(images: int, chunks: int, width: int, strides: tuple[int, ...]) -> common.Decision:
    columns = min(256, triton.next_power_of_2(width))
    constants = {"D": width, "COLUMNS": columns, "num_warps": 4, "num_stages": 1}
    return images * triton.cdiv(width, columns), (chunks, *strides), constants


def _decide_add_up(count: int, shares: int, width: int) -> common.Decision:
    constants = {"SHARES": shares, "D": width, "ROWS": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}
    return triton.cdiv(width, 32), (count,), constants


def _rows(modulation_BD: Tensor | None) -> tuple[Tensor | None, int]:
    """A modulation whose channels lie side by side, and how far its rows lie apart."""
    if modulation_BD is None:
        return None, 0
    if modulation_BD.stride(1) != 1:
        modulation_BD = modulation_BD.contiguous()
    return modulation_BD, modulation_BD.stride(0)


def forward(
    x: Tensor,
    h: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    weight_D: Tensor,
    scale_BD: Tensor | None,
    shift_BD: Tensor | None,
    dtype: torch.dtype,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """x + gate * (h + bias), where h is given, and the norm of that, or of x, in `dtype`."""
    x, weight_D = x.contiguous(), weight_D.contiguous()
    h, bias_D = None if h is None else h.contiguous(), None if bias_D is None else bias_D.contiguous()
    (gate_BD, gate_stride), (scale_BD, scale_stride) = _rows(gate_BD), _rows(scale_BD)
    shift_BD, shift_stride = _rows(shift_BD)
    y, total = torch.empty_like(x, dtype=dtype), None if h is None else torch.empty_like(x)
    if count := x.numel():
        D = x.shape[-1]
        rows = count // D
        alike = gate_BD is None and scale_BD is None and shift_BD is None
        strides = (gate_stride, scale_stride, shift_stride)
        sizes = (rows, rows if alike else rows // x.shape[0], D, x.dtype, strides, eps)
        common.launch(_forward, _decide_forward, sizes, y, total, x, h, gate_BD, bias_D, weight_D, scale_BD, shift_BD)
    return total, y


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    h: Tensor | None,
    gate_BD: Tensor | None,
    bias_D: Tensor | None,
    weight_D: Tensor,
    scale_BD: Tensor | None,
    shift_BD: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """dx, dh, and the gradients of gate, bias, weight, scale and shift, which have no rows where there is none."""
    dy, x, weight_D = dy.contiguous(), x.contiguous(), weight_D.contiguous()
    if h is not None and dtotal is not None:
        h, dtotal = h.contiguous(), dtotal.contiguous()
    (gate_BD, gate_stride), (scale_BD, scale_stride) = _rows(gate_BD), _rows(scale_BD)
    dx, dh = torch.empty_like(x), None if h is None else torch.empty_like(h)
    D, count = x.shape[-1], x.numel()
    given = (gate_BD, bias_D, weight_D, scale_BD, shift_BD)
    if not count:
        return dx, dh, [x.new_zeros(0, D) if t is None else t.new_zeros(t.shape) for t in given]
    grads = [None if t is None else t.new_empty(t.shape) for t in given]
    dgate_BD, dbias_D, dweight_D, dscale_BD, dshift_BD = grads
    # Without modulation the rows of all images are alike: one image.
    images = 1 if gate_BD is None and scale_BD is None and shift_BD is None else x.shape[0]
    rows, shares = count // D, 1 if h is None else 2
    chunk = _chunk(rows, D, x.dtype)
    chunks = -(-rows // images // chunk)
    kinds = (1 if h is None else 3) + (shift_BD is not None)
    sums = x.new_empty(images * chunks, kinds, D, dtype=torch.float32)
    strides = (gate_stride, scale_stride)
    sizes = (images, rows // images, chunk, D, x.dtype, shift_BD is not None, strides, eps)
    common.launch(_backward, _decide_backward, sizes, dx, dh, sums, dy, dtotal, x, h, gate_BD, weight_D, scale_BD)
    products, count = sums, chunks
    if images > 1 or kinds > 1 or scale_BD is not None:
        products, count = x.new_empty(images, shares, D, dtype=torch.float32), images
        tensors = (products, dgate_BD, dscale_BD, dshift_BD, sums, gate_BD, bias_D, weight_D, scale_BD)
        common.launch(_finish, _decide_finish, (images, chunks, D, strides), *tensors)
    common.launch(_add_up, _decide_add_up, (count, shares, D), dweight_D, dbias_D, products)
    return dx, dh, [x.new_empty(0, D) if t is None else t for t in grads]

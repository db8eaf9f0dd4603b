"""GroupNorm + SiLU on channels-last images in Triton, and its gradients. Formulas: kernels/ops/group_norm_silu.py.

An image is rows of C channels. A program takes a chunk of its rows and up to 128 channels. A group may have any width
and lie across threads: sums are kept per channel until a small kernel adds up the chunks and the channels of a group.
Bytes moved: forward reads x twice and writes y; backward reads dy and x twice and writes dx. Partial sums add 8 bytes
per channel and chunk of at least 32 rows.
Shape suffixes: B images, N rows, C channels, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

MAX_COLUMNS = 128


@triton.jit
def _place(rows, chunk, chunks, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: its image, its chunk's number among all, the chunk's rows in the image, its columns."""
    parts: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    index = tl.program_id(0) // parts
    begin = (index % chunks) * chunk
    column = (tl.program_id(0) % parts) * COLUMNS + tl.arange(0, COLUMNS)
    return (index // chunks).to(tl.int64), index.to(tl.int64), begin, tl.minimum(begin + chunk, rows), column


@triton.jit
def _moments(partial, x, rows, chunk, chunks, C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A chunk's mean and squared deviations from it, per channel. Sums are of differences to its first row."""
    image, index, begin, end, column = _place(rows, chunk, chunks, C, COLUMNS)
    start = x + image * rows * C + column
    origin = tl.load(start + begin.to(tl.int64) * C, mask=column < C, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(begin, end, ROWS):
        row = tile + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (column < C)[None, :]
        value = tl.load(start[None, :] + row.to(tl.int64) * C, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, value - origin[None, :], 0.0)
        sums += difference
        squares += difference * difference
    total = tl.sum(sums, axis=0)
    mean = total / (end - begin)
    out = partial + index * (2 * C) + column
    tl.store(out, origin + mean, mask=column < C)
    tl.store(out + C, tl.sum(squares, axis=0) - total * mean, mask=column < C)


@triton.jit
def _group(partial, chunks, G: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: its image, its group's channels, which of the columns they fill, where their sums begin."""
    image = (tl.program_id(0) // G).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    channel = (tl.program_id(0) % G) * (C // G) + column
    return image, channel, column < C // G, partial + image * chunks * (2 * C) + channel


@triton.jit
def _statistics(
    mean, rstd, partial, rows, chunk, chunks, eps, G: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one group, by Chan et al. (1979)."""
    _, _, inside, start = _group(partial, chunks, G, C, COLUMNS)
    count = rows * (C // G) * 1.0
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, chunks, ROWS):
        index = first + tl.arange(0, ROWS)[:, None]
        size = tl.minimum(chunk, rows - index * chunk).to(tl.float32)
        mask = (index < chunks) & inside[None, :]
        sums += size * tl.load(start[None, :] + index.to(tl.int64) * (2 * C), mask=mask, other=0.0)
    center = tl.sum(tl.sum(sums, axis=1), axis=0) / count
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, chunks, ROWS):
        index = first + tl.arange(0, ROWS)[:, None]
        size = tl.minimum(chunk, rows - index * chunk).to(tl.float32)
        mask = (index < chunks) & inside[None, :]
        place = start[None, :] + index.to(tl.int64) * (2 * C)
        off = tl.load(place, mask=mask, other=0.0) - center
        sums += tl.where(mask, tl.load(place + C, mask=mask, other=0.0) + size * off * off, 0.0)
    variance = tl.sum(tl.sum(sums, axis=1), axis=0) / count
    tl.store(mean + tl.program_id(0), center)
    tl.store(rstd + tl.program_id(0), 1 / tl.sqrt(variance + eps))


@triton.jit
def _per_channel(values, image, column, G: tl.constexpr, C: tl.constexpr):
    """Each channel's number of an (images, groups) tensor."""
    return tl.load(values + image * G + column // (C // G), mask=column < C, other=0.0)[None, :]


@triton.jit
def _affine(weight, bias, mean, rstd, image, column, G: tl.constexpr, C: tl.constexpr):
    """Each channel's mean, rstd, weight and bias."""
    w = tl.load(weight + column, mask=column < C, other=0.0)[None, :]
    b = tl.load(bias + column, mask=column < C, other=0.0)[None, :]
    return _per_channel(mean, image, column, G, C), _per_channel(rstd, image, column, G, C), w, b


@triton.jit
def _tile(tile, image, rows, end, column, C: tl.constexpr, ROWS: tl.constexpr):
    """Mask and offsets of an image's rows from `tile` on."""
    row = tile + tl.arange(0, ROWS)[:, None]
    return (row < end) & (column < C)[None, :], (image * rows + row) * C + column[None, :]


@triton.jit
def _forward(
    y, x, weight, bias, mean, rstd, rows, chunk, chunks, SILU: tl.constexpr, G: tl.constexpr, C: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image, _, begin, end, column = _place(rows, chunk, chunks, C, COLUMNS)
    center, scale, w, b = _affine(weight, bias, mean, rstd, image, column, G, C)
    for tile in range(begin, end, ROWS):
        mask, place = _tile(tile, image, rows, end, column, C, ROWS)
        z = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - center) * scale * w + b
        if SILU:  # exp may overflow to infinity: the quotient is then the 0 that it should be
            z = z / (1 + tl.exp(-z))
        tl.store(y + place, z, mask=mask)


@triton.jit
def _dz(dy, h, w, b, SILU: tl.constexpr):
    """The gradient at z = h w + b."""
    if SILU:
        z = h * w + b
        s = 1 / (1 + tl.exp(-z))
        dy = dy * s * (1 + z * (1 - s))
    return dy


@triton.jit
def _sums(
    partial, dy, x, weight, bias, mean, rstd, rows, chunk, chunks, SILU: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk's sums of dz h and of dz, per channel."""
    image, index, begin, end, column = _place(rows, chunk, chunks, C, COLUMNS)
    center, scale, w, b = _affine(weight, bias, mean, rstd, image, column, G, C)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    plain = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(begin, end, ROWS):
        mask, place = _tile(tile, image, rows, end, column, C, ROWS)
        h = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - center) * scale
        dz = _dz(tl.load(dy + place, mask=mask, other=0.0).to(tl.float32), h, w, b, SILU)
        products += dz * h  # 0 beyond the mask, where dy is
        plain += dz
    out = partial + index * (2 * C) + column
    tl.store(out, tl.sum(products, axis=0), mask=column < C)
    tl.store(out + C, tl.sum(plain, axis=0), mask=column < C)


@triton.jit
def _finish(
    totals, means, partial, weight, rows, chunks, G: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One group's sums over chunks (images, 2, C), and the means of dz w h and dz w (2, images, groups)."""
    image, channel, inside, start = _group(partial, chunks, G, C, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    plain = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, chunks, ROWS):
        index = first + tl.arange(0, ROWS)[:, None]
        mask = (index < chunks) & inside[None, :]
        place = start[None, :] + index.to(tl.int64) * (2 * C)
        products += tl.load(place, mask=mask, other=0.0)
        plain += tl.load(place + C, mask=mask, other=0.0)
    product, total = tl.sum(products, axis=0), tl.sum(plain, axis=0)
    tl.store(totals + image * (2 * C) + channel, product, mask=inside)
    tl.store(totals + image * (2 * C) + C + channel, total, mask=inside)
    w = tl.load(weight + channel, mask=inside, other=0.0)
    count = rows * (C // G) * 1.0
    tl.store(means + tl.program_id(0), tl.sum(product * w, axis=0) / count)
    tl.store(means + tl.num_programs(0) + tl.program_id(0), tl.sum(total * w, axis=0) / count)


@triton.jit
def _backward(
    dx, dy, x, weight, bias, mean, rstd, slope, pull, rows, chunk, chunks, SILU: tl.constexpr, G: tl.constexpr,
    C: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    image, _, begin, end, column = _place(rows, chunk, chunks, C, COLUMNS)
    center, scale, w, b = _affine(weight, bias, mean, rstd, image, column, G, C)
    slopes = _per_channel(slope, image, column, G, C)
    pulls = _per_channel(pull, image, column, G, C)
    for tile in range(begin, end, ROWS):
        mask, place = _tile(tile, image, rows, end, column, C, ROWS)
        h = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - center) * scale
        dz = _dz(tl.load(dy + place, mask=mask, other=0.0).to(tl.float32), h, w, b, SILU)
        tl.store(dx + place, scale * (dz * w - pulls - h * slopes), mask=mask)


def _chunk(images: int, rows: int, width: int) -> int:
    """Rows per program: enough programs to fill a large GPU, but not so many that partial sums cost much."""
    in_all = images * rows * triton.cdiv(width, MAX_COLUMNS)
    return min(max(triton.next_power_of_2(in_all // (4 * common.PROGRAMS)), 32), 512)


def _decide_pass(images: int, rows: int, width: int, elements: int, **constants: int) -> common.Decision:
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    chunk = _chunk(images, rows, width)
    chunks = triton.cdiv(rows, chunk)
    tile = {"C": width, "COLUMNS": columns, "ROWS": elements // columns, "num_warps": 4, "num_stages": 1}
    return images * chunks * triton.cdiv(width, columns), (rows, chunk, chunks), {**constants, **tile}


def _decide_moments(images: int, rows: int, width: int) -> common.Decision:
    return _decide_pass(images, rows, width, 2048)


def _decide_forward(images: int, rows: int, width: int, groups: int, silu: bool) -> common.Decision:
    return _decide_pass(images, rows, width, 2048, SILU=silu, G=groups)


def _decide_backward(images: int, rows: int, width: int, groups: int, silu: bool) -> common.Decision:
    return _decide_pass(images, rows, width, 1024, SILU=silu, G=groups)


def _decide_statistics(images: int, rows: int, width: int, groups: int, eps: float) -> common.Decision:
    programs, (_, chunks), constants = _decide_finish(images, rows, width, groups)
    return programs, (rows, _chunk(images, rows, width), chunks, eps), constants


def _decide_finish(images: int, rows: int, width: int, groups: int) -> common.Decision:
    columns = triton.next_power_of_2(width // groups)
    constants = {"G": groups, "C": width, "COLUMNS": columns, "ROWS": max(512 // columns, 1)}
    chunks = triton.cdiv(rows, _chunk(images, rows, width))
    return images * groups, (rows, chunks), {**constants, "num_warps": 4, "num_stages": 1}


def _partial(x_BNC: Tensor) -> Tensor:
    B, N, C = x_BNC.shape
    return x_BNC.new_empty(B, triton.cdiv(N, _chunk(B, N, C)), 2, C, dtype=torch.float32)


def group_norm_silu(
    x_BNC: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and rstd (B, groups)."""
    x_BNC, weight_C, bias_C = x_BNC.contiguous(), weight_C.contiguous(), bias_C.contiguous()
    y, sizes = torch.empty_like(x_BNC), tuple(x_BNC.shape)
    mean, rstd = (weight_C.new_zeros(sizes[0], groups) for _ in range(2))
    if x_BNC.numel():
        partial = _partial(x_BNC)
        common.launch(_moments, _decide_moments, sizes, partial, x_BNC)
        common.launch(_statistics, _decide_statistics, (*sizes, groups, eps), mean, rstd, partial)
        common.launch(_forward, _decide_forward, (*sizes, groups, silu), y, x_BNC, weight_C, bias_C, mean, rstd)
    return y, mean, rstd


def group_norm_silu_backward(
    dy_BNC: Tensor, x_BNC: Tensor, weight_C: Tensor, bias_C: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, weight and bias."""
    dy_BNC, x_BNC, weight_C, bias_C = (t.contiguous() for t in (dy_BNC, x_BNC, weight_C, bias_C))
    dx, sizes, groups = torch.empty_like(x_BNC), tuple(x_BNC.shape), mean.shape[1]
    if not x_BNC.numel():
        return dx, torch.zeros_like(weight_C), torch.zeros_like(bias_C)
    given = (x_BNC, weight_C, bias_C, mean.contiguous(), rstd.contiguous())
    partial = _partial(x_BNC)
    totals, means = weight_C.new_empty(sizes[0], 2, sizes[2]), weight_C.new_empty(2, sizes[0], groups)
    passes = (*sizes, groups, silu)
    common.launch(_sums, _decide_backward, passes, partial, dy_BNC, *given)
    common.launch(_finish, _decide_finish, (*sizes, groups), totals, means, partial, weight_C)
    common.launch(_backward, _decide_backward, passes, dx, dy_BNC, *given, *means.unbind())
    return dx, totals[:, 0].sum(0), totals[:, 1].sum(0)

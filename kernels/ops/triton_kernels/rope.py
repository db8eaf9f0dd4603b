"""Rotary embedding with optional QK-norm in Triton, and its gradients. Formulas: kernels/ops/rope.py.

A tile is some (token, head) rows of one image, K columns padded to a power of two (72 to 128: the padding is neither
read nor written). Rows are read whole with 128-bit loads and split into pairs in registers, since loads with a stride
of 2 are not vectorised. One launch does q and k (and copies dv), so that cos and sin are read once for both. Backward,
all tiles of a program are of the same heads, so that sums for the bias stay in registers.
Bytes moved: forward reads and writes q and k (and v, where there is a bias); backward reads dq, dk (and dv), where
there is a norm q and k too, and writes as much as it reads of gradients.
Shape suffixes: B batch, H heads, N tokens, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common


@triton.jit
def _rows(tile, heads, ROWS: tl.constexpr):
    """Token and head of each row of a tile: heads of one token follow each other, as in memory."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    return (row // heads).to(tl.int64), row % heads


@triton.jit
def _rows_of_group(tile, group, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """The same for a tile of HEADS neighbouring heads."""
    row = tl.arange(0, ROWS)[:, None]
    return (tile * (ROWS // HEADS) + row // HEADS).to(tl.int64), group * HEADS + row % HEADS


@triton.jit
def _pairs(t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.reshape(t, (ROWS, COLUMNS // 2, 2)))


@triton.jit
def _rotate(t, cos, sin, cos_partner, sin_partner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(even cos - odd sin, odd cos_partner + even sin_partner), where the tables are halves of pairs too."""
    even, odd = _pairs(t, ROWS, COLUMNS)
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos_partner + even * sin_partner), (ROWS, COLUMNS))


@triton.jit
def _inverse_rms(t, eps, K: tl.constexpr):
    return tl.rsqrt(tl.sum(t * t, axis=1) / K + eps)[:, None]


@triton.jit
def _load_weight(weight, column, mask):
    """For every row of the tile: rows share cache lines, and a broadcast would go through shared memory."""
    return tl.load(tl.broadcast_to(weight + column, mask.shape), mask=mask, other=0.0)


@triton.jit
def _biased(tile, bias, place, mask):
    """A tile in float32, with the bias at `place`, if any."""
    t = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        t += tl.load(bias + place, mask=mask, other=0.0)
    return t


@triton.jit
def _normed(tile, bias, place, weight, column, mask, eps, K: tl.constexpr):
    """The same, RMS-normalised where there is a weight."""
    t = _biased(tile, bias, place, mask)
    if weight is not None:
        t *= _inverse_rms(t, eps, K) * _load_weight(weight, column, mask)
    return t


@triton.jit
def _norm_backward(dt, tile, bias, place, weight, column, mask, eps, K: tl.constexpr):
    """The gradient for the tile t of t r weight, and what its gradient for the weight sums."""
    t = _biased(tile, bias, place, mask)
    r = _inverse_rms(t, eps, K)
    g = dt * _load_weight(weight, column, mask)
    return r * (g - t * (r * r * (tl.sum(g * t, axis=1) / K)[:, None])), dt * t * r


@triton.jit
def _forward(
    q_out,
    k_out,
    v_out,
    q,
    k,
    v,
    bias,
    cos,
    sin,
    q_weight,
    k_weight,
    tokens,
    heads,
    tiles,
    eps,
    q_stride_b,
    k_stride_b,
    v_stride_b,
    Q_STRIDE_N: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    K_STRIDE_N: tl.constexpr,
    K_STRIDE_H: tl.constexpr,
    V_STRIDE_N: tl.constexpr,
    V_STRIDE_H: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    image = (tl.program_id(0) // tiles).to(tl.int64)
    n, h = _rows(tl.program_id(0) % tiles, heads, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (n < tokens) & (column < K)
    q_tile = q + image * q_stride_b + n * Q_STRIDE_N + h * Q_STRIDE_H + column
    k_tile = k + image * k_stride_b + n * K_STRIDE_N + h * K_STRIDE_H + column
    out = ((image * tokens + n) * heads + h) * K + column
    place = h * K + column
    if v is not None:
        v_tile = v + image * v_stride_b + n * V_STRIDE_N + h * V_STRIDE_H + column
        tl.store(v_out + out, _biased(v_tile, bias, place + 2 * heads * K, mask), mask=mask)
    cos_even, cos_odd = _pairs(tl.load(cos + n * K + column, mask=mask, other=0.0), ROWS, COLUMNS)
    sin_even, sin_odd = _pairs(tl.load(sin + n * K + column, mask=mask, other=0.0), ROWS, COLUMNS)
    t = _normed(q_tile, bias, place, q_weight, column, mask, eps, K)
    tl.store(q_out + out, _rotate(t, cos_even, sin_even, cos_odd, sin_odd, ROWS, COLUMNS), mask=mask)
    t = _normed(k_tile, bias, place + heads * K, k_weight, column, mask, eps, K)
    tl.store(k_out + out, _rotate(t, cos_even, sin_even, cos_odd, sin_odd, ROWS, COLUMNS), mask=mask)


@triton.jit
def _store_sums(sums, tile, place, column, HEADS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """The sums of a tile over its tokens, of HEADS heads from `place` on."""
    head = tl.arange(0, HEADS)[:, None]
    total = tl.sum(tl.reshape(tile, (ROWS // HEADS, HEADS, tile.shape[1])), axis=0)
    tl.store(sums + place + head * K + column, total, mask=(head < HEADS) & (column < K))


@triton.jit
def _backward(
    dq_out,
    dk_out,
    dv_out,
    sums,
    bias_sums,
    dq,
    dk,
    dv,
    q,
    k,
    bias,
    cos,
    sin,
    q_weight,
    k_weight,
    tokens,
    heads,
    tiles,
    tiles_per_program,
    programs_per_image,
    eps,
    dq_stride_b,
    dk_stride_b,
    dv_stride_b,
    q_stride_b,
    k_stride_b,
    DQ_STRIDE_N: tl.constexpr,
    DQ_STRIDE_H: tl.constexpr,
    DK_STRIDE_N: tl.constexpr,
    DK_STRIDE_H: tl.constexpr,
    DV_STRIDE_N: tl.constexpr,
    DV_STRIDE_H: tl.constexpr,
    Q_STRIDE_N: tl.constexpr,
    Q_STRIDE_H: tl.constexpr,
    K_STRIDE_N: tl.constexpr,
    K_STRIDE_H: tl.constexpr,
    OUT_STRIDE_N: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The transposed rotation, then the norm's gradient, of some tiles of HEADS heads.

    `sums` (programs, 2, K) gets the sums for the weights; `bias_sums` (programs of a group, 3, heads, K) for the bias.
    """
    group = tl.program_id(0) % (heads // HEADS)
    program = tl.program_id(0) // (heads // HEADS)
    image = (program // programs_per_image).to(tl.int64)
    first = (program % programs_per_image) * tiles_per_program
    column = tl.arange(0, COLUMNS)[None, :]
    q_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    k_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    if bias is not None:
        q_bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        k_bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        v_bias_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(first, tl.minimum(first + tiles_per_program, tiles)):
        n, h = _rows_of_group(tile, group, HEADS, ROWS)
        place = h * K + column
        mask = (n < tokens) & (column < K)
        out = (image * tokens + n) * OUT_STRIDE_N + h * K + column
        cos_even, cos_odd = _pairs(tl.load(cos + n * K + column, mask=mask, other=0.0), ROWS, COLUMNS)
        sin_even, sin_odd = _pairs(tl.load(sin + n * K + column, mask=mask, other=0.0), ROWS, COLUMNS)
        dq_tile = dq + image * dq_stride_b + n * DQ_STRIDE_N + h * DQ_STRIDE_H + column
        dt = tl.load(dq_tile, mask=mask, other=0.0).to(tl.float32)
        dt = _rotate(dt, cos_even, -sin_odd, cos_odd, -sin_even, ROWS, COLUMNS)
        if q_weight is not None:
            q_tile = q + image * q_stride_b + n * Q_STRIDE_N + h * Q_STRIDE_H + column
            dt, dweight = _norm_backward(dt, q_tile, bias, place, q_weight, column, mask, eps, K)
            q_sums += dweight
        if bias is not None:
            q_bias_sums += dt
        tl.store(dq_out + out, dt, mask=mask)
        dk_tile = dk + image * dk_stride_b + n * DK_STRIDE_N + h * DK_STRIDE_H + column
        dt = tl.load(dk_tile, mask=mask, other=0.0).to(tl.float32)
        dt = _rotate(dt, cos_even, -sin_odd, cos_odd, -sin_even, ROWS, COLUMNS)
        if k_weight is not None:
            k_tile = k + image * k_stride_b + n * K_STRIDE_N + h * K_STRIDE_H + column
            dt, dweight = _norm_backward(dt, k_tile, bias, place + heads * K, k_weight, column, mask, eps, K)
            k_sums += dweight
        if bias is not None:
            k_bias_sums += dt
        tl.store(dk_out + out, dt, mask=mask)
        if dv is not None:
            dv_tile = dv + image * dv_stride_b + n * DV_STRIDE_N + h * DV_STRIDE_H + column
            dt = tl.load(dv_tile, mask=mask, other=0.0)
            tl.store(dv_out + out, dt, mask=mask)
            if bias is not None:
                v_bias_sums += dt.to(tl.float32)
    if bias is not None:
        bias_sums += program.to(tl.int64) * (3 * K) * heads
        place = group * HEADS * K
        _store_sums(bias_sums, q_bias_sums, place, column, HEADS, K, ROWS)
        _store_sums(bias_sums, k_bias_sums, place + heads * K, column, HEADS, K, ROWS)
        _store_sums(bias_sums, v_bias_sums, place + 2 * heads * K, column, HEADS, K, ROWS)
    column = tl.arange(0, COLUMNS)
    sums += tl.program_id(0).to(tl.int64) * (2 * K) + column
    if q_weight is not None:
        tl.store(sums, tl.sum(q_sums, axis=0), mask=column < K)
    if k_weight is not None:
        tl.store(sums + K, tl.sum(k_sums, axis=0), mask=column < K)


def _tile(K: int, elements: int = 2048) -> dict[str, int]:
    """2048 elements for 4 warps: two 128-bit loads of bfloat16 per thread and tensor."""
    columns = max(triton.next_power_of_2(K), 2)
    return {"K": K, "COLUMNS": columns, "ROWS": max(elements // columns, 1), "num_warps": 4, "num_stages": 1}


def _backward_tile(K: int, biased: bool) -> dict[str, int]:
    """Half of that where sums for the bias take registers, too."""
    return _tile(K, 1024 if biased else 2048)


def _strides(**tensors: Sequence[int] | None) -> tuple[list[int], dict[str, int]]:
    """Of the strides of (B, H, N, K) tensors: images' at run time, tokens' and heads' (K's is one) as constants."""
    strides = {name: (0, 0, 0) if found is None else found[:3] for name, found in tensors.items()}
    constants = {f"{name}_STRIDE_N": n for name, (_, _, n) in strides.items()}
    constants |= {f"{name}_STRIDE_H": h for name, (_, h, _) in strides.items()}
    return [b for b, _, _ in strides.values()], constants


def _decide_forward(
    shape: torch.Size, q_strides: Sequence[int], k_strides: Sequence[int], v_strides: Sequence[int] | None, eps: float
) -> common.Decision:
    B, H, N, K = shape
    tile = _tile(K)
    tiles = triton.cdiv(N * H, tile["ROWS"])
    strides_b, strides = _strides(Q=q_strides, K=k_strides, V=v_strides)
    return B * tiles, (N, H, tiles, eps, *strides_b), strides | tile


@functools.cache
def _programs(shape: torch.Size, weighted: bool, biased: bool) -> tuple[int, int, int, int]:
    """Of the backward pass: heads of a group; its tiles per image, tiles per program, and programs per image.

    Each program that sums leaves a row for the weights, or three of its heads for the bias: it takes several tiles.
    """
    B, H, N, K = shape
    rows = _backward_tile(K, biased)["ROWS"]
    heads = min(H & -H, rows)
    tiles = triton.cdiv(N * heads, rows)
    most = 64 if biased else 16 if weighted else 1
    tiles_per_program = min(max(B * tiles * (H // heads) // common.PROGRAMS, 1), most)
    return heads, tiles, tiles_per_program, triton.cdiv(tiles, tiles_per_program)


def _decide_backward(
    shape: torch.Size, weighted: bool, biased: bool, out_stride_n: int, eps: float, *strides: Sequence[int] | None
) -> common.Decision:
    heads, tiles, tiles_per_program, programs_per_image = _programs(shape, weighted, biased)
    B, H, N, K = shape
    strides_b, constants = _strides(**dict(zip(("DQ", "DK", "DV", "Q", "K"), strides, strict=True)))
    numbers = (N, H, tiles, tiles_per_program, programs_per_image, eps, *strides_b)
    constants |= {"OUT_STRIDE_N": out_stride_n, "HEADS": heads}
    return B * programs_per_image * (H // heads), numbers, constants | _backward_tile(K, biased)


def _token_major(t: Tensor) -> Tensor:
    B, H, N, K = t.shape
    return t.new_empty(B, N, H, K).transpose(1, 2)


def rope(q: Tensor, k: Tensor, *tables_and_weights: Any) -> tuple[Tensor, Tensor]:
    """q and k (B, H, N, K) rotated, after RMS-normalising each where its weight (K,) is given.

    tables_and_weights: cos, sin (N, K), the weights, eps.
    """
    *tables_and_weights, eps = tables_and_weights
    q_out, k_out = _token_major(q), _token_major(k)
    if q.numel():
        sizes = (q.shape, q.stride(), k.stride(), None, eps)
        tensors = (q_out, k_out, None, q, k, None, None)
        common.launch(_forward, _decide_forward, sizes, *tensors, *tables_and_weights)
    return q_out, k_out


def rope_qkv(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *tables_and_weights: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a bias (3, H, K) added first, to v (B, H, N, K) too."""
    *tables_and_weights, eps = tables_and_weights
    out = _token_major(q), _token_major(k), _token_major(v)
    if q.numel():
        sizes = (q.shape, q.stride(), k.stride(), v.stride(), eps)
        common.launch(_forward, _decide_forward, sizes, *out, q, k, v, bias.contiguous(), *tables_and_weights)
    return out


def _launch_backward(
    out: tuple[Tensor, Tensor, Tensor | None],
    out_stride_n: int,
    gradients: tuple[Tensor, Tensor, Tensor | None],
    q: Tensor | None,
    k: Tensor | None,
    bias: Tensor | None,
    cos_NK: Tensor,
    sin_NK: Tensor,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fills `out`; returns the gradients of the weights and the bias, of size 0 where there is none."""
    weights = q_weight_K, k_weight_K
    shape = gradients[0].shape
    B, H, _, K = shape
    weighted = q_weight_K is not None or k_weight_K is not None
    biased = bias is not None
    if gradients[0].numel():
        heads, _, _, programs_per_image = _programs(shape, weighted, biased)
        sums = cos_NK.new_empty(B * programs_per_image * (H // heads) if weighted else 0, 2, K)
        bias_sums = cos_NK.new_empty(B * programs_per_image, 3 * H * K) if biased else None
        # Whatever strides a gradient has are followed, but for that of its last axis.
        dq, dk, dv = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in gradients)
        strides = (None if t is None else t.stride() for t in (dq, dk, dv, q, k))
        sizes = (shape, weighted, biased, out_stride_n, eps, *strides)
        tensors = (*out, sums, bias_sums, dq, dk, dv, q, k, bias, cos_NK, sin_NK, *weights)
        common.launch(_backward, _decide_backward, sizes, *tensors)
    else:
        sums, bias_sums = cos_NK.new_zeros(1, 2, K), cos_NK.new_zeros(1, 3 * H * K) if biased else None
    dq_weight, dk_weight = (sums.new_empty(0) if w is None else sums[:, i].sum(0) for i, w in enumerate(weights))
    return dq_weight, dk_weight, sums.new_empty(0) if bias_sums is None else bias_sums.sum(0)


def rope_backward(dq: Tensor, dk: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for q, k and the weights, from those of the rotated q and k.

    saved: q and k (needed with a weight), cos, sin (N, K), the weights, eps.
    """
    _, H, _, K = dq.shape
    dq_in, dk_in = _token_major(dq), _token_major(dk)
    q, k, *rest = saved
    dweights = _launch_backward((dq_in, dk_in, None), H * K, (dq, dk, None), q, k, None, *rest)[:2]
    return dq_in, dk_in, *dweights


def rope_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, *saved: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient for the packed qkv (B, N, 3, H, K), dv copied into it, and those for the weights and the bias."""
    B, H, N, K = dq.shape
    dqkv = dq.new_empty(B, N, 3, H, K)
    return dqkv, *_launch_backward(dqkv.unbind(2), 3 * H * K, (dq, dk, dv), *saved)

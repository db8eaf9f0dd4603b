"""AdamW, clipping, averages and bf16 copies in Triton, one launch for all weights. Formula: kernels/ops/adamw_ema.py.

A program finds its weight, and where in it, in a list made once for the sizes of the weights, and the addresses in a
table that every call sends along: gradients lie elsewhere each time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

TILE = 1024
TILES = 8
"""Of one program: enough to hide its reads of the table."""


@triton.jit
def _at(i, table, row, count, weight, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to the elements i of the tensor in a row of the table."""
    pointers = tl.load(table + row * count + weight).to(tl.pointer_type(KIND)) + i
    if ALIGNED:  # so that the compiler knows, and loads 128 bits at once
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def _tile(
    i, mask, table, numbers, factor, count, weight,
    AVERAGES: tl.constexpr, COPIES: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Elements i of a weight."""
    w_at = _at(i, table, 0, count, weight, tl.float32, ALIGNED)
    g_at = _at(i, table, 1, count, weight, tl.bfloat16 if HALF else tl.float32, ALIGNED)
    m_at = _at(i, table, 2, count, weight, tl.float32, ALIGNED)
    v_at = _at(i, table, 3, count, weight, tl.float32, ALIGNED)
    kept, new1, beta2, new2 = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    rate, inverse_root, eps = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    g = tl.load(g_at, mask=mask).to(tl.float32) * factor
    m = tl.load(m_at, mask=mask)
    m += (g - m) * new1
    v = tl.load(v_at, mask=mask) * beta2 + g * g * new2
    w = tl.load(w_at, mask=mask) * kept - rate * m / (tl.sqrt_rn(v) * inverse_root + eps)
    tl.store(m_at, m, mask=mask)
    tl.store(v_at, v, mask=mask)
    tl.store(w_at, w, mask=mask)
    for k in tl.static_range(AVERAGES):
        a_at = _at(i, table, 4 + k, count, weight, tl.float32, ALIGNED)
        share, a = tl.load(numbers + 7 + k), tl.load(a_at, mask=mask)
        tl.store(a_at, tl.where(share < 0.5, a + (w - a) * share, w - (w - a) * (1 - share)), mask=mask)
    if COPIES:
        tl.store(_at(i, table, 4 + AVERAGES, count, weight, tl.bfloat16, ALIGNED), w, mask=mask)


@triton.jit
def _step(
    table, places, numbers, scale, count,
    AVERAGES: tl.constexpr, COPIES: tl.constexpr, HALF: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    place = places + tl.program_id(0) * 3
    weight, start, size = tl.load(place), tl.load(place + 1) // TILE * TILE, tl.load(place + 2)
    factor = 1.0 if scale is None else tl.load(scale)
    for tile in range(TILES):
        first = start + tile * TILE
        i = first + tl.arange(0, TILE)
        if first + TILE <= size:  # by itself, since a mask would make its loads narrow
            _tile(i, None, table, numbers, factor, count, weight, AVERAGES, COPIES, HALF, ALIGNED)
        elif first < size:
            _tile(i, i < size, table, numbers, factor, count, weight, AVERAGES, COPIES, HALF, ALIGNED)


@functools.lru_cache(maxsize=16)
def _places(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """(programs, 3): the weight of each program, its first element, and the weight's size."""
    span = TILE * TILES
    rows = [(weight, start, size) for weight, size in enumerate(sizes) for start in range(0, size, span)]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _decide(programs: int, count: int, averages: int, copies: bool, half: bool, aligned: bool) -> common.Decision:
    """A tile is 128 bits of fp32 per thread and load, twice."""
    constants = {"AVERAGES": averages, "COPIES": copies, "HALF": half, "ALIGNED": aligned, "TILE": TILE, "TILES": TILES}
    return programs, (count,), constants | {"num_warps": 4, "num_stages": 1}


def _sent(values: list[int] | list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device, without a wait for it."""
    row = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return row.to(device, non_blocking=True)


def adamw_ema(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    copies: list[Tensor],
    scale: Tensor | None,
    rates: list[float],
    numbers: list[float],
) -> None:
    """One step of all weights, in place."""
    device = weights[0].device
    places = _places(tuple(weight.numel() for weight in weights), device)
    if not places.numel():
        return
    addresses = [each.data_ptr() for each in (*weights, *grads, *exp_avgs, *exp_avg_sqs, *averages, *copies)]
    aligned = functools.reduce(int.__or__, addresses) % common.VECTOR_BYTES == 0
    table, settings = _sent(addresses, torch.int64, device), _sent([*numbers, *rates], torch.float32, device)
    sizes = len(places), len(weights), len(rates), bool(copies), grads[0].dtype == torch.bfloat16, aligned
    common.launch(_step, _decide, sizes, table, places, settings, scale)

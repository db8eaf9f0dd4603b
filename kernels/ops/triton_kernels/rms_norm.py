"""RMSNorm with modulation in Triton. Kernels: norm.py; formulas: kernels/ops/rms_norm.py.

Bytes moved: forward reads x and writes y; backward reads dy and x and writes dx, each once.
Shape suffixes: B images, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import norm


def rms_norm(
    x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, narrow: bool, eps: float
) -> Tensor:
    """x / rms(x) * weight * (1 + scale) + shift, one scale and shift per image (first axis)."""
    dtype = torch.bfloat16 if narrow else x.dtype
    return norm.forward(x, None, None, None, weight_D, scale_BD, shift_BD, dtype, eps)[1]


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for x, weight, scale and shift; the last two have no rows where there is none."""
    dx, _, (_, _, *rest) = norm.backward(dy, None, x, None, None, None, weight_D, scale_BD, shift_BD, eps)
    return dx, *rest

"""The gate of SwiGLU, after the one linear layer that makes both halves.

    y = silu(x1) * x2,   x12 = [x1 | x2],   silu(a) = a / (1 + exp(-a))        (Shazeer 2020)

Bytes moved, forward, one pass: read 2H, write H elements per token.
Shape suffixes: H hidden width of the MLP; `...` any leading axes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks

OP = "swiglu"


def swiglu_reference(x12: Tensor) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in x12's dtype."""
    x1, x2 = x12.to(torch.promote_types(x12.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(x1) * x2).to(x12.dtype)


def _check(x12: Tensor) -> None:
    checks.check_kind(OP, x12=x12)
    if x12.ndim < 1 or x12.shape[-1] % 2:
        checks.fail(OP, f"x12 {checks.shape(x12)}", "x12 (..., 2H), an even last axis")


def swiglu(x12: Tensor) -> Tensor:
    """silu(first half) * second half along the last axis.

    Args: x12 (..., 2H), any floating dtype.
    Returns: (..., H) in x12's dtype, computed in float32.
    Raises: ValueError naming the shape found and needed.
    """
    _check(x12)
    return swiglu_reference(x12)

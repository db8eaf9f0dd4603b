"""The gate of SwiGLU, after the one linear layer that makes both halves.

    y = silu(x1) * x2,   x12 = [x1 | x2],   silu(a) = a / (1 + exp(-a))        (Shazeer 2020)

Bytes moved, forward, one pass: read 2H, write H elements per token.
Shape suffixes: H hidden width of the MLP; `...` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch

OP = "swiglu"


def swiglu_reference(x12: Tensor) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in x12's dtype."""
    x1, x2 = x12.to(torch.promote_types(x12.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(x1) * x2).to(x12.dtype)


# -------------------------------------------------------------------------- C++: csrc/cpu/swiglu.cpp, float32


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (x12,) = ctx.saved_tensors
    return torch.ops.vadit.swiglu_backward(dy, x12)


if dispatch.CPP_LOADED:

    @torch.library.register_fake("vadit::swiglu")
    def _(x12: Tensor) -> Tensor:
        return x12.new_empty((*x12.shape[:-1], x12.shape[-1] // 2))

    @torch.library.register_fake("vadit::swiglu_backward")
    def _(dy: Tensor, x12: Tensor) -> Tensor:
        return x12.new_empty(x12.shape)

    torch.library.register_autograd("vadit::swiglu", _backward, setup_context=_setup_context)
    dispatch.refuse_second_derivative("swiglu_backward")


# ---------------------------------------------------------------------------------------------------------- public


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
    if dispatch.takes_cpp(OP, x12):
        return torch.ops.vadit.swiglu(x12)
    return swiglu_reference(x12)

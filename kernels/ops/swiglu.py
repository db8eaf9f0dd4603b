"""The gate of SwiGLU, after the one linear layer that makes both halves.

    y = silu(x1) * x2,   [x1 | x2] = x12 + bias,   silu(a) = a / (1 + exp(-a))        (Shazeer 2020)

Bytes moved, forward: read 2H, write H elements per token. Backward: read 3H, write 2H; the product is computed again,
so that x12 is all that is kept between the passes. The gradient of the bias is the column sums of what is written
anyway: a linear layer that leaves its bias to this op saves reading 2H elements per token for them.
Shape suffixes: H hidden width of the MLP; `...` any leading axes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch

OP = "swiglu"
SCHEMAS = {
    "swiglu": "(Tensor x12, Tensor? bias) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor x12, Tensor? bias) -> (Tensor dx12, Tensor dbias)",
}


def swiglu_reference(x12: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in x12's dtype."""
    wide = x12.to(torch.promote_types(x12.dtype, torch.float32))
    x1, x2 = (wide if bias is None else wide + bias).chunk(2, dim=-1)
    return (F.silu(x1) * x2).to(x12.dtype)


# ---------------------------------------- csrc/cpu/swiglu.cpp, csrc/cuda/swiglu.cu, triton_kernels/swiglu.py


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them."""

    @torch.library.register_fake(f"{namespace}::swiglu")
    def _(x12: Tensor, bias: Tensor | None) -> Tensor:
        return x12.new_empty((*x12.shape[:-1], x12.shape[-1] // 2))

    @torch.library.register_fake(f"{namespace}::swiglu_backward")
    def _(dy: Tensor, x12: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return x12.new_empty(x12.shape), x12.new_empty(0 if bias is None else x12.shape[-1], dtype=torch.float32)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x12: Tensor, bias: Tensor | None, namespace: str) -> Tensor:
        ctx.save_for_backward(x12, bias)
        ctx.namespace = namespace
        return getattr(torch.ops, namespace).swiglu(x12, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x12, bias = ctx.saved_tensors
        dx12, dbias = dispatch.run_backward(ctx.namespace, "swiglu_backward", dy, x12, bias)
        return dx12, None if bias is None else dbias, None


# ---------------------------------------------------------------------------------------------------------- public


def _check(x12: Tensor, bias: Tensor | None) -> None:
    checks.check_kind(OP, x12=x12, bias=bias)
    if x12.ndim < 1 or x12.shape[-1] % 2:
        checks.fail(OP, f"x12 {checks.shape(x12)}", "x12 (..., 2H), an even last axis")
    checks.check_shape(OP, "bias", bias, (x12.shape[-1],), f"x12 {checks.shape(x12)}")
    checks.check_inner(OP, x12=x12)


def swiglu(x12: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(first half) * second half along the last axis, after adding the bias where one is given.

    Args: x12 (..., 2H), its last axis contiguous; bias (2H,) or None; any floating dtypes.
    Returns: (..., H) in x12's dtype, computed in float32.
    Raises: ValueError naming the shape found and needed.
    """
    _check(x12, bias)
    ops = dispatch.kernels_for(OP, x12)
    if ops is None:
        return swiglu_reference(x12, bias)
    return _SwiGLU.apply(x12, None if bias is None else bias.float(), ops.name)

"""RMSNorm with the adaptive modulation of DiT folded in.

    y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift        (Zhang & Sennrich 2019; Peebles & Xie 2023)

Bytes moved, forward: read x, write y (scale, shift and weight stay in cache). Backward: read dy and x, write dx; the
gradients of weight, scale and shift are column sums of the same pass.
Shape suffixes: B batch, N tokens, D channels; `...` any number of token axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch

OP = "rms_norm"
SCHEMAS = {
    # narrow: the result is bfloat16, whatever x is
    "rms_norm": "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, bool narrow, float eps) -> Tensor",
    "rms_norm_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, float eps)"
    " -> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)",
}


def rms_norm_reference(
    x: Tensor,
    weight_D: Tensor,
    scale_BD: Tensor | None,
    shift_BD: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in `dtype` (None: x's)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    y = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide)
    # One modulation per image: (B, D) -> (B, 1, ..., 1, D).
    rows = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    if scale_BD is not None:
        y = y * (1 + scale_BD.to(wide)).view(rows)
    if shift_BD is not None:
        y = y + shift_BD.to(wide).view(rows)
    return y.to(dtype or x.dtype)


# ----------------------------------- csrc/cpu/rms_norm.cpp, csrc/cuda/rms_norm.cu, triton_kernels/rms_norm.py


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them."""

    @torch.library.register_fake(f"{namespace}::rms_norm")
    def _(
        x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, narrow: bool, eps: float
    ) -> Tensor:
        return x.new_empty(x.shape, dtype=torch.bfloat16 if narrow else x.dtype)

    @torch.library.register_fake(f"{namespace}::rms_norm_backward")
    def _(
        dy: Tensor, x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape), *gradients_like(x, weight_D, scale_BD, shift_BD)


def gradients_like(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    """Of the shapes and dtypes of weights and modulations; without rows for what is None."""
    return tuple(x.new_empty(0, x.shape[-1]) if t is None else t.new_empty(t.shape) for t in weights)


class _RMSNorm(torch.autograd.Function):
    """Not torch.library.register_autograd, which costs ten times as much on the host."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_D: Tensor,
        scale_BD: Tensor | None,
        shift_BD: Tensor | None,
        narrow: bool,
        eps: float,
        namespace: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_D, scale_BD, shift_BD)
        ctx.eps, ctx.namespace = eps, namespace
        return getattr(torch.ops, namespace).rms_norm(x, weight_D, scale_BD, shift_BD, narrow, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_BD, shift_BD = ctx.saved_tensors
        inputs = (dy, x, weight_D, scale_BD, shift_BD, ctx.eps)
        dx, dweight, dscale, dshift = dispatch.run_backward(ctx.namespace, "rms_norm_backward", *inputs)
        return dx, dweight, None if scale_BD is None else dscale, None if shift_BD is None else dshift, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def _check(x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None) -> None:
    checks.check_kind(OP, x=x, weight=weight_D, scale=scale_BD, shift=shift_BD)
    modulated = scale_BD is not None or shift_BD is not None
    if x.ndim < 1 or (modulated and x.ndim < 2):
        checks.fail(OP, f"x {checks.shape(x)}", "x (B, ..., D)" if modulated else "x (..., D)")
    because = f"x {checks.shape(x)}"
    checks.check_shape(OP, "weight", weight_D, (x.shape[-1],), because)
    checks.check_shape(OP, "scale", scale_BD, (x.shape[0], x.shape[-1]), because)
    checks.check_shape(OP, "shift", shift_BD, (x.shape[0], x.shape[-1]), because)
    checks.check_inner(OP, x=x)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm over the last axis, then `* (1 + scale) + shift` per image.

    Args: x (B, N, D) or (..., D), its last axis contiguous; weight (D,); scale, shift (B, D) or None; any floating
        dtypes; `dtype` of the result, where it is not x's: what comes after it would cast to.
    Returns: the shape of x, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(x, weight, scale, shift)
    dtype = dtype or x.dtype
    ops = dispatch.kernels_for(OP, x, weight, scale, shift)
    if ops is None or dtype not in (x.dtype, torch.bfloat16):
        return rms_norm_reference(x, weight, scale, shift, eps, dtype)
    return _RMSNorm.apply(x, weight, scale, shift, dtype != x.dtype, eps, ops.name)

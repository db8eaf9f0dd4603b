"""RMSNorm with the adaptive modulation of DiT folded in.

    y = x / sqrt(mean(x^2) + eps) * weight * (1 + scale) + shift        (Zhang & Sennrich 2019; Peebles & Xie 2023)

Bytes moved, forward, one pass: read x, write y (scale, shift and weight stay in cache).
Shape suffixes: B batch, N tokens, D channels; `...` any number of token axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch

OP = "rms_norm"


def rms_norm_reference(
    x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, eps: float
) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    y = x_wide * torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps) * weight_D.to(wide)
    # One modulation per image: (B, D) -> (B, 1, ..., 1, D).
    rows = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    if scale_BD is not None:
        y = y * (1 + scale_BD.to(wide)).view(rows)
    if shift_BD is not None:
        y = y + shift_BD.to(wide).view(rows)
    return y.to(x.dtype)


# ------------------------------------------------------------------------ C++: csrc/cpu/rms_norm.cpp, float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_D, scale_BD, shift_BD, eps = inputs
    ctx.save_for_backward(x, weight_D, scale_BD)
    ctx.has_shift, ctx.eps = shift_BD is not None, eps


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight_D, scale_BD = ctx.saved_tensors
    modulated = scale_BD is not None or ctx.has_shift
    dx, dweight, dscale, dshift = torch.ops.vadit.rms_norm_backward(dy, x, weight_D, scale_BD, modulated, ctx.eps)
    return dx, dweight, dscale if scale_BD is not None else None, dshift if ctx.has_shift else None, None


if dispatch.CPP_LOADED:

    @torch.library.register_fake("vadit::rms_norm")
    def _(x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, shift_BD: Tensor | None, eps: float) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("vadit::rms_norm_backward")
    def _(
        dy: Tensor, x: Tensor, weight_D: Tensor, scale_BD: Tensor | None, modulated: bool, eps: float
    ) -> tuple[Tensor, ...]:
        modulation = (x.shape[0] if modulated else 0, x.shape[-1])
        return x.new_empty(x.shape), x.new_empty(x.shape[-1:]), x.new_empty(modulation), x.new_empty(modulation)

    torch.library.register_autograd("vadit::rms_norm", _backward, setup_context=_setup_context)
    dispatch.refuse_second_derivative("rms_norm_backward")


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


def rms_norm(
    x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """RMSNorm over the last axis, then `* (1 + scale) + shift` per image.

    Args: x (B, N, D) or (..., D); weight (D,); scale, shift (B, D) or None; any floating dtypes.
    Returns: the shape and dtype of x, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(x, weight, scale, shift)
    if dispatch.takes_cpp(OP, x, weight, scale, shift):
        return torch.ops.vadit.rms_norm(x, weight, scale, shift, eps)
    return rms_norm_reference(x, weight, scale, shift, eps)

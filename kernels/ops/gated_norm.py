"""The end of one branch of a transformer block and the start of the next: a gated residual sum and its RMSNorm.

    sum = x + gate * (h + bias),   y = rms_norm(sum) * weight * (1 + scale) + shift        (Peebles & Xie 2023)

h is what a linear layer gives without adding its bias: the bias's gradient then comes out of the pass over memory that
is made anyway.
Bytes moved, forward: read x and h, write sum and y. Backward: read dy, dsum, sum and h, write dx and dh; the gradients
of gate, bias, weight, scale and shift are column sums of the same pass.
Shape suffixes: B batch, N tokens, D channels; `...` any number of token axes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .rms_norm import gradients_like, rms_norm_reference

OP = "gated_norm"
SCHEMAS = {
    "gated_norm": "(Tensor x, Tensor h, Tensor gate, Tensor? bias, Tensor weight, Tensor? scale, Tensor? shift,"
    " float eps) -> (Tensor sum, Tensor y)",
    "gated_norm_backward": "(Tensor dsum, Tensor dy, Tensor sum, Tensor h, Tensor gate, Tensor? bias, Tensor weight,"
    " Tensor? scale, Tensor? shift, float eps) -> (Tensor dx, Tensor dh, Tensor dgate, Tensor dbias, Tensor dweight,"
    " Tensor dscale, Tensor dshift)",
}
Optional = Tensor | None


def gated_norm_reference(
    x: Tensor,
    h: Tensor,
    gate_BD: Tensor,
    bias_D: Optional,
    weight_D: Tensor,
    scale_BD: Optional,
    shift_BD: Optional,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch: float32 inside (float64 for float64 input), y in `dtype` (None: x's)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = h.to(wide) if bias_D is None else h.to(wide) + bias_D.to(wide)
    gate = gate_BD.to(wide).view(x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    total = (x.to(wide) + gate * branch).to(x.dtype)
    return total, rms_norm_reference(total, weight_D, scale_BD, shift_BD, eps, dtype)


# ---------------------------- csrc/cpu/gated_norm.cpp, csrc/cuda/gated_norm.cu, triton_kernels/gated_norm.py


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them."""

    @torch.library.register_fake(f"{namespace}::gated_norm")
    def _(x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), h.new_empty(h.shape)

    @torch.library.register_fake(f"{namespace}::gated_norm_backward")
    def _(dsum: Tensor, dy: Tensor, total: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return total.new_empty(total.shape), h.new_empty(h.shape), *gradients_like(total, *rest[:-1])


class _GatedNorm(torch.autograd.Function):
    """Keeps the sum, which the norm's gradient and the next residual need anyway, and h."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        gate_BD: Tensor,
        bias_D: Optional,
        weight_D: Tensor,
        scale_BD: Optional,
        shift_BD: Optional,
        eps: float,
        namespace: str,
    ) -> tuple[Tensor, Tensor]:
        weights = (gate_BD, bias_D, weight_D, scale_BD, shift_BD)
        total, y = getattr(torch.ops, namespace).gated_norm(x, h, *weights, eps)
        ctx.save_for_backward(total, h, *weights)
        ctx.eps, ctx.namespace = eps, namespace
        return total, y

    @staticmethod
    def backward(ctx: Any, dsum: Tensor, dy: Tensor) -> tuple[Optional, ...]:
        saved = ctx.saved_tensors
        grads = dispatch.run_backward(ctx.namespace, "gated_norm_backward", dsum, dy, *saved, ctx.eps)
        return *(None if t is None else grad for t, grad in zip(saved, grads, strict=True)), None, None


# ---------------------------------------------------------------------------------------------------------- public


def gated_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Optional = None,
    scale: Optional = None,
    shift: Optional = None,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x + gate * (h + bias), and RMSNorm of that sum over the last axis, then `* (1 + scale) + shift` per image.

    Args: x, h (B, N, D) or (B, ..., D), their last axes contiguous; gate (B, D); bias (D,) or None; weight (D,); scale,
        shift (B, D) or None; any floating dtypes; `dtype` of the norm, where it is not x's. Kernels run where h has it,
        too, and x has it or is float32: what autocast makes of a block.
    Returns: the sum in x's dtype and its norm, each of the shape of x, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    checks.check_kind(OP, x=x, h=h, gate=gate, bias=bias, weight=weight, scale=scale, shift=shift)
    if x.ndim < 2:
        checks.fail(OP, f"x {checks.shape(x)}", "x (B, ..., D)")
    because = f"x {checks.shape(x)}"
    checks.check_shape(OP, "h", h, checks.shape(x), because)
    for name, t in {"bias": bias, "weight": weight}.items():
        checks.check_shape(OP, name, t, (x.shape[-1],), because)
    for name, t in {"gate": gate, "scale": scale, "shift": shift}.items():
        checks.check_shape(OP, name, t, (x.shape[0], x.shape[-1]), because)
    checks.check_inner(OP, x=x, h=h)
    dtype = dtype or x.dtype
    ops = dispatch.kernels_for(OP, x, h, gate, bias, weight, scale, shift)
    if ops is None or h.dtype != dtype or x.dtype not in (dtype, torch.float32):
        return gated_norm_reference(x, h, gate, bias, weight, scale, shift, eps, dtype)
    return _GatedNorm.apply(x, h, gate, bias, weight, scale, shift, eps, ops.name)

"""GroupNorm with the SiLU behind it, on images in channels-last memory.

    z = (x - mean) * rstd * weight + bias,   y = z / (1 + exp(-z)), or z alone        (Wu & He 2018)

mean and rstd = 1 / sqrt(var + eps) are those of an image's group of channels. torch has no channels-last CUDA kernel
for it: it copies to the other layout and back at every norm.
Bytes moved, forward: read x twice, write y. Backward: read dy and x twice, write dx; z is computed again, so that x and
the statistics are all that is kept; the gradients of weight and bias are sums that dx needs anyway.
Shape suffixes: B images, C channels, H W rows and columns, N = H W, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch

OP = "group_norm_silu"
SCHEMAS = {
    "group_norm_silu": "(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    "group_norm_silu_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool silu)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
}


def group_norm_silu_reference(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    """The formula in plain torch: float32 inside (float64 for float64 input), the result in x's dtype."""
    wide = torch.promote_types(x_BCHW.dtype, torch.float32)
    z = F.group_norm(x_BCHW.to(wide), groups, weight_C.to(wide), bias_C.to(wide), eps)
    return (F.silu(z) if silu else z).to(x_BCHW.dtype)


# --------------- csrc/cpu/group_norm_silu.cpp, csrc/cuda/group_norm_silu.cu, triton_kernels/group_norm_silu.py


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them. Their x is (B, N, C)."""

    @torch.library.register_fake(f"{namespace}::group_norm_silu")
    def _(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape), *(weight.new_empty((x.shape[0], groups)) for _ in range(2))

    @torch.library.register_fake(f"{namespace}::group_norm_silu_backward")
    def _(
        dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
    ) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BNC: Tensor,
        weight_C: Tensor,
        bias_C: Tensor,
        groups: int,
        eps: float,
        silu: bool,
        namespace: str,
    ) -> Tensor:
        y, mean, rstd = getattr(torch.ops, namespace).group_norm_silu(x_BNC, weight_C, bias_C, groups, eps, silu)
        ctx.save_for_backward(x_BNC, weight_C, bias_C, mean, rstd)
        ctx.silu, ctx.namespace = silu, namespace
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        found = dispatch.run_backward(ctx.namespace, "group_norm_silu_backward", dy, *ctx.saved_tensors, ctx.silu)
        return *found, None, None, None, None


# ---------------------------------------------------------------------------------------------------------- public


def _check(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    checks.check_kind(OP, x=x, weight=weight, bias=bias)
    if x.ndim != 4 or groups < 1 or x.shape[1] % groups:
        checks.fail(OP, f"x {checks.shape(x)} and {groups} groups", "x (B, C, H, W) whose C the groups divide")
    because = f"x {checks.shape(x)}"
    checks.check_shape(OP, "weight", weight, (x.shape[1],), because)
    checks.check_shape(OP, "bias", bias, (x.shape[1],), because)
    if not (dispatch.is_exact() or x.is_contiguous(memory_format=torch.channels_last)):
        found = f"x {checks.shape(x)} with strides {tuple(x.stride())}"
        checks.fail(OP, found, "x in channels-last memory: call .contiguous(memory_format=torch.channels_last)")


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6, *, silu: bool = True
) -> Tensor:
    """GroupNorm, then SiLU where `silu`.

    Args: x (B, C, H, W) in channels-last memory; weight, bias (C,); groups divides C; any floating dtypes.
    Returns: the shape, dtype and layout of x, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(x, weight, bias, groups)
    ops = dispatch.kernels_for(OP, x)
    if ops is None:
        return group_norm_silu_reference(x, weight, bias, groups, eps, silu)
    B, C, H, W = x.shape
    x_BNC = x.permute(0, 2, 3, 1).reshape(B, H * W, C)
    y_BNC = _GroupNormSiLU.apply(x_BNC, weight.float(), bias.float(), groups, eps, silu, ops.name)
    return y_BNC.view(B, H, W, C).permute(0, 3, 1, 2)

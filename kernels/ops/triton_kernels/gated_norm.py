"""A gated residual sum and its RMSNorm in Triton. Kernels: norm.py; formulas: kernels/ops/gated_norm.py.

Bytes moved: forward reads x and h and writes sum and y; backward reads dy, dsum, sum and h and writes dx and dh.
Shape suffixes: B images, N tokens, D channels.
"""

from __future__ import annotations

from torch import Tensor

from . import norm


def gated_norm(
    x_BND: Tensor,
    h_BND: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    weight_D: Tensor,
    scale_BD: Tensor | None,
    shift_BD: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x + gate * (h + bias) in x's dtype, and its norm, modulated, in h's."""
    total_BND, y_BND = norm.forward(x_BND, h_BND, gate_BD, bias_D, weight_D, scale_BD, shift_BD, h_BND.dtype, eps)
    assert total_BND is not None, "h was given"
    return total_BND, y_BND


def gated_norm_backward(
    dsum_BND: Tensor,
    dy_BND: Tensor,
    sum_BND: Tensor,
    h_BND: Tensor,
    gate_BD: Tensor,
    bias_D: Tensor | None,
    weight_D: Tensor,
    scale_BD: Tensor | None,
    shift_BD: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The gradients for x, h, gate, bias, weight, scale and shift; those without rows are of what was not given."""
    dx_BND, dh_BND, rest = norm.backward(
        dy_BND, dsum_BND, sum_BND, h_BND, gate_BD, bias_D, weight_D, scale_BD, shift_BD, eps
    )
    assert dh_BND is not None, "h was given"
    return dx_BND, dh_BND, *rest

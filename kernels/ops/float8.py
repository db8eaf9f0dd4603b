"""Linear layers of a block with products in float8 (e4m3): about twice bf16's arithmetic on GPUs from sm_89.

    x W^T = (s_x s_W) (x8 W8^T),   x8 = round(x / s_x),   s_x = max |row of x| / 448

The forward product and the input's gradient take float8 rows with a scale each; the weight's gradient stays in bf16,
for its scales would be over all tokens (torchao's recipe rowwise_with_gw_hp). SwiGLU and its backward pass write the
float8 rows beside what they write anyway; other casts are passes of their own.
On a GPU the casts are Triton's; elsewhere, and with VADIT_KERNELS=reference, plain torch. There is no C++ for them:
nothing is gained by float8 on a CPU.
Shape suffixes: M tokens, K inner width of a product, O outputs, D width of the stream, H hidden width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .swiglu import swiglu_reference

MAX = 448.0
"""The largest number of e4m3."""
TINY = 1e-12
"""Rows that are smaller are scaled as if they were not."""
SCHEMAS = {
    "float8_rows": "(Tensor x) -> (Tensor x8, Tensor scales)",
    "float8_swiglu": "(Tensor x12, Tensor bias) -> (Tensor y, Tensor y8, Tensor scales)",
    "float8_swiglu_backward": "(Tensor dy, Tensor x12, Tensor bias)"
    " -> (Tensor dx12, Tensor dx12_8, Tensor scales, Tensor dbias)",
}


class _Reference:
    """The ops in plain torch."""

    @staticmethod
    def float8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
        wide = x_MK.float()
        scales_M1 = wide.abs().amax(1, keepdim=True).clamp_min(TINY) / MAX
        return (wide / scales_M1).to(torch.float8_e4m3fn), scales_M1

    @staticmethod
    def float8_swiglu(x12: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = swiglu_reference(x12.float(), bias)
        return wide.to(x12.dtype), *_Reference.float8_rows(wide)

    @staticmethod
    def float8_swiglu_backward(dy_MH: Tensor, x12: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x1, x2 = (x12.float() + bias).chunk(2, dim=1)
        s = x1.sigmoid()
        wide = dy_MH.float().repeat(1, 2) * torch.cat([x2 * s * (1 + x1 * (1 - s)), x1 * s], dim=1)
        return wide.to(x12.dtype), *_Reference.float8_rows(wide), wide.sum(0)


def register(namespace: str) -> None:
    """Shapes of the results of the ops in the namespace of Triton."""

    def rows_of(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return x.new_empty(len(x), width, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)

    @torch.library.register_fake(f"{namespace}::float8_rows")
    def _(x: Tensor) -> tuple[Tensor, ...]:
        return rows_of(x, x.shape[1])

    @torch.library.register_fake(f"{namespace}::float8_swiglu")
    def _(x12: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        width = x12.shape[1] // 2
        return x12.new_empty(len(x12), width), *rows_of(x12, width)

    @torch.library.register_fake(f"{namespace}::float8_swiglu_backward")
    def _(dy: Tensor, x12: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return x12.new_empty(x12.shape), *rows_of(x12, x12.shape[1]), bias.new_empty(bias.shape)


def _ops(x: Tensor) -> Any:
    """Triton's ops for tensors that it takes, else plain torch."""
    backend = dispatch.BACKENDS["triton"]
    asked = dispatch._setting == "triton" or (x.is_cuda and dispatch._setting != "reference")
    runs = asked and backend.missing is None and backend.device == x.device.type
    return torch.ops.vadit_triton if runs else _Reference


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b^T (M, O) of float8 rows (M, K) and (O, K) with their scales."""
    (a8_MK, scales_M1), (b8_OK, scales_O1) = a, b
    return torch._scaled_mm(
        a8_MK, b8_OK.t(), scale_a=scales_M1, scale_b=scales_O1.t(), out_dtype=dtype, use_fast_accum=True
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_OK: Tensor) -> Tensor:
        ctx.save_for_backward(x_MK, weight_OK)
        rows = _ops(x_MK).float8_rows
        return _product(rows(x_MK), rows(weight_OK), x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, dy_MO: Tensor) -> tuple[Tensor, Tensor]:
        x_MK, weight_OK = ctx.saved_tensors
        rows = _ops(x_MK).float8_rows
        dx_MK = _product(rows(dy_MO), rows(weight_OK.t().contiguous()), x_MK.dtype)
        return dx_MK, (dy_MO.t() @ x_MK).to(weight_OK.dtype)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, w12: Tensor, bias: Tensor, w3_DH: Tensor) -> Tensor:
        ops = _ops(x_MD)
        x12 = _product(ops.float8_rows(x_MD), ops.float8_rows(w12), x_MD.dtype)
        y_MH, *y8 = ops.float8_swiglu(x12, bias)
        ctx.save_for_backward(x_MD, x12, y_MH, w12, bias, w3_DH)
        return _product(y8, ops.float8_rows(w3_DH), x_MD.dtype)

    @staticmethod
    def backward(ctx: Any, dh_MD: Tensor) -> tuple[Tensor, ...]:
        x_MD, x12, y_MH, w12, bias, w3_DH = ctx.saved_tensors
        ops = _ops(x_MD)
        dy_MH = _product(ops.float8_rows(dh_MD), ops.float8_rows(w3_DH.t().contiguous()), x_MD.dtype)
        dx12, dx12_8, scales_M1, dbias = ops.float8_swiglu_backward(dy_MH, x12, bias)
        dx_MD = _product((dx12_8, scales_M1), ops.float8_rows(w12.t().contiguous()), x_MD.dtype)
        return dx_MD, (dx12.t() @ x_MD).to(w12.dtype), dbias, (dh_MD.t() @ y_MH).to(w3_DH.dtype)


def _flat(x: Tensor) -> Tensor:
    """Tokens as rows, in the dtype of the products that are not float8."""
    return x.reshape(-1, x.shape[-1]).to(torch.bfloat16)


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T without a bias; x (..., K), weight (O, K), to (..., O) bf16. K, O, the number of rows: multiples of 16."""
    return _Linear.apply(_flat(x), weight).view(*x.shape[:-1], -1)


def float8_mlp(x: Tensor, w12: Tensor, bias: Tensor, w3: Tensor) -> Tensor:
    """w3 swiglu(w12 x + bias) without the last bias; x (..., D), w12 (2H, D), bias (2H,), w3 (D, H), to (..., D) bf16.

    D, H and the number of rows are multiples of 16.
    """
    return _MLP.apply(_flat(x), w12, bias.float(), w3).view(x.shape)


if dispatch.BACKENDS["triton"].missing is None:
    dispatch.define_triton_ops("float8", SCHEMAS)
    register("vadit_triton")

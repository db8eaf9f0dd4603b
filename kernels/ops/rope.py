"""Rotary position embedding of queries and keys, with optional QK-norm before it.

    t <- t + bias                                    where `rope_qkv` is given one: that of the linear layer before
    t <- t / sqrt(mean(t^2) + eps) * weight          where a weight is given (Dehghani et al. 2023)
    y[2i]   = t[2i]   cos[2i]   - t[2i+1] sin[2i]    (Su et al. 2021; interleaved pairs, as EVA-02's 2-D form)
    y[2i+1] = t[2i+1] cos[2i+1] + t[2i]   sin[2i+1]

Bytes moved, forward: read q and k, write q and k (the tables stay in cache). `rope_qkv` takes what the one linear layer
of attention makes, and its backward pass writes the gradient of that in one piece: read dq, dk, dv, write dqkv. With a
bias v is written, too (4/3 of the bytes forward), and qkv need not be kept where nothing is normed; the gradient of the
bias is the column sums of dqkv, which then is not read again for them.
Shape suffixes: B batch, H heads, N tokens, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch

OP = "rope"
_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps"
SCHEMAS = {
    "rope": f"(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    "rope_backward": f"(Tensor dq, Tensor dk, Tensor? q, Tensor? k, {_ARGUMENTS})"
    " -> (Tensor dq_in, Tensor dk_in, Tensor dq_weight, Tensor dk_weight)",
    "rope_qkv": f"(Tensor q, Tensor k, Tensor v, Tensor bias, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    "rope_qkv_backward": f"(Tensor dq, Tensor dk, Tensor dv, Tensor? q, Tensor? k, Tensor? bias, {_ARGUMENTS})"
    " -> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight, Tensor dbias)",
}


def _rotate_reference(t_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor, weight_K: Tensor | None, eps: float) -> Tensor:
    wide = torch.promote_types(t_BHNK.dtype, torch.float32)
    t = t_BHNK.to(wide)
    if weight_K is not None:
        t = t * torch.rsqrt(t.square().mean(-1, keepdim=True) + eps) * weight_K.to(wide)
    even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
    partner = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (t * cos_NK.to(wide) + partner * sin_NK.to(wide)).to(t_BHNK.dtype)


def rope_reference(
    q_BHNK: Tensor,
    k_BHNK: Tensor,
    cos_NK: Tensor,
    sin_NK: Tensor,
    q_weight_K: Tensor | None,
    k_weight_K: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch: float32 inside (float64 for float64 input), each result in its input's dtype."""
    return (
        _rotate_reference(q_BHNK, cos_NK, sin_NK, q_weight_K, eps),
        _rotate_reference(k_BHNK, cos_NK, sin_NK, k_weight_K, eps),
    )


def _split(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, N, K), views."""
    q, k, v = qkv_BN3HK.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


# ---------------------------------------------- csrc/cpu/rope.cpp, csrc/cuda/rope.cu, triton_kernels/rope.py


def _token_major(t_BHNK: Tensor) -> Tensor:
    """Empty, with the shape of t and the memory layout (B, N, H, K), in which attention's input and output come."""
    B, H, N, K = t_BHNK.shape
    return t_BHNK.new_empty(B, N, H, K).transpose(1, 2)


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them."""

    def weights(cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> list[Tensor]:
        return [cos.new_empty(0 if weight is None else weight.shape[0]) for weight in (q_weight, k_weight)]

    @torch.library.register_fake(f"{namespace}::rope")
    def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return _token_major(q), _token_major(k)

    @torch.library.register_fake(f"{namespace}::rope_backward")
    def _(dq: Tensor, dk: Tensor, q: Tensor | None, k: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        return _token_major(dq), _token_major(dk), *weights(*rest)

    @torch.library.register_fake(f"{namespace}::rope_qkv")
    def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return _token_major(q), _token_major(k), _token_major(v)

    @torch.library.register_fake(f"{namespace}::rope_qkv_backward")
    def _(
        dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor | None, k: Tensor | None, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor, ...]:
        B, H, N, K = dq.shape
        dbias = rest[0].new_empty(0 if bias is None else 3 * H * K)
        return dq.new_empty(B, N, 3, H, K), *weights(*rest), dbias


def _keep(ctx: Any, q: Tensor, k: Tensor, rest: tuple[Any, ...], *bias: Tensor | None) -> None:
    """Save what the backward pass needs. The gradient of a rotation needs no input; that of the norm does."""
    cos, sin, q_weight, k_weight, ctx.eps, ctx.namespace = rest
    q_kept, k_kept = None if q_weight is None else q, None if k_weight is None else k
    ctx.save_for_backward(q_kept, k_kept, *bias, cos, sin, q_weight, k_weight)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _keep(ctx, q, k, rest)
        return getattr(torch.ops, ctx.namespace).rope(q, k, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # to be asked for once: activation checkpointing fills it by computing again
        dq, dk, *dweights = dispatch.run_backward(ctx.namespace, "rope_backward", dq, dk, *saved, ctx.eps)
        dq_weight, dk_weight = (None if w is None else dw for w, dw in zip(saved[-2:], dweights, strict=True))
        return dq, dk, None, None, dq_weight, dk_weight, None, None


class _RopeQKV(torch.autograd.Function):
    """q and k rotated, v with its bias or a view of qkv, and one gradient for all three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split(qkv)
        _keep(ctx, q, k, rest, bias)
        ops = getattr(torch.ops, ctx.namespace)
        if bias is not None:
            return ops.rope_qkv(q, k, v, bias, *rest[:-1])
        return *ops.rope(q, k, *rest[:-1]), v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = (dq, dk, dv, *saved, ctx.eps)
        dqkv, *dweights, dbias = dispatch.run_backward(ctx.namespace, "rope_qkv_backward", *inputs)
        dq_weight, dk_weight = (None if w is None else dw for w, dw in zip(saved[-2:], dweights, strict=True))
        return dqkv, None if saved[2] is None else dbias, None, None, dq_weight, dk_weight, None, None


# ---------------------------------------------------------------------------------------------------------- public


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    checks.check_kind(OP, q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    if q.ndim != 4 or q.shape[-1] % 2:
        checks.fail(OP, f"q {checks.shape(q)}", "q (B, H, N, K) with an even head width K")
    because = f"q {checks.shape(q)}"
    checks.check_shape(OP, "k", k, checks.shape(q), because)
    if k.dtype != q.dtype:
        checks.fail(OP, f"k {checks.shape(k)} of dtype {k.dtype}, q of {q.dtype}", "one dtype for both")
    checks.check_shape(OP, "cos", cos, checks.shape(q)[2:], because)
    checks.check_shape(OP, "sin", sin, checks.shape(q)[2:], because)
    checks.check_shape(OP, "q_weight", q_weight, (q.shape[-1],), because)
    checks.check_shape(OP, "k_weight", k_weight, (q.shape[-1],), because)
    checks.check_inner(OP, q=q, k=k)


def _kernels_for(t: Tensor, cos: Tensor, sin: Tensor) -> Any | None:
    # No kernel has a gradient for the tables: they are fixed buffers in every model here.
    return None if cos.requires_grad or sin.requires_grad else dispatch.kernels_for(OP, t)


def _wide(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.float() for t in tensors)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, after RMS-normalising each where its weight is given.

    Args: q, k (B, H, N, K) of one dtype, any strides but a contiguous last axis; cos, sin (N, K); q_weight, k_weight
        (K,) or None; any floating dtypes.
    Returns: (q, k) in their own dtype, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(q, k, cos, sin, q_weight, k_weight)
    ops = _kernels_for(q, cos, sin)
    if ops is None:
        return rope_reference(q, k, cos, sin, q_weight, k_weight, eps)
    return _Rope.apply(q, k, *_wide(cos.contiguous(), sin.contiguous(), q_weight, k_weight), eps, ops.name)


def rope_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` on the packed projection of attention, without a layout copy in either direction.

    Args: qkv (B, N, 3, H, K), its last axis contiguous; the rest as `rope`; bias (3 H K,) is added first, or None.
    Returns: (q, k, v), each (B, H, N, K) with memory of layout (B, N, H, K) or a view of qkv, which v is without a
        bias; nothing but that is done to v.
    Raises: ValueError naming the shapes found and needed.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        checks.fail(OP, f"qkv {checks.shape(qkv)}", "qkv (B, N, 3, H, K)")
    q, k, v = _split(qkv)
    _check(q, k, cos, sin, q_weight, k_weight)
    checks.check_kind(OP, qkv=qkv, bias=bias)
    checks.check_shape(OP, "bias", bias, (math.prod(qkv.shape[2:]),), f"qkv {checks.shape(qkv)}")
    ops = _kernels_for(qkv, cos, sin)
    if ops is None:
        if bias is not None:
            wide = torch.promote_types(qkv.dtype, torch.float32)
            q, k, v = _split(qkv.to(wide) + bias.to(wide).view(qkv.shape[2:]))
        q, k = rope_reference(q, k, cos, sin, q_weight, k_weight, eps)
        return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype)
    bias, *tables_and_weights = _wide(bias, cos.contiguous(), sin.contiguous(), q_weight, k_weight)
    return _RopeQKV.apply(qkv, bias, *tables_and_weights, eps, ops.name)

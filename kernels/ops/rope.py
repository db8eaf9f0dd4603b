"""Rotary position embedding of queries and keys, with optional QK-norm before it.

    t <- t / sqrt(mean(t^2) + eps) * weight          where a weight is given (Dehghani et al. 2023)
    y[2i]   = t[2i]   cos[2i]   - t[2i+1] sin[2i]    (Su et al. 2021; interleaved pairs, as EVA-02's 2-D form)
    y[2i+1] = t[2i+1] cos[2i+1] + t[2i]   sin[2i+1]

Bytes moved, forward, one pass: read q and k, write q and k (the tables stay in cache).
Shape suffixes: B batch, H heads, N tokens, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch
from .rms_norm import rms_norm

OP = "rope"


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


# ---------------------------------------------------------------------------- C++: csrc/cpu/rope.cpp, float32


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos_NK, sin_NK, ctx.transposed = inputs
    ctx.save_for_backward(cos_NK, sin_NK)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    # The gradient of a rotation is the transposed rotation, so this is differentiable any number of times.
    dq, dk = torch.ops.vadit.rope(dq, dk, *ctx.saved_tensors, not ctx.transposed)
    return dq, dk, None, None, None


if dispatch.CPP_LOADED:

    @torch.library.register_fake("vadit::rope")
    def _(q_BHNK: Tensor, k_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        return q_BHNK.new_empty(q_BHNK.shape), k_BHNK.new_empty(k_BHNK.shape)

    torch.library.register_autograd("vadit::rope", _backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------- public


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    checks.check_kind(OP, q=q, k=k, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    if q.ndim != 4 or q.shape[-1] % 2:
        checks.fail(OP, f"q {checks.shape(q)}", "q (B, H, N, K) with an even head width K")
    because = f"q {checks.shape(q)}"
    checks.check_shape(OP, "k", k, checks.shape(q), because)
    checks.check_shape(OP, "cos", cos, checks.shape(q)[2:], because)
    checks.check_shape(OP, "sin", sin, checks.shape(q)[2:], because)
    checks.check_shape(OP, "q_weight", q_weight, (q.shape[-1],), because)
    checks.check_shape(OP, "k_weight", k_weight, (q.shape[-1],), because)


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

    Args: q, k (B, H, N, K), any strides; cos, sin (N, K); q_weight, k_weight (K,) or None; any floating dtypes.
    Returns: (q, k) in their own dtypes, computed in float32.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(q, k, cos, sin, q_weight, k_weight)
    # The compiled op has no gradient for the tables: fixed buffers in every model here.
    if dispatch.takes_cpp(OP, q, k, cos, sin, q_weight, k_weight) and not (cos.requires_grad or sin.requires_grad):
        q = q if q_weight is None else rms_norm(q, q_weight, eps=eps)
        k = k if k_weight is None else rms_norm(k, k_weight, eps=eps)
        return torch.ops.vadit.rope(q, k, cos, sin, False)
    return rope_reference(q, k, cos, sin, q_weight, k_weight, eps)

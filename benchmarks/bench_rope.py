"""RoPE on the packed qkv of attention, to q, k, v and back: python benchmarks/bench_rope.py (options: harness.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import harness
import torch
from torch import Tensor

from vadit.kernels.rope import rope_qkv, rope_reference

SHAPES = {"cpu": {"B": (8, 256, 12, 64)}, "cuda": {"XL": (128, 256, 16, 72), "B": (256, 256, 12, 64)}}
Q_NORM, BIAS = "+norm", "+bias"
"""Appended to a shape's name: with QK-norm; with the bias of the linear layer before, which v gets, too."""


def eager(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    biased = qkv if bias is None else qkv + bias.view(qkv.shape[2:])
    q, k, v = biased.permute(2, 0, 3, 1, 4).unbind(0)
    return *rope_reference(q, k, cos, sin, q_weight, k_weight, 1e-6), v


def biased(op: Callable[..., tuple[Tensor, ...]]) -> harness.Op:
    return lambda qkv, cos, sin, bias: op(qkv, cos, sin, bias=bias)


def peers(device: str, normed: bool) -> dict[str, harness.Op]:
    """Rotations of other packages; none has the norm."""
    if device != "cuda" or normed:
        return {}
    try:
        from flash_attn.layers.rotary import apply_rotary_emb
    except ImportError:
        return {}

    def flash(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        # one angle per pair
        cos_half, sin_half = (table[:, ::2].to(qkv.dtype).contiguous() for table in (cos, sin))
        q, k = (apply_rotary_emb(qkv[:, :, part], cos_half, sin_half, interleaved=True) for part in (0, 1))
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)

    return {"flash-attn": flash}


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, N, H, K = sizes
    for kind in ("", Q_NORM, BIAS):
        label, normed = name + kind, kind == Q_NORM
        for dtype in (torch.float32, torch.bfloat16):
            qkv = torch.randn(B, N, 3, H, K, device=device, dtype=dtype, requires_grad=True)
            cos, sin = (torch.randn(N, K, device=device) for _ in range(2))
            weights = [torch.randn(K, device=device, requires_grad=True) for _ in range(2 * normed)]
            size = qkv.numel() * qkv.element_size() // 3
            forward = 4 * size
            found = harness.contenders(rope_qkv, eager, device) | peers(device, normed)
            if kind == BIAS:
                weights, forward = [torch.randn(3 * H * K, device=device, requires_grad=True)], 6 * size
                found = harness.contenders(biased(rope_qkv), biased(eager), device)
            # back: dq, dk, dv in, dqkv out, and q and k once more for the norm
            backward = (6 + 2 * normed) * size
            yield harness.Case("rope", label, dtype, (qkv, cos, sin, *weights), found, forward, backward)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

"""RMSNorm with modulation: python benchmarks/bench_rms_norm.py (see harness.py for the options)."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from vadit.kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = {"cpu": {"B": (8, 256, 768)}, "cuda": {"XL": (128, 256, 1152), "B": (256, 256, 768)}}


def eager(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, scale, shift, 1e-6)


def peers(weight: Tensor) -> dict[str, harness.Op]:
    """Norms of other packages; the modulation, which they lack, is two more passes of torch."""

    def modulated(norm: harness.Op) -> harness.Op:
        def call(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            y = norm(x, weight)
            assert isinstance(y, Tensor), "a norm returns one tensor"
            return y * (1 + scale[:, None]) + shift[:, None]

        return call

    found: dict[str, harness.Op] = {}
    if not weight.is_cuda:
        return found
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        found["liger"] = modulated(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6))
    except ImportError:
        pass
    try:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        found["apex"] = modulated(lambda x, w: fused_rms_norm_affine(x, w, w.shape, 1e-6))
    except ImportError:
        pass
    try:
        from quack import rmsnorm

        found["quack"] = modulated(lambda x, w: rmsnorm(x, w, eps=1e-6))
    except ImportError:
        pass
    return found


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, N, D = sizes
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(B, N, D, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(D, device=device, requires_grad=True)
        scale, shift = (torch.randn(B, D, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
        found = harness.contenders(rms_norm, eager, device) | peers(weight)
        size = x.numel() * x.element_size()
        yield harness.Case("rms_norm", name, dtype, (x, weight, scale, shift), found, 2 * size, 3 * size)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

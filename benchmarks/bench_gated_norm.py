"""A gated residual sum and its RMSNorm: python benchmarks/bench_gated_norm.py (see harness.py for the options)."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from vadit.kernels.gated_norm import gated_norm, gated_norm_reference

SHAPES = {"cpu": {"B": (8, 256, 768)}, "cuda": {"XL": (128, 256, 1152), "B": (256, 256, 768)}}
DTYPES = {
    "": [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    "+autocast": [(torch.float32, torch.bfloat16)],  # of GPUs: a float32 residual stream among bf16
}


def fused(x: Tensor, h: Tensor, gate: Tensor, bias: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    weight, scale, shift = rest
    return gated_norm(x, h, gate, weight, bias, scale, shift, dtype=h.dtype)


def eager(x: Tensor, h: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return gated_norm_reference(x, h, *rest, 1e-6, h.dtype)


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, N, D = sizes
    for suffix, dtypes in DTYPES.items():
        if suffix and device == "cpu":
            continue
        for stream, layers in dtypes:
            x = torch.randn(B, N, D, device=device, dtype=stream, requires_grad=True)
            h = torch.randn(B, N, D, device=device, dtype=layers, requires_grad=True)
            bias, weight = (torch.randn(D, device=device, dtype=stream, requires_grad=True) for _ in range(2))
            gate, scale, shift = (torch.randn(B, D, device=device, dtype=layers, requires_grad=True) for _ in range(3))
            found = harness.contenders(fused, eager, device)
            size = x.numel() * (x.element_size() + h.element_size())
            inputs = (x, h, gate, bias, weight, scale, shift)
            yield harness.Case("gated_norm", name + suffix, stream, inputs, found, 2 * size, 3 * size)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

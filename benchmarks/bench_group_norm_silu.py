"""GroupNorm + SiLU on channels-last images: python benchmarks/bench_group_norm_silu.py (see harness.py for options)."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.kernels import group_norm_silu

GROUPS = 32
# (batch, channels, side): the widest and the deepest level of the f16 autoencoder at 256 x 256
SHAPES = {
    "cpu": {"256px": (1, 128, 256), "16px": (4, 512, 16)},
    "cuda": {"256px": (8, 128, 256), "16px": (32, 512, 16)},
}


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), 1e-6))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm_silu(x, weight, bias, GROUPS)


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, C, side = sizes
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(B, C, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight, bias = (torch.randn(C, device=device, requires_grad=True) for _ in range(2))
        size = x.numel() * x.element_size()
        # forward: the statistics and the result each read x; backward: two passes over x and dy
        yield harness.Case(
            "group_norm_silu",
            name,
            dtype,
            (x.requires_grad_(), weight, bias),
            harness.contenders(ours, eager, device),
            3 * size,
            5 * size,
        )


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

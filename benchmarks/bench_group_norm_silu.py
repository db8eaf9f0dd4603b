"""GroupNorm + SiLU of the autoencoder, which is torch's: how far its compiled form is from a copy's speed.

    python benchmarks/bench_group_norm_silu.py (see harness.py for the options)

A kernel of our own would pay where torch.compile on channels-last activations reaches less than 80% of the copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

# (batch, channels, side): the widest and the deepest level of the f16 autoencoder at 256 x 256
SHAPES = {
    "cpu": {"256px": (1, 128, 256), "16px": (4, 512, 16)},
    "cuda": {"256px": (8, 128, 256), "16px": (8, 512, 16)},
}


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight.to(x.dtype), bias.to(x.dtype), 1e-6))


def cases(device: str, names: list[str] | None) -> Iterator[harness.Case]:
    for name, (B, C, side) in SHAPES[device].items():
        if names and name not in names:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(B, C, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            weight, bias = (torch.randn(C, device=device, requires_grad=True) for _ in range(2))
            found = harness.contenders(group_norm_silu, group_norm_silu, device)
            found = {contender: call for contender, call in found.items() if contender in ("eager", "compile")}
            size = x.numel() * x.element_size()
            # forward: the statistics and the result each read x; backward: two passes over x and dy
            yield harness.Case("gn_silu", name, dtype, (x.requires_grad_(), weight, bias), found, 3 * size, 5 * size)


if __name__ == "__main__":
    options = harness.arguments(__doc__)
    harness.run(cases(options.device, options.shapes), options)

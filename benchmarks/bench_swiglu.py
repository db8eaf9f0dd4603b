"""The gate of SwiGLU: python benchmarks/bench_swiglu.py (see harness.py for the options)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from vadit.kernels.swiglu import swiglu, swiglu_reference

BIAS = "+bias"  # Appended to a shape's name: with the bias of the linear layer before.
SHAPES = {"cpu": {"B": (8, 256, 2048)}, "cuda": {"XL": (128, 256, 3072), "B": (256, 256, 2048)}}


def peers(device: str) -> dict[str, harness.Op]:
    """Gates of other packages; they take the halves apart."""
    found: dict[str, harness.Op] = {}
    if device != "cuda":
        return found
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def liger(x12: Tensor) -> Tensor:
            x1, x2 = x12.chunk(2, dim=-1)
            return LigerSiLUMulFunction.apply(x1, x2)

        found["liger"] = liger
    except ImportError:
        pass
    try:
        from flash_attn.ops.activations import swiglu as flash_swiglu

        found["flash-attn"] = lambda x12: flash_swiglu(*x12.chunk(2, dim=-1))
    except ImportError:
        pass
    return found


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, N, H = sizes
    for biased, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        label = name + BIAS * biased
        shapes = [(B, N, 2 * H), (2 * H,)][: 1 + biased]
        inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        found = harness.contenders(swiglu, swiglu_reference, device) | ({} if biased else peers(device))
        size = inputs[0].numel() * inputs[0].element_size() // 2
        yield harness.Case("swiglu", label, dtype, tuple(inputs), found, 3 * size, 5 * size)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

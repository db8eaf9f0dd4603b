"""AdamW, clipping, one average and bf16 copies: python benchmarks/bench_adamw_ema.py (see harness.py for the options).

Eager is torch's fused AdamW with foreach ops before and after it. float32: fp32 gradients and no copies; bfloat16: bf16
gradients, and copies of the fp32 weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import harness
import torch
from torch import Tensor

from vadit.kernels.adamw_ema import adamw_ema

SHAPES = {"cpu": {"B": (768, 2048, 12)}, "cuda": {"XL": (1152, 3072, 28), "B": (768, 2048, 12)}}
"""LightningDiT: width, hidden width of SwiGLU, blocks."""
SETTINGS = {"lr": 2e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "step": 100, "rates": (1e-4,)}


def weights_of(width: int, hidden: int, depth: int, device: str) -> list[Tensor]:
    """As the blocks have them: matrices and biases of attention, MLP and modulation."""
    layers = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden), (6 * width, width)]
    block = [*layers, *((rows,) for rows, _ in layers), (width,), (width,)]
    return [torch.randn(shape, device=device) / 50 for _ in range(depth) for shape in block]


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    weights = weights_of(*sizes, device)
    count = sum(weight.numel() for weight in weights)
    for dtype in (torch.float32, torch.bfloat16):
        grads = [(weight / 10).to(dtype) for weight in weights]
        exp_avgs, exp_avg_sqs = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
        step = functools.partial(
            adamw_ema, weights, grads, exp_avgs, exp_avg_sqs, averages=[[weight.clone() for weight in weights]],
            copies=grads if dtype == torch.bfloat16 else None, scale=torch.tensor(0.5, device=device), **SETTINGS,
        )  # fmt: skip
        found = harness.contenders(step, step, device)
        del found["compile"]  # it would be of lists of all weights
        found["eager"] = functools.partial(harness.on, "reference", step)
        yield harness.Case("adamw_ema", name, dtype, (), found, 36 * count, 0)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

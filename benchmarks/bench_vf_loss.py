"""The VF loss against its naive form, where z' is formed: python benchmarks/bench_vf_loss.py (options: harness.py)."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.kernels.vf_loss import vf_loss, vf_loss_reference

SHAPES = {"cpu": {"d32": (8, 1024, 32, 256)}, "cuda": {"d32": (32, 1024, 32, 256)}}
MARGINS = {"cos_margin": 0.5, "distmat_margin": 0.25}


def naive(z: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in the inputs' dtype: what the paper's equations say, step by step."""
    projected = torch.einsum("Dd,bdn->bDn", weight, z)
    a, b = F.normalize(projected, dim=1), F.normalize(features, dim=1)
    gap = (torch.einsum("bci,bcj->bij", a, a) - torch.einsum("bci,bcj->bij", b, b)).abs()
    cosine = F.cosine_similarity(projected, features, dim=1)
    return F.relu(1 - MARGINS["cos_margin"] - cosine).mean(), F.relu(gap - MARGINS["distmat_margin"]).mean()


def op(z: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return vf_loss(z, weight, features, **MARGINS)


def low_rank(z: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return vf_loss_reference(z, weight, features, *MARGINS.values(), None)


def cases(name: str, sizes: tuple[int, ...], device: str) -> Iterator[harness.Case]:
    B, D, d, N = sizes
    for dtype in (torch.float32, torch.bfloat16):
        z = torch.randn(B, d, N, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(D, d, device=device) / d**0.5).to(dtype).requires_grad_()
        features = torch.randn(B, D, N, device=device, dtype=dtype)
        found = harness.contenders(op, naive, device) | {"reference": low_rank}
        size = features.numel() * features.element_size()
        # bound by arithmetic: the features once each way is all that must move
        yield harness.Case("vf_loss", name, dtype, (z, weight, features), found, size, size)


if __name__ == "__main__":
    harness.main(__doc__, SHAPES, cases)

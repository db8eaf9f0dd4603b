"""Kernels prove themselves on the device before a run relies on them: a wrong number must not come from a new card,
driver or compiler. What fails is left out, and plain torch does its work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch
from .rms_norm import rms_norm
from .rope import rope_qkv
from .swiglu import swiglu
from .testing import relative_error, results_and_gradients
from .vf_loss import vf_loss

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest deviation from plain torch over the largest value: far above rounding, far below a wrong formula."""


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Per op a call and its differentiated inputs: sizes of the models, few rows, none a multiple of a tile."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    cos, sin = (normal(33, 72, dtype=torch.float32) for _ in range(2))
    latent, features = normal(2, 32, 65, dtype=torch.float32), normal(2, 768, 65)

    def vf(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return vf_loss(z, weight, features, cos_margin=0.5, distmat_margin=0.1)

    def rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = rope_qkv(qkv, cos, sin, q_weight, k_weight)
        return q, k, v * 1

    return {
        "rms_norm": (rms_norm, [normal(2, 33, 1152), normal(1152), normal(2, 1152), normal(2, 1152)]),
        "rope": (rope, [normal(2, 33, 3, 4, 72), normal(72), normal(72)]),
        "swiglu": (swiglu, [normal(2, 33, 6144)]),
        "vf_loss": (vf, [latent, normal(768, 32, dtype=torch.float32)]),
    }


def _deviation(call: Callable[..., object], inputs: list[Tensor], dtype: torch.dtype) -> str | None:
    """How far the kernels are from plain torch, in words; None where they agree."""
    found = results_and_gradients(call, inputs)  # type: ignore[arg-type]
    with dispatch.setting("reference"):
        plain = results_and_gradients(call, inputs)  # type: ignore[arg-type]
    errors = [relative_error(f, p.double()) for f, p in zip(found, plain, strict=True)]
    # so that a NaN, which is not above any number, counts as a deviation
    wrong = [error for error in errors if not error <= TOLERANCE[dtype]]
    return f"{wrong[0]:.1e} off plain torch in {dtype}" if wrong else None


def self_check(device: torch.device) -> dict[str, str]:
    """Run every op that would run on kernels on `device` against plain torch, results and gradients, both dtypes.

    Returns: per op that failed, why. It runs on plain torch from then on.
    """
    failures: dict[str, str] = {}
    for op, backend in dispatch.backends(device.type).items():
        if backend == "reference":
            continue
        for dtype in dispatch.DTYPES:
            call, inputs = _cases(device, dtype)[op]
            try:
                why = _deviation(call, inputs, dtype)
            except Exception as error:  # whatever a compiler or driver raises: the run goes on without the kernel
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            if why is not None:
                dispatch.distrust(op, backend, why)
                failures[op] = f"{backend} failed its self-check ({why})"
                break
    return failures

"""Kernels prove themselves on the device before a run relies on them: a wrong number must not come from a new card,
driver or compiler. What fails is left out, and plain torch does its work."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import dispatch
from .adamw_ema import adamw_ema
from .gated_norm import gated_norm
from .group_norm_silu import group_norm_silu
from .rms_norm import rms_norm
from .rope import rope_qkv
from .swiglu import swiglu
from .testing import relative_error, results_and_gradients
from .vf_loss import vf_loss

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest deviation from plain torch over the largest value: far above rounding, far below a wrong formula."""


Case = tuple[Callable[..., object], list[Tensor]]


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, list[Case]]:
    """Per op calls and their differentiated inputs: sizes of the models, few rows.

    Triton compiles each combination of optional arguments, and of sizes that are multiples of 16 or not, by itself.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    latent, features = normal(2, 32, 65, dtype=torch.float32), normal(2, 768, 65)

    def vf(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return vf_loss(z, weight, features, cos_margin=0.5, distmat_margin=0.1)

    def stepped(weight: Tensor, *others: Tensor) -> Tensor:
        own, grad, average, *moments = (each.detach().clone() for each in (weight, *others))
        copies = [torch.empty_like(own, dtype=torch.bfloat16)] if dtype == torch.bfloat16 else []
        settings = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 3.0}
        adamw_ema(
            [own], [grad.to(dtype)], *([moment.square()] for moment in moments), averages=[[average]], rates=(0.1,),
            copies=copies, scale=torch.full((), 0.5, device=device), **settings,  # type: ignore[arg-type]
        )  # fmt: skip
        # a result for every input to have a gradient
        return torch.stack([own, average, *copies]).float() + 0 * sum((weight, *others))

    def packed(qkv: Tensor, *weights: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        tokens, width = qkv.shape[1], qkv.shape[-1]
        angle = torch.arange(tokens * width, device=device, dtype=torch.float32).view(tokens, width)
        q, k, v = rope_qkv(qkv, angle.cos(), angle.sin(), *weights, bias=bias)
        return q, k, v * 1

    def biased(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return packed(qkv, *weights, bias=bias)

    def grouped(x: Tensor, weight: Tensor, bias: Tensor, *, silu: bool = True) -> Tensor:
        return group_norm_silu(x.contiguous(memory_format=torch.channels_last), weight, bias, 32, silu=silu)

    D = 1152
    branch = [normal(2, 33, D), normal(2, D), normal(D), normal(D), normal(2, D)]  # h, gate, weight, bias, scale
    return {
        "adamw_ema": [(stepped, [normal(1030, 9, dtype=torch.float32) for _ in range(5)])],
        "gated_norm": [
            (gated_norm, [normal(2, 33, D), *branch, normal(2, D)]),
            (gated_norm, [normal(2, 33, D), *branch]),  # without a shift
            # what autocast makes of a block: a float32 stream
            (lambda *t: gated_norm(*t, dtype=dtype), [normal(2, 33, D, dtype=torch.float32), *branch]),
        ],
        "group_norm_silu": [
            (grouped, [normal(2, 128, 24, 32), normal(128), normal(128)]),
            (functools.partial(grouped, silu=False), [normal(2, 512, 3, 5), normal(512), normal(512)]),  # attention's
        ],
        "rms_norm": [
            (rms_norm, [normal(2, 33, D), normal(D), normal(2, D), normal(2, D)]),
            (rms_norm, [normal(2, 32, D), normal(D), normal(2, D)]),  # without a shift
            (rms_norm, [normal(2, 33, 72), normal(72)]),  # of a head
        ],
        "rope": [
            (biased, [normal(2, 33, 3, 4, 72), normal(864), normal(72), normal(72)]),
            (biased, [normal(2, 32, 3, 16, 72), normal(3456)]),
            (biased, [normal(2, 33, 3, 12, 64), normal(2304)]),
            (packed, [normal(2, 32, 3, 16, 72)]),  # of a layer that adds its bias itself
        ],
        "swiglu": [
            (swiglu, [normal(2, 33, 6144), normal(6144)]),
            (swiglu, [normal(2, 32, 5460), normal(5460)]),  # LightningDiT-L, whose 2730 is no multiple of 16
            (swiglu, [normal(2, 32, 6144)]),
        ],
        "vf_loss": [(vf, [latent, normal(768, 32, dtype=torch.float32)])],
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

    Returns: per op that failed, why. From then on it runs on the next kernels that pass, or on plain torch.

    Raises RuntimeError where a kernel has left the GPU unusable: nothing can go on in this process.
    """
    failures: dict[str, str] = {}
    for op in dispatch.OPS:
        while (backend := dispatch.backends(device.type)[op]) != "reference":
            why = _fault(op, backend, device)
            if why is None:
                break
            dispatch.distrust(op, backend, why)
            fault = f"{backend} failed its self-check ({why})"
            failures[op] = f"{failures[op]}; {fault}" if op in failures else fault
    return failures


def _fault(op: str, backend: str, device: torch.device) -> str | None:
    """What is wrong with the kernels of `op`, or None."""
    for dtype in dispatch.DTYPES:
        for call, inputs in _cases(device, dtype)[op]:
            try:
                why = _deviation(call, inputs, dtype)
            except Exception as error:  # whatever a compiler or driver raises: the run goes on without the kernel
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                _assert_alive(device, f"{backend}'s {op}", why)
            if why is not None:
                return why
    return None


def _assert_alive(device: torch.device, what: str, why: str) -> None:
    """A kernel that has read or written where it must not takes the whole CUDA context with it."""
    try:
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise RuntimeError(f"{what} broke the GPU's context ({why}); set VADIT_KERNELS=reference") from error

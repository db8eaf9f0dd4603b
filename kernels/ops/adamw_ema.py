"""AdamW, clipping, averages and bf16 copies of many weights, in one pass over them; everything is updated in place.

    g = scale * gradient,   w <- w - lr * weight_decay * w                      (Loshchilov & Hutter 2019)
    m <- m + (1 - beta1) * (g - m),   v <- beta2 * v + (1 - beta2) * g^2
    w <- w - lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    every average a <- a + rate * (w - a),   copy <- w rounded to bfloat16

Bytes moved per weight: gradient 4 (2 in bfloat16), w, m, v and each average 8, copy 2. Plain torch takes a pass each
for the scale, AdamW, every average and the copies: 12 + 4 per average more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, dispatch

OP = "adamw_ema"
SCHEMAS = {
    "adamw_ema": "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] averages, Tensor(e!)[] copies, Tensor? scale, float[] rates, float[] numbers) -> ()",
}


def adamw_ema_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[list[Tensor]],
    copies: list[Tensor],
    scale: Tensor | None,
    rates: Sequence[float],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: float,
) -> None:
    """The same in passes of plain torch: its fused AdamW and foreach ops."""
    grads = [grad.to(weight.dtype) for grad, weight in zip(grads, weights, strict=True)]
    if scale is not None:
        grads = list(torch._foreach_mul(grads, scale.to(grads[0])))
    steps = [torch.full((), step, dtype=torch.float32, device=weights[0].device)] * len(weights)
    settings = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    torch._fused_adamw_(weights, grads, exp_avgs, exp_avg_sqs, [], steps, amsgrad=False, maximize=False, **settings)
    for shards, rate in zip(averages, rates, strict=True):
        torch._foreach_lerp_(shards, weights, rate)
    if copies:
        torch._foreach_copy_(copies, weights)


# ---------------------------------------------------------- csrc/cpu/adamw_ema.cpp, triton_kernels/adamw_ema.py


def register(namespace: str) -> None:
    """Nothing: the op has no results, and no graph holds it."""


# ---------------------------------------------------------------------------------------------------------- public


def adamw_ema(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    averages: list[list[Tensor]] | None = None,
    rates: Sequence[float] = (),
    copies: list[Tensor] | None = None,
    scale: Tensor | None = None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: float,
) -> None:
    """Step all `weights`, which have made `step` - 1 steps before, with everything that follows them.

    Args:
        weights, exp_avgs, exp_avg_sqs: as many tensors each, alike in shape and strides, without gaps, fp32.
        grads: as many, fp32 or all bf16.
        averages: for each of `rates`, the shares of new weights, a list like `weights`.
        copies: bf16 tensors that the new weights are rounded into, or none.
        scale: () fp32 on their device, which multiplies gradients.
    Raises: ValueError naming the shape found and needed.
    """
    averages, copies = averages or [], copies or []
    if not weights:
        return
    if len(averages) != len(rates):
        checks.fail(OP, f"{len(averages)} averages", f"one for each of {len(rates)} rates")
    laid = [grad if grad.stride() == weight.stride() else torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
            for grad, weight in zip(grads, weights, strict=True)]  # fmt: skip
    whole = [weights, laid, exp_avgs, exp_avg_sqs, *averages, *([copies] if copies else [])]
    for group in whole[1:]:
        if len(group) != len(weights):
            checks.fail(OP, f"{len(group)} tensors for {len(weights)} weights", "one for each weight")
        for one, weight in zip(group, weights, strict=True):
            if one.shape != weight.shape or one.stride() != weight.stride():
                checks.fail(OP, f"{checks.shape(one)} for a weight {checks.shape(weight)}", "equal shapes and strides")
    ops = dispatch.kernels_for(OP, weights[0], laid[0])
    alike = all(each.dtype == torch.float32 for group in (weights, exp_avgs, *averages) for each in group)
    same = all(grad.dtype == laid[0].dtype for grad in laid)
    dense = all(weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    if ops is None or not (alike and same and dense):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": step}
        adamw_ema_reference(weights, laid, exp_avgs, exp_avg_sqs, averages, copies, scale, rates, **settings)  # type: ignore[arg-type]
        return
    correction = 1 - betas[0] ** step, math.sqrt(1 - betas[1] ** step)
    numbers = [1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], lr / correction[0], 1 / correction[1], eps]
    flat = [shard for shards in averages for shard in shards]
    ops.adamw_ema(weights, laid, exp_avgs, exp_avg_sqs, flat, copies, scale, list(rates), numbers)

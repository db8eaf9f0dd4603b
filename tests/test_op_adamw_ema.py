"""AdamW with averages and copies against its formula in float64, and against torch's AdamW, every backend."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vadit.kernels import adamw_ema, dispatch
from vadit.kernels.testing import device, relative_error

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MARGIN = 64
SHAPES = [(33, 7), (1,), (2, 3, 5, 4), (9000,), (0, 4), (64, 128)]


@pytest.fixture(autouse=True)
def kernels(backend: str) -> None:
    if "cuda" in backend:
        pytest.skip("it has no kernels in CUDA")


def made(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A tensor of each shape between margins of NaN, the fourth-rank one in channels-last."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in SHAPES:
        values = torch.randn(shape, generator=generator)
        values = values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values
        room = torch.full((values.numel() + 2 * MARGIN,), math.nan, dtype=dtype, device=device())
        found.append(room.as_strided(shape, values.stride(), MARGIN).copy_(values))
    return found


def whole(tensors: list[Tensor]) -> bool:
    """Whether the margins of `made` are as they were."""
    return all(t._base is not None and t._base.isnan().sum() == 2 * MARGIN for t in tensors)


def formula(state: dict[str, Any], grads: list[Tensor], scale: float, rates: tuple[float, ...], step: int) -> None:
    """One step in float64."""
    (beta1, beta2), lr = SETTINGS["betas"], SETTINGS["lr"]
    for i, grad in enumerate(grads):
        g = grad.double() * scale
        w, m, v = (state[name][i] for name in ("w", "m", "v"))
        w *= 1 - lr * SETTINGS["weight_decay"]
        m += (1 - beta1) * (g - m)
        v.mul_(beta2).add_((1 - beta2) * g * g)
        w -= lr / (1 - beta1**step) * m / (v.sqrt() / math.sqrt(1 - beta2**step) + SETTINGS["eps"])
        for shards, rate in zip(state["a"], rates, strict=True):
            shards[i] += rate * (w - shards[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rates", [(), (0.01,), (0.9, 0.0001)])
def test_steps_are_the_formulas(rates: tuple[float, ...], dtype: torch.dtype, backend: str) -> None:
    weights, exp_avgs, exp_avg_sqs = made(0), [w.zero_() for w in made(0)], [w.zero_() for w in made(0)]
    averages, copies = [made(7 + k) for k in range(len(rates))], [w.bfloat16() for w in weights]
    exact = {"w": weights, "m": exp_avgs, "v": exp_avg_sqs}
    exact = {name: [each.double() for each in group] for name, group in exact.items()}
    exact["a"] = [[each.double() for each in shards] for shards in averages]  # type: ignore[misc]
    for step in (1, 2, 3):
        grads, scale = made(step, dtype), torch.tensor(0.25, device=device())
        adamw_ema(weights, grads, exp_avgs, exp_avg_sqs, averages=averages, rates=rates, step=step,
                  copies=copies if dtype == torch.bfloat16 else None, scale=scale, **SETTINGS)  # fmt: skip
        formula(exact, grads, 0.25, rates, step)
    assert whole([*weights, *exp_avgs, *exp_avg_sqs, *(each for shards in averages for each in shards)])
    for group, name in ((weights, "w"), (exp_avgs, "m"), (exp_avg_sqs, "v")):
        assert max(map(relative_error, group, exact[name])) < 4e-7, name
    for shards, expected in zip(averages, exact["a"], strict=True):
        assert max(map(relative_error, shards, expected)) < 4e-7
    if dtype == torch.bfloat16:
        cuts = backend == "triton" and weights[0].device.type == "cpu"  # Triton's interpreter rounds towards zero
        for low, weight in zip(copies, weights, strict=True):
            torch.testing.assert_close(low, weight.bfloat16(), rtol=2**-7 if cuts else 0, atol=0)


def test_misuse_is_named_and_doubles_go_to_plain_torch() -> None:
    def call(weight: Tensor, grad: Tensor, **more: Any) -> None:
        adamw_ema([weight], [grad], [0 * weight], [0 * weight], step=1, **SETTINGS, **more)

    x = torch.ones(2, 3, device=device())
    for bad in (lambda: call(x, x[:1]), lambda: call(x, x, rates=(0.1,)), lambda: call(x, x, copies=[x[0]])):
        with pytest.raises(ValueError, match="adamw_ema"):
            bad()
    double = x.double()
    call(double, torch.ones_like(double))
    call(x, x.clone().t().contiguous().t())  # strides of another order
    assert dispatch.kernels_for("adamw_ema", double) is None and relative_error(x, double) < 1e-7

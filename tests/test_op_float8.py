"""Float8 rows and the layers that multiply them: Triton's casts against plain torch's, layers against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.kernels import float8
from vadit.kernels.testing import assert_compiles, device, relative_error, results_and_gradients

BF16 = torch.bfloat16
STEP = 2**-3  # Between neighbours of e4m3, at most, over their size.

pytestmark = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device(), dtype)


def rows(x8: Tensor, scales: Tensor) -> Tensor:
    return x8.double() * scales.double()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("magnitude", [1.0, 1e4, 1e-4])
def test_rows_are_rounded_to_the_nearest(backend: str, dtype: torch.dtype, magnitude: float) -> None:
    x = normal(37, 72, dtype=dtype) * magnitude
    x[3] = 0
    x[5, 7] = torch.nan
    x8, scales = float8._ops(x).float8_rows(x)
    assert (float8._ops(x) is float8._Reference) == (backend == "reference")
    assert x8.dtype == torch.float8_e4m3fn and scales.shape == (37, 1)
    assert not x8[3].float().any() and x8[5].float().isnan().any() and scales[3] > 0
    kept = [row for row in range(37) if row != 5]
    found, exact = rows(x8, scales)[kept], x.double()[kept]
    largest = exact.abs().amax(1, keepdim=True)
    # half a step of a number, or of the smallest ones that have all their bits
    assert ((found - exact).abs() <= (exact.abs() * STEP / 2).clamp_min(largest / 448 * 2**-10) * 1.001).all()
    assert torch.allclose(found.abs().amax(1, keepdim=True), largest, rtol=1e-6)


@pytest.mark.parametrize("shape", [(33, 48), (5, 3072), (0, 16)])
def test_swiglu_writes_what_swiglu_gives_and_its_rows(backend: str, shape: tuple[int, int]) -> None:
    M, H = shape
    x12, bias, dy = normal(M, 2 * H), normal(2 * H, dtype=torch.float32, seed=1), normal(M, H, seed=2)
    leaf, leaf_bias = x12.double().requires_grad_(), bias.double().requires_grad_()
    x1, x2 = (leaf + leaf_bias).chunk(2, dim=1)
    exact = F.silu(x1) * x2
    exact_dx12, exact_dbias = torch.autograd.grad(exact, [leaf, leaf_bias], dy.double())
    ops = float8._ops(x12)
    y, y8, scales = ops.float8_swiglu(x12, bias)
    dx12, dx12_8, dscales, dbias = ops.float8_swiglu_backward(dy, x12, bias)
    assert (y.dtype, dx12.dtype, dbias.dtype) == (BF16, BF16, torch.float32)
    assert relative_error(y, exact.detach()) <= 2**-8 and relative_error(dx12, exact_dx12) <= 2**-8
    assert relative_error(dbias, exact_dbias) <= 1e-5
    for found, of in ((rows(y8, scales), exact.detach()), (rows(dx12_8, dscales), exact_dx12)):
        assert relative_error(found, of) <= STEP / 2


def test_layers_are_off_by_the_roundings_of_their_rows(backend: str) -> None:
    D, H = 64, 96
    weights = [normal(2 * H, D) / 8, normal(2 * H) / 4, normal(D, H) / 8]
    x = normal(2, 16, D)

    def mlp(x: Tensor, w12: Tensor, bias: Tensor, w3: Tensor) -> Tensor:
        x1, x2 = F.linear(x, w12, bias).chunk(2, dim=-1)
        return F.linear(F.silu(x1) * x2, w3)

    for op, formula, inputs in (
        (float8.float8_linear, F.linear, [x, weights[0]]),
        (float8.float8_mlp, mlp, [x, *weights]),
        (float8.float8_mlp, mlp, [x.float(), *(weight.float() for weight in weights)]),  # autocast's dtypes
    ):
        found = results_and_gradients(op, inputs)
        exact = results_and_gradients(formula, [t.double() for t in inputs])
        assert [t.shape for t in found] == [t.shape for t in exact]
        assert [t.dtype for t in found] == [BF16, *(t.dtype for t in inputs)]
        errors = [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]
        assert max(errors) < 0.09, errors  # random roundings to 2^-4: 0.026 of an operand, and some of them
        # the weight's gradient is a product of bf16: what came through float8 before it is all that it is off
        assert errors[2] < (0.01 if op is float8.float8_linear else 0.09)


def test_compiles_as_one_graph(backend: str) -> None:
    inputs = [normal(1, 16, 32), normal(64, 32) / 4, normal(64), normal(32, 32) / 4]
    assert_compiles(float8.float8_mlp, inputs)
    if backend == "triton":
        x12, bias = normal(5, 24), normal(24, dtype=torch.float32)
        torch.library.opcheck(torch.ops.vadit_triton.float8_rows.default, (x12,))
        torch.library.opcheck(torch.ops.vadit_triton.float8_swiglu.default, (x12, bias))
        torch.library.opcheck(torch.ops.vadit_triton.float8_swiglu_backward.default, (normal(5, 12), x12, bias))

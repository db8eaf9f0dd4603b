"""SwiGLU's gate against its formula in float64: results, gradient, every backend."""

import pytest
import torch
from op_help import assert_names, kernels_of
from torch import Tensor

from vadit.kernels import swiglu
from vadit.kernels.testing import assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


def formula(x12: Tensor, bias: Tensor | None = None) -> Tensor:
    x12 = x12 if bias is None else x12 + bias
    width = x12.shape[-1] // 2
    x1, x2 = x12[..., :width], x12[..., width:]
    return x1 * torch.sigmoid(x1) * x2


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device())


SHAPES = [(3, 5, 2256), (2, 3, 6144), (3, 16, 682), (5, 14), (2, 3, 4, 6), (2,), (4_000, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_results_and_gradients(shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    bias = normal(2, shape[-1])[1].to(dtype) if biased else None
    assert_as_exact_as_torch(swiglu, formula, [normal(*shape).to(dtype), bias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e4, 30.0, 1e-4, 0.0])
def test_magnitudes(magnitude: float, dtype: torch.dtype) -> None:
    x12 = (normal(3, 16, 72) * magnitude).to(dtype)
    assert_as_exact_as_torch(swiglu, formula, [x12])
    assert all(t.isfinite().all() for t in results_and_gradients(swiglu, [x12]))


def test_whole_range_of_the_exponential_and_not_a_number() -> None:
    # Elementwise, where the largest magnitude of a tensor would hide the small ones; x2 = 1.
    x1 = torch.linspace(-100, 100, 20_001).to(device())
    found = swiglu(torch.stack([x1, torch.ones_like(x1)], dim=1))[:, 0].double()
    exact = x1.double() * torch.sigmoid(x1.double())
    smallest = torch.finfo(torch.float32).tiny * 100  # below, the exponential is flushed to 0
    assert ((found - exact).abs() <= 4e-7 * exact.abs() + smallest).all()
    x12 = normal(4, 32)
    x12[1, 3] = torch.nan
    x12[2, 3] = torch.inf
    found = swiglu(x12)
    assert found[1, 3].isnan() and found[2, 3].isinf() and found.isfinite().sum() == found.numel() - 2


def test_strided_input_and_gradient() -> None:
    def through_a_view(op):
        return lambda x: op(x.transpose(0, 1)[:, ::2, 1:25]).transpose(1, 2)

    assert_as_exact_as_torch(through_a_view(swiglu), through_a_view(formula), [normal(10, 3, 26)])
    x12 = normal(3, 80).requires_grad_()
    (found,) = torch.autograd.grad(swiglu(x12).sum(), x12)  # the gradient of a sum has strides 0
    exact = x12.detach().double().requires_grad_()
    torch.testing.assert_close(found.double(), *torch.autograd.grad(formula(exact).sum(), exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 16, 24), (2, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    y, dx, dbias = results_and_gradients(swiglu, [normal(*shape), normal(shape[-1])])
    assert y.shape == (*shape[:-1], shape[-1] // 2) and dx.shape == shape and not dbias.any()


def test_compiles_as_one_graph() -> None:
    assert_compiles(swiglu, [normal(2, 16, 72), normal(72)])


def test_opcheck() -> None:
    ops = kernels_of("swiglu", normal(2))
    for bias in (None, normal(24)):
        torch.library.opcheck(ops.swiglu.default, (normal(2, 5, 24), bias))
        torch.library.opcheck(ops.swiglu_backward.default, (normal(2, 5, 12), normal(2, 5, 24), bias))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([torch.ones(2, 7)], ["(2, 7)", "even"]),
        ([torch.ones(8, 2).T], ["(2, 8)", "(1, 2)", "contiguous"]),
        ([torch.tensor(1.0)], ["()", "(..., 2H)"]),
        ([torch.ones(2, 8, dtype=torch.int32)], ["int32", "floating"]),
        ([torch.ones(2, 8), torch.ones(4)], ["bias (4,)", "bias (8,)"]),
    ],
)
def test_wrong_calls_are_named(inputs: list[Tensor], words: list[str]) -> None:
    assert_names("swiglu", words, swiglu, *inputs)

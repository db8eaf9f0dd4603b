"""GroupNorm + SiLU on channels-last images against the formula in float64: results, gradients, every backend."""

import pytest
import torch
import torch.nn.functional as F
from op_help import assert_names, kernels_of
from torch import Tensor

from vadit.kernels import group_norm_silu
from vadit.kernels.testing import Op, assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def formula(groups: int, silu: bool = True) -> Op:
    """Computed in float32 at least, as the op is."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        z = F.group_norm(x.to(wide), groups, weight.to(wide), bias.to(wide), EPS)
        return (z * torch.sigmoid(z) if silu else z).to(x.dtype)

    return norm


def op(groups: int, silu: bool = True) -> Op:
    return lambda x, weight, bias: group_norm_silu(last(x), weight, bias, groups, EPS, silu=silu)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.0) -> list[Tensor]:
    """An image of such a mean, weight and bias."""
    return [last((normal(*shape) + mean).to(dtype)), normal(shape[1], seed=1), normal(shape[1], seed=2)]


SHAPES = [
    ((2, 32, 9, 7), 16),
    ((1, 6, 5, 5), 3),
    ((1, 160, 3, 4), 32),  # two parts of columns; groups of 5
    ((1, 16, 20, 33), 1),  # several chunks of rows
    ((7, 24, 1, 1), 4),
    ((1, 8, 1, 70), 8),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups", "silu"), [(*case, True) for case in SHAPES] + [(*case, False) for case in SHAPES[:2]]
)
def test_results_and_gradients(shape: tuple[int, ...], groups: int, dtype: torch.dtype, silu: bool) -> None:
    assert_as_exact_as_torch(op(groups, silu), formula(groups, silu), inputs(shape, dtype))


@pytest.mark.parametrize("mean", [1e4, -30.0])
def test_a_mean_far_from_zero_cancels_nothing(mean: float) -> None:
    assert_as_exact_as_torch(op(4), formula(4), inputs((2, 16, 12, 11), mean=mean))


@pytest.mark.parametrize("magnitude", [1e4, 1e-4, 0.0])
def test_magnitudes(magnitude: float) -> None:
    x, weight, bias = inputs((1, 8, 5, 4))
    assert_as_exact_as_torch(op(2), formula(2), [x * magnitude, weight, bias])
    found = results_and_gradients(op(2), [x, weight * magnitude, bias])  # the exponential's whole range
    assert all(t.isfinite().all() for t in found)


def test_layouts_of_result_and_gradient() -> None:
    x, weight, bias = inputs((2, 8, 6, 5), torch.bfloat16)
    x.requires_grad_()
    y = group_norm_silu(x, weight.bfloat16(), bias.bfloat16(), 2)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.sum(), x)  # the gradient of a sum has strides 0
    y = group_norm_silu(x, weight.bfloat16(), bias.bfloat16(), 2)
    (again,) = torch.autograd.grad(y, x, torch.ones(2, 8, 6, 5, dtype=y.dtype, device=y.device))
    assert torch.equal(dx, again) and dx.is_contiguous(memory_format=torch.channels_last)


def test_no_images() -> None:
    shape = (0, 8, 3, 3)
    y, dx, dweight, dbias = results_and_gradients(op(4), inputs(shape))
    assert y.shape == dx.shape == shape and not dweight.any() and not dbias.any()


def test_compiles_as_one_graph() -> None:
    assert_compiles(op(4), inputs((2, 16, 6, 5)))


def test_opcheck() -> None:
    ops = kernels_of("group_norm_silu", normal(2))
    x, weight, bias, mean = normal(2, 15, 8), normal(8), normal(8), normal(2, 4)
    torch.library.opcheck(ops.group_norm_silu.default, (x, weight, bias, 4, EPS, True))
    torch.library.opcheck(ops.group_norm_silu_backward.default, (x, x, weight, bias, mean, mean.abs(), False))


@pytest.mark.parametrize(
    ("x", "groups", "words"),
    [
        (torch.ones(2, 8, 3, 3), 4, ["(72, 9, 3, 1)", "channels-last"]),
        (last(torch.ones(2, 8, 3, 3)), 3, ["(2, 8, 3, 3) and 3 groups", "divide"]),
        (torch.ones(2, 8), 4, ["(2, 8)", "(B, C, H, W)"]),
        (last(torch.ones(2, 16, 3, 3)), 4, ["weight (8,)", "(16,)"]),
        (last(torch.ones(2, 8, 3, 3, dtype=torch.int32)), 4, ["int32", "floating"]),
    ],
)
def test_wrong_calls_are_named(x: Tensor, groups: int, words: list[str]) -> None:
    assert_names("group_norm_silu", words, group_norm_silu, x, torch.ones(8), torch.ones(8), groups)

"""RMSNorm with modulation against its formula in float64: results, all gradients, every backend."""

import pytest
import torch
from op_help import assert_names, assert_same_with_more_threads, kernels_of
from torch import Tensor

from vadit.kernels import rms_norm
from vadit.kernels.testing import assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


def formula(x: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight
    tokens = (slice(None),) + (None,) * (x.ndim - 2)
    if scale is not None:
        y = y * (1 + scale[tokens])
    return y if shift is None else y + shift[tokens]


def make(*shape: int, dtype: torch.dtype = torch.float32, magnitude: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device(), dtype)

    images, width = shape[0], shape[-1]
    return [normal(*shape) * magnitude, 1 + 0.3 * normal(width), 0.5 * normal(images, width), normal(images, width)]


@pytest.mark.parametrize(
    "shape", [(2, 21, 760), (3, 7, 1152), (2, 33, 9), (5, 64), (2, 3, 4, 24), (1, 1, 3), (2, 3, 5000)]
)
@pytest.mark.parametrize("modulation", ["none", "scale", "shift", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients(shape: tuple[int, ...], modulation: str, dtype: torch.dtype) -> None:
    x, weight, scale, shift = make(*shape, dtype=dtype)
    inputs = [x, weight, scale if modulation in ("scale", "both") else None]
    assert_as_exact_as_torch(rms_norm, formula, [*inputs, shift if modulation in ("shift", "both") else None])


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes(magnitude: float, dtype: torch.dtype) -> None:
    inputs = make(2, 16, 72, dtype=dtype, magnitude=magnitude)
    assert_as_exact_as_torch(rms_norm, formula, inputs)
    assert all(t.isfinite().all() for t in results_and_gradients(rms_norm, inputs))


def test_rows_of_nan_and_of_zeros() -> None:
    x, weight, scale, shift = make(2, 37, 72)
    x[1, 5] = torch.nan
    y, dx, *_ = results_and_gradients(rms_norm, [x, weight, scale, shift])
    for t in (y, dx):
        assert t[1, 5].isnan().all() and t.isfinite().sum() == t.numel() - 72
    x, weight, scale, shift = make(2, 16, 72)
    x[0, 3] = 0
    assert_as_exact_as_torch(rms_norm, formula, [x, weight, scale, shift])
    assert_as_exact_as_torch(rms_norm, formula, [torch.zeros_like(x), weight, scale, shift])


def test_bfloat16_modulation_and_an_expanded_gradient() -> None:
    # What autocast makes: a float32 residual stream, a bf16 modulation.
    x, weight, scale, shift = make(2, 16, 72)
    found = rms_norm(x, weight, scale.bfloat16(), shift.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, formula(x, weight, scale.bfloat16().float(), shift.bfloat16().float()))
    x, weight, scale, shift = make(2, 5, 24)
    leaves = [t.requires_grad_() for t in (x, weight, scale, shift)]
    found = torch.autograd.grad(rms_norm(*leaves).sum(), leaves)  # the gradient of a sum has strides 0
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for a, b in zip(found, torch.autograd.grad(formula(*exact).sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_strided_inputs() -> None:
    def through_views(op):
        def call(x_NBD: Tensor, weight: Tensor, modulation: Tensor) -> Tensor:
            scale, shift = modulation.chunk(2, dim=1)
            # the transposed result gives a gradient whose strides differ from those of x
            return op(x_NBD.transpose(0, 1)[..., :40], weight, scale, shift).permute(2, 1, 0)

        return call

    x, weight, scale, shift = make(3, 17, 44)
    inputs = [x.transpose(0, 1).contiguous(), weight[:40], torch.cat([scale[:, :40], shift[:, :40]], dim=1)]
    assert_as_exact_as_torch(through_views(rms_norm), through_views(formula), inputs)


@pytest.mark.parametrize("shape", [(0, 16, 24), (2, 0, 24)])
def test_empty(shape: tuple[int, ...]) -> None:
    x, weight, scale, shift = make(*shape)
    y, dx, dweight, dscale, _ = results_and_gradients(rms_norm, [x, weight, scale, shift])
    assert y.shape == shape and dx.shape == shape and dscale.shape == scale.shape
    assert not dweight.any()


def test_result_does_not_depend_on_the_number_of_threads(backend: str) -> None:
    assert_same_with_more_threads(rms_norm, make(4, 300, 96), backend)


def test_compiles_as_one_graph() -> None:
    assert_compiles(rms_norm, make(2, 16, 72))


def test_opcheck() -> None:
    ops = kernels_of("rms_norm", make(1, 1)[0])
    x, weight, scale, shift = make(2, 5, 24)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, scale, shift, True, 1e-6))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, None, None, False, 1e-6))
    torch.library.opcheck(ops.rms_norm_backward.default, (x, x, weight, scale, None, 1e-6))


def test_second_derivative_is_right_or_refused(backend: str) -> None:
    x, weight, _, _ = make(2, 3, 8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rms_norm(x, weight).pow(3).sum(), x, create_graph=True)
    if backend == "reference":
        assert torch.autograd.grad(gradient.square().sum(), x)[0].any()
    else:
        pytest.raises(RuntimeError, torch.autograd.grad, gradient.square().sum(), x).match("VADIT_KERNELS=reference")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.ones(7)}, ["(7,)", "(8,)"]),
        ({"scale": torch.ones(3, 8)}, ["(3, 8)", "(2, 8)"]),
        ({"x": torch.ones(8)}, ["(8,)", "(B, ..., D)"]),
        ({"x": torch.ones(2, 8, 3).transpose(1, 2)}, ["(2, 3, 8)", "(24, 1, 3)", "contiguous"]),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, ["int64", "floating"]),
        ({"weight": torch.ones(8, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    x, weight, scale, shift = (t.cpu() for t in make(2, 3, 8))
    assert_names("rms_norm", words, rms_norm, **{"x": x, "weight": weight, "scale": scale, "shift": shift} | change)

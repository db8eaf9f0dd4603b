"""The gated residual sum and its norm against their formula in float64: results, all gradients, every backend."""

import pytest
import torch
from op_help import assert_names, assert_same_with_more_threads, kernels_of
from torch import Tensor

from vadit.kernels import gated_norm, rms_norm
from vadit.kernels.gated_norm import gated_norm_reference
from vadit.kernels.testing import assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": (F32, F32, F32), "bfloat16": (BF16, BF16, BF16), "autocast": (F32, BF16, F32)}
"""Of the residual stream; of the linear layers' outputs, so of h and the modulation; of the parameters."""


def make(*shape: int, dtypes: str = "float32", magnitude: float = 1.0) -> list[Tensor | None]:
    """x, h, gate, weight, bias, scale, shift."""
    generator = torch.Generator().manual_seed(0)
    stream, layers, parameters = DTYPES[dtypes]

    def normal(*size: int, dtype: torch.dtype = layers) -> Tensor:
        return torch.randn(size, generator=generator).to(device(), dtype)

    images, width = shape[0], shape[-1]
    x, h = normal(*shape, dtype=stream) * magnitude, normal(*shape) * magnitude
    weight, bias = 1 + 0.3 * normal(width, dtype=parameters), normal(width, dtype=parameters)
    return [x, h, normal(images, width), weight, bias, 0.5 * normal(images, width), normal(images, width)]


def op(x: Tensor, h: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    return gated_norm(x, h, *rest, dtype=None if x.dtype == torch.float64 else h.dtype)


def formula(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In wide numbers from start to end, but for the sum, which is normed as it is stored."""
    wide = torch.promote_types(x.dtype, F32)
    tokens = (slice(None),) + (None,) * (x.ndim - 2)
    branch = h.to(wide) if bias is None else h.to(wide) + bias.to(wide)
    total = (x.to(wide) + gate.to(wide)[tokens] * branch).to(x.dtype)
    y = total.to(wide) / torch.sqrt((total.to(wide) ** 2).mean(-1, keepdim=True) + 1e-6) * weight.to(wide)
    if scale is not None:
        y = y * (1 + scale.to(wide)[tokens])
    y = y if shift is None else y + shift.to(wide)[tokens]
    return total, y.to(h.dtype)


@pytest.mark.parametrize(
    ("shape", "left_out"),
    [
        ((2, 17, 136), ""),
        *(((2, 3, 136), names) for names in ("bias", "shift", "bias scale shift")),
        ((2, 33, 9), ""),
        *(((2, 3, 9), names) for names in ("scale", "shift")),
        ((1, 3, 1152), "shift"),
        ((5, 64), "bias"),
        ((2, 3, 4, 24), ""),
        ((1, 1, 3), ""),
        ((1, 1, 5000), ""),
    ],
)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_and_gradients(shape: tuple[int, ...], left_out: str, dtypes: str) -> None:
    inputs = make(*shape, dtypes=dtypes)
    for position, name in enumerate(("bias", "scale", "shift"), start=4):
        if name in left_out:
            inputs[position] = None
    assert_as_exact_as_torch(op, formula, inputs)


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_magnitudes(magnitude: float, dtypes: str) -> None:
    inputs = make(2, 5, 72, dtypes=dtypes, magnitude=magnitude)
    assert_as_exact_as_torch(op, formula, inputs)
    assert all(t.isfinite().all() for t in results_and_gradients(op, inputs))


def test_rows_of_nan_and_of_zeros() -> None:
    inputs = make(2, 17, 72)
    inputs[1][1, 5] = torch.nan
    total, y, dx, dh, *_ = results_and_gradients(op, inputs)
    for t in (total, y, dx, dh):
        assert t[1, 5].isnan().all() and t.isfinite().sum() == t.numel() - 72
    inputs = make(2, 3, 72)
    for t in (*inputs[:2], inputs[4]):
        t.zero_()
    assert_as_exact_as_torch(op, formula, inputs)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_strides(dtypes: str) -> None:
    """Modulations are parts of one linear layer's output; gradients may come with any strides."""

    def through_views(op):
        def call(x_NBD: Tensor, h: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
            gate, scale, shift = modulation.chunk(3, dim=1)
            total, y = op(x_NBD.transpose(0, 1)[..., :40], h, gate, weight, bias, scale, shift)
            return total.permute(2, 1, 0), y.transpose(1, 2).contiguous()

        return call

    x, h, gate, weight, bias, scale, shift = make(3, 17, 40, dtypes=dtypes)
    wide = torch.cat([x, x[..., :4]], dim=2).transpose(0, 1).contiguous()
    inputs = [wide, h, weight, bias, torch.cat([gate, scale, shift], dim=1)]
    assert_as_exact_as_torch(through_views(op), through_views(formula), inputs)
    leaves = [t.requires_grad_() for t in make(2, 5, 24, dtypes=dtypes)]
    found = torch.autograd.grad(sum(t.sum() for t in op(*leaves)), leaves)  # the gradient of a sum has strides 0
    plain = torch.autograd.grad(sum(t.sum() for t in formula(*leaves)), leaves)
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if a.dtype == BF16 else 1e-4, atol=1e-4 if a.dtype == F32 else 2e-2)


@pytest.mark.parametrize("shape", [(0, 16, 24), (2, 0, 24)])
def test_empty(shape: tuple[int, ...]) -> None:
    inputs = make(*shape, dtypes="autocast")
    total, y, *grads = results_and_gradients(op, inputs)
    assert (total.shape, total.dtype, y.shape, y.dtype) == (shape, F32, shape, BF16)
    for t, grad in zip(inputs, grads, strict=True):
        assert (grad.shape, grad.dtype) == (t.shape, t.dtype) and not grad.any()


def test_is_rms_norm_of_the_sum_in_the_dtype_asked_for() -> None:
    """The norm without a residual sum can do the same; what kernels do not take goes to plain torch."""
    x, h, gate, weight, bias, scale, shift = make(2, 16, 72, dtypes="autocast")
    total, y = gated_norm(x, h, gate, weight, bias, scale, shift, dtype=BF16)
    alone = rms_norm(total, weight, scale, shift, dtype=BF16)
    assert (total.dtype, y.dtype, alone.dtype) == (F32, BF16, BF16)
    torch.testing.assert_close(y, alone)
    wide = rms_norm(total, weight, scale, shift)
    torch.testing.assert_close(alone, wide.to(BF16))
    for found in (rms_norm(total.to(BF16), weight, dtype=F32), gated_norm(x, h, gate, weight)[1]):
        assert found.dtype == F32
    found = gated_norm(x, h.float(), gate, weight, bias, scale, shift, dtype=BF16)
    expected = gated_norm_reference(x, h.float(), gate, bias, weight, scale, shift, 1e-6, BF16)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_result_does_not_depend_on_the_number_of_threads(backend: str) -> None:
    assert_same_with_more_threads(op, make(4, 300, 96), backend)


def test_compiles_as_one_graph() -> None:
    assert_compiles(op, make(2, 16, 72, dtypes="autocast"))


def test_opcheck() -> None:
    x, h, gate, weight, bias, scale, shift = make(2, 5, 24, dtypes="autocast")
    ops = kernels_of("gated_norm", x)
    torch.library.opcheck(ops.gated_norm.default, (x, h, gate, bias, weight, scale, shift, 1e-6))
    torch.library.opcheck(ops.gated_norm_backward.default, (x, h, x, h, gate, bias, weight, scale, shift, 1e-6))
    torch.library.opcheck(ops.gated_norm_backward.default, (x, h, x, h, gate, None, weight, None, None, 1e-6))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"h": torch.ones(2, 3, 7)}, ["h (2, 3, 7)", "(2, 3, 8)"]),
        ({"bias": torch.ones(7)}, ["(7,)", "(8,)"]),
        ({"gate": torch.ones(3, 8)}, ["(3, 8)", "(2, 8)"]),
        ({"x": torch.ones(8)}, ["(8,)", "(B, ..., D)"]),
        ({"h": torch.ones(2, 8, 3).transpose(1, 2)}, ["(2, 3, 8)", "(24, 1, 3)", "contiguous"]),
        ({"weight": torch.ones(8, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    names = ("x", "h", "gate", "weight", "bias", "scale", "shift")
    given = dict(zip(names, (t.cpu() for t in make(2, 3, 8)), strict=True))
    assert_names("gated_norm", words, gated_norm, **given | change)

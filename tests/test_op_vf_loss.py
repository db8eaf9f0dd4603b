"""The low-rank VF loss against the definitions of L_mcos and L_mdms with z' formed, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.kernels import vf_loss
from vadit.kernels.testing import assert_as_exact_as_torch

MARGINS = [(0.0, 0.0), (0.5, 0.25)]


def with_margins(cos_margin: float, distmat_margin: float):
    """The op and the definition as functions of (z, weight, features)."""

    def op(z: Tensor, weight: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
        return vf_loss(z, weight, features, cos_margin=cos_margin, distmat_margin=distmat_margin)

    def definition(z: Tensor, weight: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
        # float32 at least: the loss of bf16 inputs is a float32 number.
        wide = torch.promote_types(z.dtype, torch.float32)
        z, features = z.to(wide), features.to(wide)
        projected = z if weight is None else torch.einsum("Dd,bdn->bDn", weight.to(wide), z)
        a, b = F.normalize(projected, dim=1), F.normalize(features, dim=1)
        gap = (torch.einsum("bci,bcj->bij", a, a) - torch.einsum("bci,bcj->bij", b, b)).abs()
        cosine = F.cosine_similarity(projected, features, dim=1)
        return F.relu(1 - cos_margin - cosine).mean(), F.relu(gap - distmat_margin).mean()

    return op, definition


def make(images: int, d: int, wide: int, positions: int, magnitude: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # A shared part makes cosines of both signs and both sides of the margins.
    weight = normal(wide, d) / d**0.5
    latent = normal(images, d, positions)
    features = weight @ latent + 0.7 * normal(images, wide, positions)
    return [(latent + 0.5 * normal(images, d, 1)) * magnitude, weight, features * magnitude]


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("shape", [(2, 32, 760, 255), (1, 16, 64, 256), (3, 5, 11, 7), (2, 24, 8, 16), (1, 2, 3, 1)])
def test_losses_and_gradients(shape: tuple[int, ...], margins: tuple[float, float]) -> None:
    assert_as_exact_as_torch(*with_margins(*margins), make(*shape))


@pytest.mark.parametrize("margins", MARGINS)
def test_without_weight(margins: tuple[float, float]) -> None:
    z, _, features = make(2, 24, 24, 33)
    assert_as_exact_as_torch(*with_margins(*margins), [z, None, features])


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_magnitudes(magnitude: float) -> None:
    assert_as_exact_as_torch(*with_margins(0.5, 0.25), make(2, 16, 64, 31, magnitude=magnitude))


def test_vectors_of_zeros_have_cosine_zero_and_no_gradient() -> None:
    z, weight, features = make(2, 8, 24, 9)
    z[0, :, 4] = 0
    features[1, :, 2] = 0
    op, definition = with_margins(0.5, 0.25)
    z.requires_grad_()
    found = op(z, weight, features)
    for loss, exact in zip(found, definition(z.double(), weight.double(), features.double()), strict=True):
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(sum(found), z)
    assert gradient.isfinite().all() and not gradient[0, :, 4].any() and gradient[0, :, 3].any()


def test_bfloat16_inputs_lose_nothing_inside() -> None:
    z, weight, features = (t.bfloat16() for t in make(2, 16, 64, 31))
    found = with_margins(0.5, 0.25)[0](z, weight, features)
    exact = with_margins(0.5, 0.25)[1](z.double(), weight.double(), features.double())
    assert all(loss.dtype == torch.float32 for loss in found)
    for loss, right in zip(found, exact, strict=True):
        torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)


def test_autocast_does_not_reach_inside() -> None:
    op, _ = with_margins(0.5, 0.25)
    inputs = make(2, 16, 64, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = op(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, op(*inputs), strict=True))


def test_graph_serves_twice() -> None:
    z, weight, features = make(2, 8, 24, 9)
    z.requires_grad_()
    total = sum(with_margins(0.5, 0.25)[0](z, weight, features))
    first = torch.autograd.grad(total, z, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, z)[0])


def test_projection_is_never_formed() -> None:
    z, weight, features = make(2, 4, 512, 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and "mm" in str(function):
                sizes.append(out.numel())
            return out

    with Watch():
        with_margins(0.5, 0.25)[0](z, weight, features)
    assert sizes and max(sizes) < 2 * 512 * 8


def test_strided_inputs() -> None:
    op, definition = with_margins(0.5, 0.25)
    z, weight, features = make(2, 8, 24, 9)
    inputs = [z.transpose(1, 2).contiguous(), weight.T.contiguous(), features.permute(2, 1, 0).contiguous()]

    def through_views(function):
        return lambda z, weight, f: function(z.transpose(1, 2), weight.T, f.permute(2, 1, 0))

    assert_as_exact_as_torch(through_views(op), through_views(definition), inputs)


def test_compiles_as_one_graph() -> None:
    op, _ = with_margins(0.5, 0.25)
    inputs = make(2, 8, 24, 9)
    for found, eager in zip(torch.compile(op, fullgraph=True, backend="aot_eager")(*inputs), op(*inputs), strict=True):
        torch.testing.assert_close(found, eager)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z": torch.ones(2, 8, 3, 3)}, ["(2, 8, 3, 3)", "(B, d, N)"]),
        ({"features": torch.ones(2, 24, 16)}, ["(2, 24, 16)", "positions"]),
        ({"features": torch.ones(3, 24, 9)}, ["(3, 24, 9)", "images"]),
        ({"weight": torch.ones(8, 24)}, ["(8, 24)", "(24, 8)"]),
        ({"weight": None}, ["(2, 8, 9)", "(2, 24, 9)", "channels"]),
        ({"z": torch.ones(2, 8, 9, dtype=torch.int64)}, ["int64", "floating"]),
        ({"features": torch.ones(2, 24, 9, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    z, weight, features = make(2, 8, 24, 9)
    with pytest.raises(ValueError, match=r"^vf_loss: found") as error:
        vf_loss(**{"z": z, "weight": weight, "features": features} | change, cos_margin=0.5, distmat_margin=0.25)
    assert all(word in str(error.value) for word in words)

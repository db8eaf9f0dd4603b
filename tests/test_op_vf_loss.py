"""The low-rank VF loss against the definitions of L_mcos and L_mdms with z' formed, in float64."""

import pytest
import torch
import torch.nn.functional as F
from op_help import assert_names, kernels_of
from torch import Tensor

from vadit.kernels import features_gram, vf_loss
from vadit.kernels.testing import assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")
MARGINS = [(0.0, 0.0), (0.5, 0.25)]


def with_margins(cos_margin: float, distmat_margin: float):
    """The op and the definition as functions of (z, weight, features)."""

    def op(z: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return vf_loss(z, weight, features, cos_margin=cos_margin, distmat_margin=distmat_margin)

    def definition(z: Tensor, weight: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        # float32 at least: the loss of bf16 inputs is a float32 number.
        wide = torch.promote_types(z.dtype, torch.float32)
        z, features = z.to(wide), features.to(wide)
        projected = torch.einsum("Dd,bdn->bDn", weight.to(wide), z)
        a, b = F.normalize(projected, dim=1), F.normalize(features, dim=1)
        gap = (torch.einsum("bci,bcj->bij", a, a) - torch.einsum("bci,bcj->bij", b, b)).abs()
        cosine = F.cosine_similarity(projected, features, dim=1)
        return F.relu(1 - cos_margin - cosine).mean(), F.relu(gap - distmat_margin).mean()

    return op, definition


def frozen(features: Tensor, cos_margin: float, distmat_margin: float):
    """Both as functions of (z, weight) alone: the kernels have no gradient for the features."""
    op, definition = with_margins(cos_margin, distmat_margin)

    def exact(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return definition(z, weight, features.to(torch.promote_types(z.dtype, features.dtype)))

    return lambda z, weight: op(z, weight, features), exact


def make(images: int, d: int, wide: int, positions: int, magnitude: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device())

    # A shared part makes cosines of both signs and both sides of the margins.
    weight = normal(wide, d) / d**0.5
    latent = normal(images, d, positions)
    features = weight @ latent + 0.7 * normal(images, wide, positions)
    return [(latent + 0.5 * normal(images, d, 1)) * magnitude, weight, features * magnitude]


@pytest.mark.parametrize("margins", MARGINS)
@pytest.mark.parametrize("shape", [(2, 32, 760, 255), (1, 16, 64, 256), (3, 5, 11, 7), (2, 24, 8, 16), (1, 2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients(shape: tuple[int, ...], margins: tuple[float, float], dtype: torch.dtype) -> None:
    z, weight, features = make(*shape)
    # bf16 features of a float32 latent: what a foundation model in bf16 gives
    assert_as_exact_as_torch(*frozen(features.to(dtype), *margins), [z, weight])


@pytest.mark.parametrize("margins", MARGINS)
def test_gradient_of_features(margins: tuple[float, float]) -> None:
    assert_as_exact_as_torch(*with_margins(*margins), make(2, 8, 24, 33))


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_magnitudes(magnitude: float) -> None:
    z, weight, features = make(2, 16, 64, 31, magnitude=magnitude)
    assert_as_exact_as_torch(*frozen(features, 0.5, 0.25), [z, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precomputed_gram(dtype: torch.dtype) -> None:
    z, weight, features = make(2, 16, 64, 31)
    features = features.to(dtype)
    gram = features_gram(features)
    unit = F.normalize(features.double(), dim=1)
    torch.testing.assert_close(gram.double(), unit.transpose(1, 2) @ unit, rtol=0, atol=1e-6)
    assert gram.dtype == torch.float32 and torch.equal(gram, gram.transpose(1, 2))
    margins = {"cos_margin": 0.5, "distmat_margin": 0.25}
    found = results_and_gradients(lambda z, w: vf_loss(z, w, features, **margins, features_gram=gram), [z, weight])
    whole = results_and_gradients(lambda z, w: vf_loss(z, w, features, **margins), [z, weight])
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    # the matrix that is given is the one that is used
    other = vf_loss(z, weight, features, **margins, features_gram=torch.zeros_like(gram))
    assert not torch.equal(other[1], found[1]) and torch.equal(other[0], found[0])


def test_single_position_has_no_distances() -> None:
    # cos(z', z') - cos(f, f) = 1 - 1: all that can be left is rounding, with or without a margin
    z, weight, features = make(3, 2, 5, 1)
    for margin in (0.0, 0.25):
        _, distmat_loss, *gradients = results_and_gradients(
            lambda z, w, m=margin: vf_loss(z, w, features, cos_margin=0.5, distmat_margin=m), [z, weight]
        )
        assert distmat_loss.abs() < 1e-6 and all(g.isfinite().all() for g in gradients)


def test_empty_with_a_nan_and_twice() -> None:
    op, _ = with_margins(0.5, 0.25)
    assert all(loss.isnan() for loss in op(*make(0, 4, 8, 5)))
    z, weight, features = make(2, 4, 8, 5)
    z[1, 2, 3] = torch.nan
    assert all(loss.isnan() for loss in op(z, weight, features))
    z, weight, features = make(2, 8, 24, 9)
    z.requires_grad_()
    total = sum(with_margins(0.5, 0.25)[0](z, weight, features))
    first = torch.autograd.grad(total, z, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, z)[0])


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


def test_bfloat16_outside_loses_nothing_inside() -> None:
    z, weight, features = (t.bfloat16() for t in make(2, 16, 64, 31))
    found = with_margins(0.5, 0.25)[0](z, weight, features)
    exact = with_margins(0.5, 0.25)[1](z.double(), weight.double(), features.double())
    assert all(loss.dtype == torch.float32 for loss in found)
    for loss, right in zip(found, exact, strict=True):
        torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    op, _ = with_margins(0.5, 0.25)
    inputs = make(2, 16, 64, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = op(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, op(*inputs), strict=True))


def test_projection_is_never_formed() -> None:
    z, weight, features = make(2, 4, 512, 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            # products only: the features themselves are of that size
            if isinstance(out, Tensor) and ("mm" in str(function) or "vadit" in str(function)):
                sizes.append(out.numel())
            return out

    with Watch():
        with_margins(0.5, 0.25)[0](z, weight, features)
    assert max(sizes, default=0) < 2 * 512 * 8


def test_strided_inputs() -> None:
    op, definition = with_margins(0.5, 0.25)
    z, weight, features = make(2, 8, 24, 9)
    inputs = [F.pad(z.transpose(0, 1), (1, 3)), weight.T.contiguous()]

    def through_views(function):
        return lambda z, weight: function(z.transpose(0, 1)[..., 1:-3], weight.T, F.pad(features, (2, 1))[..., 2:-1])

    assert_as_exact_as_torch(
        through_views(op), through_views(lambda z, weight, f: definition(z, weight, f.to(z))), inputs
    )


def test_compiles_as_one_graph() -> None:
    z, weight, features = make(2, 8, 24, 9)
    assert_compiles(frozen(features, 0.5, 0.25)[0], [z, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    z, _, features = make(2, 8, 24, 9)
    ops = kernels_of("vf_loss", z)
    torch.library.opcheck(ops.vf_gram.default, (features.to(dtype),))
    u = F.normalize(z, dim=1)
    torch.library.opcheck(ops.vf_distmat.default, (u, u.clone(), features_gram(features), 0.25))


def test_gram_is_symmetric_and_sign_marks_the_gap() -> None:
    z, _, features = make(2, 8, 24, 70)
    ops = kernels_of("vf_loss", z)
    cosines, inverse_norm = ops.vf_gram(features)
    torch.testing.assert_close(inverse_norm, 1 / features.norm(dim=1))
    u = F.normalize(z, dim=1).contiguous()
    loss, sign = ops.vf_distmat(u, u, cosines, 0.25)
    gap = u.double().transpose(1, 2) @ u.double() - cosines.double()
    certain = (gap.abs() - 0.25).abs() > 1e-5
    expected = torch.where(gap.abs() > 0.25, gap.sign(), 0.0).to(torch.int8)
    assert torch.equal(sign[certain], expected[certain]) and torch.equal(sign, sign.transpose(1, 2))
    torch.testing.assert_close(loss.double(), F.relu(gap.abs() - 0.25).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z": torch.ones(2, 8, 3, 3)}, ["(2, 8, 3, 3)", "(B, d, N)"]),
        ({"features": torch.ones(2, 24, 16)}, ["(2, 24, 16)", "positions"]),
        ({"features": torch.ones(3, 24, 9)}, ["(3, 24, 9)", "images"]),
        ({"weight": torch.ones(8, 24)}, ["(8, 24)", "(24, 8)"]),
        ({"features_gram": torch.ones(2, 9, 8)}, ["(2, 9, 8)", "(2, 9, 9)"]),
        ({"z": torch.ones(2, 9, 8).transpose(1, 2)}, ["(2, 8, 9)", "(72, 1, 8)", "contiguous"]),
        ({"features": torch.ones(2, 9, 24).transpose(1, 2)}, ["(2, 24, 9)", "contiguous"]),
        ({"z": torch.ones(2, 8, 9, dtype=torch.int64)}, ["int64", "floating"]),
        ({"features": torch.ones(2, 24, 9, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    z, weight, features = (t.cpu() for t in make(2, 8, 24, 9))
    given = {"z": z, "weight": weight, "features": features, "cos_margin": 0.5, "distmat_margin": 0.25}
    assert_names("vf_loss", words, vf_loss, **given | change)

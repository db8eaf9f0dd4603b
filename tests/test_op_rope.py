"""RoPE with QK-norm against its formula in float64: results, all gradients, every backend."""

import math

import pytest
import torch
from op_help import assert_names, kernels_of
from torch import Tensor

from vadit.kernels import dispatch, rope, rope_qkv
from vadit.kernels.testing import assert_as_exact_as_torch, assert_compiles, device, results_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def angles(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Tables as models have them: each angle stands for the two members of a pair."""
    angle = (3 * normal(tokens, width // 2, seed=5)).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin()


def rotate(t: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        t = t / torch.sqrt((t * t).mean(-1, keepdim=True) + 1e-6) * weight
    out = torch.empty_like(t)
    cos, sin = cos.to(t), sin.to(t)
    out[..., 0::2] = t[..., 0::2] * cos[:, 0::2] - t[..., 1::2] * sin[:, 0::2]
    out[..., 1::2] = t[..., 1::2] * cos[:, 1::2] + t[..., 0::2] * sin[:, 1::2]
    return out


def with_tables(cos: Tensor, sin: Tensor):
    """The op and its formula as functions of (q, k, q_weight, k_weight)."""

    def op(q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None):
        wide = torch.promote_types(q.dtype, torch.float32)  # the tables of a model are never in bf16
        return rope(q, k, cos.to(wide), sin.to(wide), q_weight, k_weight)

    def formula(q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None):
        return rotate(q, cos, sin, q_weight), rotate(k, cos, sin, k_weight)

    return op, formula


@pytest.mark.parametrize("shape", [(2, 3, 17, 72), (2, 2, 32, 64), (1, 5, 7, 12), (3, 1, 1, 2), (11, 2, 4, 6)])
@pytest.mark.parametrize("normed", ["neither", "both", "queries", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients(shape: tuple[int, ...], normed: str, dtype: torch.dtype) -> None:
    weights = [(1 + 0.2 * normal(shape[-1], seed=s)).to(dtype) for s in (3, 4)]
    q_weight = weights[0] if normed in ("both", "queries") else None
    k_weight = weights[1] if normed in ("both", "keys") else None
    q, k = normal(*shape, seed=1).to(dtype), normal(*shape, seed=2).to(dtype)
    assert_as_exact_as_torch(*with_tables(*angles(*shape[2:])), [q, k, q_weight, k_weight])


def test_tables_whose_pairs_differ_and_their_gradients() -> None:
    def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        return rotate(q, cos, sin, None), rotate(k, cos, sin, None)

    inputs = [normal(2, 3, 5, 12, seed=s) for s in (1, 2)] + [normal(5, 12, seed=s) for s in (3, 4)]
    assert_as_exact_as_torch(rope, formula, inputs)
    assert_as_exact_as_torch(*with_tables(*inputs[2:]), inputs[:2])


@pytest.mark.parametrize("magnitude", [1e4, 0.0])
def test_magnitudes(magnitude: float) -> None:
    q, k = (magnitude * normal(2, 3, 16, 24, seed=s) for s in (1, 2))
    assert_as_exact_as_torch(*with_tables(*angles(16, 24)), [q, k])


def split(qkv_BN3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, K), as attention makes them."""
    return qkv_BN3HK.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("axes", [(3, 0, 2, 1), (0, 2, 1, 3)])
def test_strided_inputs_and_gradients(axes: tuple[int, ...], normed: bool) -> None:
    """The width comes first in the gradients, and is not their innermost axis; then tokens come before heads."""
    op, formula = with_tables(*angles(16, 24))
    weights = [1 + 0.2 * normal(24, seed=s) for s in (3, 4)] if normed else [None, None]

    def through_views(function):
        def call(qkv: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(t.permute(axes) for t in function(*split(qkv)[:2], *weights))

        return call

    assert_as_exact_as_torch(through_views(op), through_views(formula), [normal(2, 16, 3, 5, 24), *weights])


@pytest.mark.parametrize("shape", [(2, 17, 3, 3, 72), (1, 16, 3, 4, 64), (3, 5, 3, 1, 6)])
@pytest.mark.parametrize(
    ("normed", "biased"),
    [("neither", False), ("neither", True), ("both", False), ("both", True), ("queries", True), ("keys", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed(shape: tuple[int, ...], normed: str, biased: bool, dtype: torch.dtype) -> None:
    cos, sin = angles(shape[1], shape[-1])
    bias = normal(math.prod(shape[2:]), seed=6).to(dtype) if biased else None
    weights = [(1 + 0.2 * normal(shape[-1], seed=s)).to(dtype) for s in (3, 4)]
    weights = [w if normed in ("both", name) else None for w, name in zip(weights, ("queries", "keys"), strict=True)]

    def op(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        q, k, v = rope_qkv(qkv, cos.to(wide), sin.to(wide), q_weight, k_weight, bias=bias)
        return q, k, v * 1  # a view of the input is no result that could be compared before and after

    def formula(
        qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        q, k, v = split(qkv if bias is None else qkv + bias.view(shape[2:]))
        return rotate(q, cos, sin, q_weight), rotate(k, cos, sin, k_weight), v * 1

    assert_as_exact_as_torch(op, formula, [normal(*shape).to(dtype), *weights, bias])


def test_packed_feeds_attention_without_a_copy_and_is_checked() -> None:
    qkv = normal(2, 16, 3, 5, 24)
    q, k, v = rope_qkv(qkv, *angles(16, 24))
    assert v.data_ptr() == qkv[:, :, 2].data_ptr() and v.stride() == split(qkv)[2].stride()
    if dispatch.kernels_for("rope", qkv):
        assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
        assert rope_qkv(qkv, *angles(16, 24), bias=normal(360))[2].transpose(1, 2).is_contiguous()
    with pytest.raises(ValueError, match=r"^rope: found bias \(120,\); needed bias \(360,\) for qkv"):
        rope_qkv(qkv, *angles(16, 24), bias=normal(120))
    with pytest.raises(ValueError, match=r"^rope: found qkv \(2, 5, 2, 3, 12\); needed qkv \(B, N, 3, H, K\)"):
        rope_qkv(torch.ones(2, 5, 2, 3, 12), *(t.cpu() for t in angles(5, 12)))


def test_packed_gradient_where_values_are_not_used() -> None:
    qkv = normal(2, 16, 3, 5, 24).requires_grad_()
    q, k, _ = rope_qkv(qkv, *angles(16, 24))
    (found,) = torch.autograd.grad(q.square().sum() + k.sum(), qkv)
    plain = qkv.detach().double().requires_grad_()
    cos, sin = angles(16, 24)
    q, k, _ = split(plain)
    total = rotate(q, cos, sin, None).square().sum() + rotate(k, cos, sin, None).sum()
    torch.testing.assert_close(found.double(), torch.autograd.grad(total, plain)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 16, 24), (2, 3, 0, 24)])
def test_empty(shape: tuple[int, ...]) -> None:
    op, _ = with_tables(*angles(*shape[2:]))
    *found, dweight = results_and_gradients(op, [normal(*shape), normal(*shape), normal(shape[-1])])
    assert all(t.shape == shape for t in found) and not dweight.any()
    B, H, N, K = shape
    op = lambda qkv, bias: rope_qkv(qkv, *angles(N, K), bias=bias)  # noqa: E731
    *found, dbias = results_and_gradients(op, [normal(B, N, 3, H, K), normal(3 * H * K)])
    assert [t.shape for t in found] == [shape, shape, shape, (B, N, 3, H, K)] and not dbias.any()


def test_compiles_as_one_graph() -> None:
    op, _ = with_tables(*angles(16, 24))
    assert_compiles(op, [normal(2, 3, 16, 24, seed=1), normal(2, 3, 16, 24, seed=2), 1 + 0.2 * normal(24), None])


@pytest.mark.parametrize("normed", [False, True])
def test_packed_compiles_as_one_graph(normed: bool) -> None:
    cos, sin = angles(16, 24)
    weights = [1 + 0.2 * normal(24, seed=s) for s in (3, 4)] if normed else []

    def op(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k, v = rope_qkv(qkv, cos, sin, *weights, bias=bias)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    assert_compiles(op, [normal(2, 16, 3, 5, 24), normal(360), *weights])


@pytest.mark.parametrize("normed", [False, True])
def test_opcheck(normed: bool) -> None:
    ops = kernels_of("rope", normal(1))
    weights = tuple(1 + 0.2 * normal(12, seed=s) for s in (3, 4)) if normed else (None, None)
    q, k = normal(2, 3, 5, 12), normal(2, 5, 3, 12).transpose(1, 2)
    tables = angles(5, 12)
    torch.library.opcheck(ops.rope.default, (q, k, *tables, *weights, 1e-6))
    saved = (*((q, k) if normed else (None, None)), *tables, *weights, 1e-6)
    torch.library.opcheck(ops.rope_backward.default, (q, k, *saved))
    bias = normal(3, 3, 12) if normed else None
    if bias is not None:
        torch.library.opcheck(ops.rope_qkv.default, (q, k, q, bias, *tables, *weights, 1e-6))
    torch.library.opcheck(ops.rope_qkv_backward.default, (q, k, q, *saved[:2], bias, *saved[2:]))


def test_second_derivative_is_refused_by_kernels() -> None:
    q, k = (normal(2, 3, 5, 12, seed=s).requires_grad_() for s in (1, 2))
    (gradient,) = torch.autograd.grad(rope(q, k, *angles(5, 12))[0].pow(3).sum(), q, create_graph=True)
    if dispatch.kernels_for("rope", q) is None:
        assert torch.autograd.grad(gradient.square().sum(), q)[0].any()
    else:
        pytest.raises(RuntimeError, torch.autograd.grad, gradient.square().sum(), q).match("VADIT_KERNELS=reference")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.ones(3, 5, 12)}, ["(3, 5, 12)", "(B, H, N, K)"]),
        ({"q": torch.ones(2, 3, 5, 11)}, ["(2, 3, 5, 11)", "even"]),
        ({"k": torch.ones(2, 3, 6, 12)}, ["(2, 3, 6, 12)", "(2, 3, 5, 12)"]),
        ({"cos": torch.ones(6, 12)}, ["(6, 12)", "(5, 12)"]),
        ({"k_weight": torch.ones(5)}, ["(5,)", "(12,)"]),
        ({"q": torch.ones(2, 3, 12, 5).transpose(2, 3)}, ["(2, 3, 5, 12)", "(180, 60, 1, 5)", "contiguous"]),
        ({"k": torch.ones(2, 3, 5, 12, dtype=torch.bfloat16)}, ["bfloat16", "float32", "one dtype"]),
        ({"sin": torch.ones(5, 12, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    cos, sin = (t.cpu() for t in angles(5, 12))
    right = {"q": torch.ones(2, 3, 5, 12), "k": torch.ones(2, 3, 5, 12), "cos": cos, "sin": sin}
    assert_names("rope", words, rope, **right | change)

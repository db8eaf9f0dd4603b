"""RoPE with QK-norm against its formula in float64: results, all gradients, both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vadit.kernels import dispatch, rope
from vadit.kernels.testing import assert_as_exact_as_torch, results_and_gradients

BACKENDS = [
    "reference",
    pytest.param("cpp", marks=pytest.mark.skipif(not dispatch.CPP_LOADED, reason="vadit/_C.abi3.so is not built")),
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with dispatch.setting(request.param):
        yield request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
        return rope(q, k, cos.to(q), sin.to(q), q_weight, k_weight)

    def formula(q: Tensor, k: Tensor, q_weight: Tensor | None = None, k_weight: Tensor | None = None):
        return rotate(q, cos, sin, q_weight), rotate(k, cos, sin, k_weight)

    return op, formula


@pytest.mark.parametrize("shape", [(2, 3, 255, 72), (2, 2, 256, 64), (1, 5, 7, 12), (3, 1, 1, 2), (70, 2, 4, 6)])
@pytest.mark.parametrize("normed", ["neither", "both", "queries"])
def test_results_and_gradients(shape: tuple[int, ...], normed: str) -> None:
    weights = [1 + 0.2 * normal(shape[-1], seed=s) for s in (3, 4)]
    q_weight = None if normed == "neither" else weights[0]
    k_weight = weights[1] if normed == "both" else None
    q, k = normal(*shape, seed=1), normal(*shape, seed=2)
    assert_as_exact_as_torch(*with_tables(*angles(*shape[2:])), [q, k, q_weight, k_weight])


def test_gradient_of_a_rotation_turns_back() -> None:
    q, k = normal(2, 3, 16, 24), normal(2, 3, 16, 24, seed=1)
    cos, sin = angles(16, 24)
    q.requires_grad_()
    rotated, _ = rope(q, k, cos, sin)
    (back,) = torch.autograd.grad(rotated, q, rotated.detach())
    torch.testing.assert_close(back, q.detach())
    torch.testing.assert_close(rotated.norm(dim=-1), q.norm(dim=-1))


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


def test_bfloat16_keeps_its_dtype() -> None:
    q, k = (normal(2, 3, 16, 72, seed=s).bfloat16() for s in (1, 2))
    weight = (1 + 0.2 * normal(72)).bfloat16()
    assert_as_exact_as_torch(*with_tables(*angles(16, 72)), [q, k, weight, weight.clone()])


@pytest.mark.parametrize("layout", ["packed_qkv", "width_first"])
def test_strided_inputs(layout: str) -> None:
    op, formula = with_tables(*angles(16, 24))

    def views(t: Tensor) -> tuple[Tensor, Tensor]:
        if layout == "packed_qkv":  # (B, N, 3, H, K), as attention makes it
            return t.permute(2, 0, 3, 1, 4).unbind(0)[:2]
        return t.permute(2, 4, 3, 1, 0).unbind(0)[:2]

    packed = normal(2, 16, 3, 5, 24) if layout == "packed_qkv" else normal(24, 16, 3, 5, 2)
    assert_as_exact_as_torch(lambda t: op(*views(t)), lambda t: formula(*views(t)), [packed])


@pytest.mark.parametrize("shape", [(0, 3, 16, 24), (2, 3, 0, 24)])
def test_empty(shape: tuple[int, ...]) -> None:
    op, _ = with_tables(*angles(*shape[2:]))
    assert all(t.shape == shape for t in results_and_gradients(op, [torch.zeros(shape), torch.zeros(shape)]))


def test_compiles_as_one_graph() -> None:
    op, _ = with_tables(*angles(16, 24))
    inputs = [normal(2, 3, 16, 24, seed=1), normal(2, 3, 16, 24, seed=2), 1 + 0.2 * normal(24), None]
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for found, eager in zip(results_and_gradients(compiled, inputs), results_and_gradients(op, inputs), strict=True):
        torch.testing.assert_close(found, eager)


def test_opcheck(backend: str) -> None:
    if backend != "cpp":
        pytest.skip("plain torch")
    q = normal(2, 3, 5, 12).requires_grad_()
    k = normal(2, 5, 3, 12).transpose(1, 2).requires_grad_()
    for transposed in (False, True):
        torch.library.opcheck(torch.ops.vadit.rope.default, (q, k, *angles(5, 12), transposed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.ones(3, 5, 12)}, ["(3, 5, 12)", "(B, H, N, K)"]),
        ({"q": torch.ones(2, 3, 5, 11)}, ["(2, 3, 5, 11)", "even"]),
        ({"k": torch.ones(2, 3, 6, 12)}, ["(2, 3, 6, 12)", "(2, 3, 5, 12)"]),
        ({"cos": torch.ones(6, 12)}, ["(6, 12)", "(5, 12)"]),
        ({"sin": torch.ones(5, 6)}, ["(5, 6)", "(5, 12)"]),
        ({"k_weight": torch.ones(5)}, ["(5,)", "(12,)"]),
        ({"k": torch.ones(2, 3, 5, 12, dtype=torch.int64)}, ["int64", "floating"]),
        ({"sin": torch.ones(5, 12, device="meta")}, ["meta", "cpu"]),
    ],
)
def test_wrong_calls_are_named(change: dict[str, Tensor], words: list[str]) -> None:
    cos, sin = angles(5, 12)
    right = {"q": torch.ones(2, 3, 5, 12), "k": torch.ones(2, 3, 5, 12), "cos": cos, "sin": sin}
    with pytest.raises(ValueError, match=r"^rope: found") as error:
        rope(**right | change)
    assert all(word in str(error.value) for word in words)

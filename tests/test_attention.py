"""Attention by name: every kernel that a CPU has agrees with float64, and a wish that fails costs one line."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_plain import tiny_dit

from vadit.config import EngineSpec
from vadit.kernels.testing import assert_compiles
from vadit.models import attention
from vadit.models.dit import Attention, LightningDiT

CPU = torch.device("cpu")
HEAD_DIM = 72


def inputs(dtype: torch.dtype, tokens: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the model's linear layer leaves them: views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, tokens, 3, 4, HEAD_DIM, generator=generator).to(dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


@pytest.mark.parametrize("name", ["torch", "math", "flash"])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_kernels_agree_with_float64(name: str, dtype: torch.dtype, allowed: float) -> None:
    leaves = [value.detach().clone().requires_grad_() for value in inputs(dtype)]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    out, expected = attention.named(name)(*leaves), reference(*exact)
    assert out.shape == expected.shape and out.dtype == dtype
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.autograd.grad(out, leaves, gradient)
    wanted = torch.autograd.grad(expected, exact, gradient.double())
    for value, true in zip((out, *found), (expected, *wanted), strict=True):
        assert (value.double() - true).norm() <= allowed * true.norm()


@pytest.mark.parametrize("name", ["torch", "math", "flash"])
def test_kernels_compile_as_one_graph(name: str) -> None:
    assert_compiles(attention.named(name), inputs(torch.float32))


def test_default_is_torch_and_the_order_on_gpus() -> None:
    assert EngineSpec().attention == "auto"
    choice = attention.choose("auto", head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert (choice.name, choice.refused) == ("torch", "")
    q, k, v = inputs(torch.float32)
    assert torch.equal(attention.named(choice.name)(q, k, v), F.scaled_dot_product_attention(q, k, v))
    spec = tiny_dit(Path("unused")).model
    assert all(m.attend is attention.torch_attention for m in LightningDiT(spec).modules() if isinstance(m, Attention))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    attention.choose("math", head_dim=HEAD_DIM, dtype=torch.float32, device=CPU)
    assert torch.equal(torch.rand(3), expected)
    assert attention.preference(72, (9, 0))[0][0] == "cudnn"  # XL: flash-attn pads 72 to 96
    assert attention.preference(64, (9, 0))[0][0] == "flash_attn_3"
    assert attention.preference(64, (8, 0))[0][0] == "flash_attn_2"
    assert "flash_attn_3" not in attention.preference(64, (10, 0))[0]
    order, reason = attention.preference(36, (9, 0))
    assert order == () and "multiple of 8" in reason


@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash_attn_2", "flash_attn_3"])
def test_what_a_cpu_has_not_falls_back_with_its_reason(name: str) -> None:
    choice = attention.choose(name, head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert choice.name == "torch"
    assert choice.refused.startswith(f"{name} cannot be had here (") and "\n" not in choice.refused
    choice = attention.choose("flash", head_dim=HEAD_DIM, dtype=torch.float32, device=CPU)
    assert (choice.name, choice.refused) == ("flash", "")


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_kernel_with_wrong_numbers_is_refused(what: str, monkeypatch) -> None:
    named = attention.named

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.torch_attention(q, k, v.roll(1, -2)) if what == "output" else named("math")(q, k.detach(), v)

    monkeypatch.setattr(attention, "named", lambda name: broken if name == "flash" else named(name))
    choice = attention.choose("flash", head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert choice.name == "torch" and f"its {what} is off by" in choice.refused


@pytest.mark.parametrize("returns_pair", [False, True])
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
def test_flash_attn_is_called_in_its_layout(name: str, returns_pair: bool, monkeypatch) -> None:
    calls: list[dict[str, Any]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert q.shape == (2, 37, 4, HEAD_DIM) and q.data_ptr() == owner[0].data_ptr()  # a view, no copy
        calls.append(options)
        out = attention.torch_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return (out.contiguous(), None) if returns_pair else out.contiguous()

    module = types.ModuleType(attention._FLASH_ATTN[name])
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    owner = inputs(torch.bfloat16)
    out = attention.named(name)(*owner)
    assert torch.equal(out, attention.torch_attention(*owner))
    assert out.transpose(1, 2).is_contiguous()  # the model's reshape to (B, N, D) copies nothing
    assert calls == [{"deterministic": False}]

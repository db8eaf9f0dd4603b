"""Attention by name: every kernel that a CPU has agrees with float64, and a wish that fails costs one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_plain import logged, tiny_dit

from vadit.config import EngineSpec
from vadit.models import attention
from vadit.models.dit import Attention, Block, LightningDiT
from vadit.train import dit

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


def test_default_is_torch_bit_by_bit() -> None:
    assert EngineSpec().attention == "auto"
    choice = attention.choose("auto", head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert (choice.name, choice.refused) == ("torch", "")
    q, k, v = inputs(torch.float32)
    assert torch.equal(attention.named(choice.name)(q, k, v), F.scaled_dot_product_attention(q, k, v))
    spec = tiny_dit(Path("unused")).model
    assert all(m.attend is attention.torch_attention for m in LightningDiT(spec).modules() if isinstance(m, Attention))


@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash_attn_2", "flash_attn_3"])
def test_what_a_cpu_has_not_falls_back_with_its_reason(name: str) -> None:
    choice = attention.choose(name, head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert choice.name == "torch"
    assert choice.refused.startswith(f"{name} cannot be had here (") and "\n" not in choice.refused


@pytest.mark.parametrize("name", ["math", "flash"])
def test_what_a_cpu_has_is_taken(name: str) -> None:
    choice = attention.choose(name, head_dim=HEAD_DIM, dtype=torch.float32, device=CPU)
    assert (choice.name, choice.refused) == (name, "")


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_kernel_with_wrong_numbers_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = attention.named

    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.torch_attention(q, k, v.roll(1, -2)) if what == "output" else named("math")(q, k.detach(), v)

    monkeypatch.setattr(attention, "named", lambda name: broken if name == "flash" else named(name))
    choice = attention.choose("flash", head_dim=HEAD_DIM, dtype=torch.bfloat16, device=CPU)
    assert choice.name == "torch" and f"its {what} is off by" in choice.refused


def test_trying_moves_no_random_numbers() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    attention.choose("math", head_dim=HEAD_DIM, dtype=torch.float32, device=CPU)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("returns_pair", [False, True])
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
def test_flash_attn_is_called_in_its_layout(name: str, returns_pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_order_on_gpus() -> None:
    assert attention.preference(72, (9, 0))[0][0] == "cudnn"  # XL: flash-attn pads 72 to 96
    assert attention.preference(64, (9, 0))[0][0] == "flash_attn_3"
    assert attention.preference(64, (8, 0))[0][0] == "flash_attn_2"
    assert "flash_attn_3" not in attention.preference(64, (10, 0))[0]
    order, reason = attention.preference(36, (9, 0))
    assert order == () and "multiple of 8" in reason


@pytest.mark.parametrize("name", ["math", "flash"])
def test_a_compiled_and_checkpointed_block_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    spec = dataclasses.replace(tiny_dit(Path("unused")).model, depth=1)
    model = LightningDiT(spec, gradient_checkpointing=True).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05) if parameter.requires_grad else None
    block = model.blocks[0]
    assert isinstance(block, Block)
    x, t, y = torch.randn(2, 32, 4, 4), torch.rand(2), torch.tensor([1, 2])
    drop = torch.zeros(2, dtype=torch.bool)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(x, t, y, drop).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = gradients()
    block.attn.attend = attention.named(name)
    eager = gradients()
    block.compile(backend="aot_eager", fullgraph=True)
    compiled = gradients()
    for found in (eager, compiled):
        assert len(found) == len(expected)
        for value, true in zip(found, expected, strict=True):
            torch.testing.assert_close(value, true, rtol=1e-4, atol=1e-5)


def test_a_run_keeps_and_prints_its_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dit.train(tiny_dit(tmp_path / "auto", steps=2))
    assert "engine.attention" not in capsys.readouterr().err
    dit.train(tiny_dit(tmp_path / "math", steps=2, attention="math"))
    assert "engine.attention" not in capsys.readouterr().err
    dit.train(tiny_dit(tmp_path / "cudnn", steps=2, attention="cudnn"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "engine.attention" in line]
    assert len(lines) == 1 and "cudnn cannot be had here" in lines[0] and "using torch instead" in lines[0]
    names = {}
    for name in ("auto", "math", "cudnn"):
        names[name] = json.loads((tmp_path / name / "backends.json").read_text())["engine.attention"]["name"]
    assert names == {"auto": "torch", "math": "math", "cudnn": "torch"}
    assert logged(tmp_path / "cudnn") == logged(tmp_path / "auto")
    assert logged(tmp_path / "math") == pytest.approx(logged(tmp_path / "auto"), rel=1e-5)

"""What is special about the Triton kernels: fences that are seen, tiles per program, and how they are started.

tests/test_op_*.py hold them to their formulas. The interpreter knows nothing of races and of shared memory.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fences import fenced
from torch import Tensor

pytest.importorskip("triton")
from vadit.kernels import rope_qkv, swiglu
from vadit.kernels.rope import rope_reference
from vadit.kernels.swiglu import swiglu_reference
from vadit.kernels.testing import assert_as_exact_as_torch
from vadit.kernels.triton_kernels import common


def normal(*shape: int, seed: int = 0) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_several_tiles_per_program(backend: str, monkeypatch) -> None:
    monkeypatch.setattr(common, "PROGRAMS", 2)
    tables = normal(40, 64, seed=1), normal(40, 64, seed=2)
    inputs = [normal(2, 40, 3, 6, 64), normal(3 * 6 * 64, seed=4), *(normal(64, seed=s) for s in (5, 6))]

    def op(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return rope_qkv(qkv, *tables, *weights, bias=bias)

    def formula(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (qkv + bias.view(3, 6, 64)).permute(2, 0, 3, 1, 4).unbind(0)
        return *rope_reference(q, k, *(t.to(q) for t in tables), *weights, 1e-6), v

    assert_as_exact_as_torch(op, formula, inputs)
    assert_as_exact_as_torch(swiglu, swiglu_reference, [normal(41, 320, seed=7), normal(320, seed=8)])


@pytest.mark.parametrize("place", [-1, 12, 4])
def test_fences_show_what_is_written_beyond_a_tensor(place: int) -> None:
    """Before it, behind it, and between its rows."""
    rows = torch.zeros(3, 6)[:, 1:5]

    def stray(kernel: Any, decide: Any, sizes: tuple[Any, ...], tensor: Tensor) -> None:
        tensor += 1
        assert tensor.as_strided((16,), (1,)).isnan().sum() == 4, "what is read beyond is NaN"
        tensor.as_strided((1,), (1,), tensor.storage_offset() + place + 4 * (place > 4)).fill_(0)

    pytest.raises(AssertionError, fenced(stray), None, None, (), rows).match("written out of bounds")
    assert (rows == 1).all()


class Kernel:
    """Stands for a compiled kernel of Triton: what it is given by the long way, and by the short one."""

    arg_names = ("y", "x", "weight", "rows", "eps", "WIDTH", "ROWS")

    def __init__(self) -> None:
        self.long: list[Any] = []
        self.short: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def start(*arguments: Any, **options: Any) -> Any:
            self.long.append((grid, arguments, options))
            return self

        return start if len(grid) == 1 else lambda *arguments: self.short.append((grid, arguments))


def test_a_kernel_that_has_run_is_started_without_triton_looking_at_its_arguments() -> None:
    kernel, asked = Kernel(), []

    def decide(rows: int, width: int) -> common.Decision:
        asked.append((rows, width))
        return rows // 2, (rows, 1e-6), {"ROWS": 2, "num_warps": 4, "WIDTH": width}

    def launch(rows: int = 8, dtype: torch.dtype = torch.float32, weight: bool = True, offset: int = 0) -> tuple:
        x = torch.zeros(64 + offset, dtype=dtype)[offset:]
        tensors = (torch.zeros(64), x, torch.ones(4) if weight else None)
        common.launch(kernel, decide, (rows, 4), *tensors)
        return tensors

    first = launch()
    options = {"ROWS": 2, "WIDTH": 4, "num_warps": 4, "enable_fp_fusion": True}
    assert kernel.long == [((4,), (*first, 8, 1e-6), options)] and not kernel.short
    again = launch()
    assert kernel.short[-1][0] == (4, 1, 1)
    assert kernel.short[-1][1][3:] == (8, 1e-6, 4, 2) and kernel.short[-1][1][1] is again[1]
    assert asked == [(8, 4)] and len(kernel.long) == 1
    for change in ({"rows": 6}, {"dtype": torch.bfloat16}, {"weight": False}):
        before = len(kernel.long)
        launch(**change)
        launch(**change)
        assert len(kernel.long) == before + 1, "each has a compiled kernel of its own"
    for _ in range(2):  # Triton compiles anew for an address that 16 does not divide
        before = len(kernel.long)
        launch(offset=1)
        assert len(kernel.long) == before + 1

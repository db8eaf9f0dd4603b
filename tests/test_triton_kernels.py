"""The Triton kernels touch their tensors alone, whatever sizes and strides; each kernel is started the short way.

tests/test_op_*.py hold them to their formulas. Here every tensor that they get lies between margins of NaN, and what
they make starts as NaN between margins: reading or writing out of bounds shows, and so does an element not written.
Triton decides when a kernel is defined whether it will be interpreted, so these cases run in one process of their own
(this file as a script). The interpreter knows nothing of races and of shared memory.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vadit.kernels import dispatch, rms_norm, rope, rope_qkv, swiglu
from vadit.kernels.self_check import TOLERANCE
from vadit.kernels.testing import relative_error

MARGIN = 4096
FENCE = 99
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
torch_empty, torch_new_empty = torch.empty, torch.Tensor.new_empty
made: list[tuple[Tensor, int]] = []
given: list[tuple[Tensor, Tensor]] = []


def guarded_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor between margins, filled with NaN: what the kernels' results are."""
    count = torch.Size(shape).numel()
    flat = torch_empty(count + 2 * MARGIN, dtype=dtype).fill_(FENCE)
    made.append((flat, count))
    inner = flat[MARGIN : MARGIN + count]
    return (inner.fill_(float("nan")) if dtype.is_floating_point else inner).view(shape)


def guarded(t: Tensor) -> Tensor:
    """A copy between margins of NaN, with the same strides (those of a dense tensor)."""
    order = sorted(range(t.ndim), key=lambda axis: -t.stride(axis))
    flat = torch_empty(t.numel() + 2 * MARGIN, dtype=t.dtype).fill_(float("nan"))
    copy = flat[MARGIN : MARGIN + t.numel()].view([t.shape[axis] for axis in order]).copy_(t.detach().permute(order))
    given.append((flat, flat.clone()))
    return copy.permute([order.index(axis) for axis in range(t.ndim)])


def assert_nothing_else_touched() -> None:
    for flat, count in made:
        assert (flat[:MARGIN] == FENCE).all() and (flat[MARGIN + count :] == FENCE).all(), "written out of bounds"
    for flat, original in given:
        assert torch.equal(flat.nan_to_num(), original.nan_to_num()), "an input was modified"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def expanded(like: Tensor) -> Tensor:
    """A gradient as that of a sum: strides of 0."""
    return guarded(normal(1, dtype=like.dtype)).expand(like.shape)


def heads_first(like: Tensor) -> Tensor:
    return guarded(normal(*like.shape, dtype=like.dtype))


def last_axis_strided(like: Tensor) -> Tensor:
    *rest, width, inner = like.shape
    return guarded(normal(*rest, inner, width, dtype=like.dtype)).transpose(-2, -1)


def tokens_first(like: Tensor) -> Tensor:
    """Of (B, H, N, K) as attention gives them; whatever has other axes, dense."""
    if like.ndim != 4:
        return heads_first(like)
    B, H, N, K = like.shape
    return guarded(normal(B, N, H, K, dtype=like.dtype).transpose(1, 2))


def compare(
    op: Callable[..., Any], *inputs: Tensor | None, gradient: Callable[[Tensor], Tensor] = tokens_first
) -> None:
    """Results and gradients on guarded tensors are plain torch's, as far as a self-check asks."""

    def evaluate(leaves: list[Tensor | None], cotangents: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        results = op(*leaves)
        results = [results] if isinstance(results, Tensor) else list(results)
        cotangents = cotangents or [gradient(r) for r in results]
        gradients = torch.autograd.grad(results, [t for t in leaves if t is not None], cotangents)
        return [*results, *gradients], cotangents

    found, cotangents = evaluate([None if t is None else guarded(t) for t in inputs], None)
    with dispatch.setting("reference"):
        plain, _ = evaluate(list(inputs), cotangents)
    for f, p in zip(found, plain, strict=True):
        assert f.dtype == p.dtype and f.shape == p.shape
        assert relative_error(f, p.double()) <= TOLERANCE[f.dtype]


def norm_case(*shape: int, dtype: torch.dtype, scale: bool = True, shift: bool = True, **options: Any) -> None:
    modulation = [normal(shape[0], shape[-1], seed=s) if on else None for s, on in ((2, scale), (3, shift))]
    compare(rms_norm, normal(*shape, dtype=dtype), normal(shape[-1], seed=1), *modulation, **options)


def gate_case(*shape: int, dtype: torch.dtype, **options: Any) -> None:
    compare(swiglu, normal(*shape, dtype=dtype), **options)


def rope_case(*shape: int, dtype: torch.dtype, norms: str = "", programs: int = 512, **options: Any) -> None:
    """q and k apart, and packed with v, whose first two are the same."""
    from vadit.kernels.triton_kernels import common

    B, H, N, K = shape
    cos, sin = guarded(normal(N, K, seed=1)), guarded(normal(N, K, seed=2))
    weights = [normal(K, seed=s) if name in norms else None for s, name in ((3, "q"), (4, "k"))]
    q, k = (normal(B, N, H, K, dtype=dtype, seed=s).transpose(1, 2) for s in (5, 6))
    before, common.PROGRAMS = common.PROGRAMS, programs
    compare(lambda q, k, *weights: rope(q, k, cos, sin, *weights), q, k, *weights, **options)
    qkv = normal(B, N, 3, H, K, dtype=dtype, seed=7)
    compare(lambda qkv, *weights: rope_qkv(qkv, cos, sin, *weights), qkv, *weights, **options)
    common.PROGRAMS = before


def gram_case(B: int, D: int, N: int, dtype: torch.dtype) -> None:
    features = normal(B, D, N, dtype=dtype)
    cosines, inverse_norm = torch.ops.vadit_triton.vf_gram(guarded(features))
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    assert relative_error(cosines, unit.transpose(1, 2) @ unit) < 1e-5
    assert relative_error(inverse_norm, 1 / features.double().norm(dim=1)) < 1e-5


def distmat_case(B: int, d: int, N: int) -> None:
    u = normal(B, d, N) / d**0.5
    cosines = normal(B, N, N)
    cosines = (cosines + cosines.transpose(1, 2)) / 4
    loss, sign = torch.ops.vadit_triton.vf_distmat(guarded(u), guarded(u), guarded(cosines), 0.25)
    gap = u.double().transpose(1, 2) @ u.double() - cosines
    assert relative_error(loss, torch.relu(gap.abs() - 0.25).mean()) < 1e-5
    assert torch.equal(sign, torch.where(gap.abs() > 0.25, gap.sign(), 0.0).to(torch.int8))


def named_cases() -> dict[str, Callable[[], None]]:
    cases: dict[str, Callable[..., None]] = {}
    for shape in [(2, 3, 1152), (1, 21, 760), (2, 40, 72), (5, 64), (2, 3, 4, 24)]:
        cases[f"rms_norm-{shape}"] = partial(norm_case, *shape)
    for scale, shift in [(False, False), (True, False), (False, True)]:
        cases[f"rms_norm-scale {scale}, shift {shift}"] = partial(norm_case, 3, 7, 9, scale=scale, shift=shift)
    cases["rms_norm-wide"] = partial(norm_case, 2, 3, 5000, scale=False, shift=False)
    cases["rms_norm-expanded"] = partial(norm_case, 2, 5, 40, gradient=expanded)
    for shape in [(3, 2256), (2, 3, 6144), (2, 5460), (70, 18), (8,)]:
        cases[f"swiglu-{shape}"] = partial(gate_case, *shape)
    cases["swiglu-expanded"] = partial(gate_case, 3, 80, gradient=expanded)
    for shape in [(2, 3, 7, 64), (1, 16, 5, 72), (3, 5, 3, 2), (1, 1, 1, 6)]:
        for norms in ["", "qk"]:
            cases[f"rope-{shape}-{norms}"] = partial(rope_case, *shape, norms=norms)
    cases["rope-several tiles per program"] = partial(rope_case, 2, 3, 40, 64, norms="qk", programs=2)
    for gradient in [expanded, heads_first, last_axis_strided]:
        cases[f"rope-{gradient.__name__}"] = partial(rope_case, 2, 3, 5, 8, norms="k", gradient=gradient)
    for sizes in [(2, 11, 7), (1, 5, 255), (2, 130, 70), (1, 64, 64)]:
        cases[f"vf_gram-{sizes}"] = partial(gram_case, *sizes)
    both = {f"{name}-{word}": partial(case, dtype=of) for name, case in cases.items() for word, of in DTYPES.items()}
    distmat = [(2, 5, 7), (2, 32, 70), (1, 40, 255), (1, 11, 64)]
    return both | {f"vf_distmat-{sizes}": partial(distmat_case, *sizes) for sizes in distmat}


def main(path: str) -> None:
    """Run all cases and write {name: [seconds, traceback or None]}."""
    torch.set_num_threads(1)
    torch.empty_like = lambda t: guarded_empty(t.shape, t.dtype)
    torch.Tensor.new_empty = lambda t, *shape, **options: (  # the interpreter's own calls have options
        torch_new_empty(t, *shape, **options) if options else guarded_empty(shape, t.dtype)
    )
    torch.empty = lambda shape, dtype, device=None: guarded_empty((shape,) if isinstance(shape, int) else shape, dtype)
    outcomes = {}
    for name, case in named_cases().items():
        made.clear()
        given.clear()
        start, error = time.perf_counter(), None
        try:
            with dispatch.setting("triton"):
                case()
            assert_nothing_else_touched()
            assert made, "no kernel ran"
        except Exception:
            error = traceback.format_exc()
        outcomes[name] = [time.perf_counter() - start, error]
    Path(path).write_text(json.dumps(outcomes))


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What the interpreting process found."""
    import own_process

    return own_process.outcomes(__file__, tmp_path_factory, {"TRITON_INTERPRET": "1"})


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("name", named_cases())
def test_in_the_interpreter(name: str, outcomes: dict[str, list]) -> None:
    _, error = outcomes[name]
    assert error is None, error


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


@needs_triton
def test_a_kernel_that_has_run_is_started_without_triton_looking_at_its_arguments() -> None:
    from vadit.kernels.triton_kernels import common

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


if __name__ == "__main__":
    main(sys.argv[1])

"""How an op is held to its formula, for tests and benchmarks: derived tolerances instead of chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import dispatch

FLOOR = 4 * torch.finfo(torch.float32).eps
"""Where plain torch happens to be exact (a scalar can be), a few float32 roundings are still no fault."""
Op = Callable[..., Tensor | tuple[Tensor, ...]]


def device() -> str:
    """Where the tensors of the backend that VADIT_KERNELS (or `dispatch.setting`) names have to be."""
    backend = dispatch.BACKENDS.get(dispatch._setting)
    return "cpu" if backend is None else backend.device


def results_and_gradients(op: Op, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The op's results, then the gradient of every given input, for fixed random cotangents."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    results = op(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r) for r in results]
    gradients = torch.autograd.grad(results, [t for t in leaves if t is not None], cotangents, allow_unused=False)
    return [r.detach() for r in results] + list(gradients)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest exact magnitude (1 where all are 0)."""
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / (exact.abs().max() if exact.any() else 1.0)).item()


def assert_as_exact_as_torch(op: Op, formula: Op, inputs: Sequence[Tensor | None]) -> None:
    """error(op) <= 2 * error(formula in plain torch, same dtypes) + rounding of the result + FLOOR, against float64.

    Results and all gradients are compared; shapes and dtypes must agree, and the inputs must come out unmodified.
    """
    before = [None if t is None else t.clone() for t in inputs]
    found = results_and_gradients(op, inputs)
    for t, copy in zip(inputs, before, strict=True):
        assert t is None or copy is None or torch.equal(t, copy), "an input was modified"
    plain = results_and_gradients(formula, inputs)
    exact = results_and_gradients(formula, [None if t is None else t.double() for t in inputs])
    for position, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        assert f.shape == e.shape and f.dtype == p.dtype, f"result {position}: {f.shape} {f.dtype}"
        error, allowed = relative_error(f, e), 2 * relative_error(p, e) + torch.finfo(f.dtype).eps / 2 + FLOOR
        assert error <= allowed, f"result {position}: error {error:.3g}, allowed {allowed:.3g}"


def assert_compiles(op: Op, inputs: Sequence[Tensor | None]) -> None:
    """The op is one graph to torch.compile, and the same compiled as eager, gradients too."""
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for found, eager in zip(results_and_gradients(compiled, inputs), results_and_gradients(op, inputs), strict=True):
        torch.testing.assert_close(found, eager)

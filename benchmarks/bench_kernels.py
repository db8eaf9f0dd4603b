"""Time of the ops, one backend against the other, on the CPU in float32: python benchmarks/bench_kernels.py [threads]

The backends alternate round by round and medians are compared, so that other work on the machine meets both alike.
Shapes are those of LightningDiT-B (batch 8) and of the generator that `vadit demo` trains.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vadit import kernels
from vadit.kernels import dispatch

ROUNDS = 15
WARM_UP = 3
BACKENDS = ("reference", "cpp")


class Shape(NamedTuple):
    batch: int
    tokens: int
    dim: int
    hidden: int
    heads: int


SHAPES = {"LightningDiT-B": Shape(8, 256, 768, 2048, 12), "demo": Shape(64, 16, 128, 341, 4)}


def cases(s: Shape) -> dict[str, tuple[Callable[[], tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """Per op: a call without arguments, and the tensors that it is differentiated by."""
    width = s.dim // s.heads
    x = torch.randn(s.batch, s.tokens, s.dim, requires_grad=True)
    weight = torch.randn(s.dim, requires_grad=True)
    scale, shift = (torch.randn(s.batch, s.dim, requires_grad=True) for _ in range(2))
    x12 = torch.randn(s.batch, s.tokens, 2 * s.hidden, requires_grad=True)
    qkv = torch.randn(s.batch, s.tokens, 3, s.heads, width, requires_grad=True)
    cos, sin = torch.randn(s.tokens, width), torch.randn(s.tokens, width)

    def rope() -> tuple[Tensor, ...]:
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return kernels.rope(q, k, cos, sin)

    return {
        "rms_norm": (lambda: (kernels.rms_norm(x, weight, scale, shift),), (x, weight, scale, shift)),
        "swiglu": (lambda: (kernels.swiglu(x12),), (x12,)),
        "rope": (rope, (qkv,)),
    }


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def compare(call: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...], repeats: int) -> Iterator[str]:
    """One line for the forward pass alone, and one for both passes."""
    cotangents = [torch.randn_like(result) for result in call()]

    def forward() -> None:
        with torch.no_grad():
            call()

    def both() -> None:
        torch.autograd.grad(call(), inputs, cotangents)

    for name, part in (("forward", forward), ("forward + backward", both)):
        times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for _ in range(ROUNDS):
            for backend in BACKENDS:
                with dispatch.setting(backend):
                    times[backend].append(milliseconds(part, repeats))
        plain, cpp = (statistics.median(times[backend][WARM_UP:]) for backend in BACKENDS)
        yield f"{name:18} torch {plain:8.3f} ms  cpp {cpp:8.3f} ms  {plain / cpp:5.2f}x"


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, shape in SHAPES.items():
        for op, (call, inputs) in cases(shape).items():
            for line in compare(call, inputs, repeats=1 if name == "LightningDiT-B" else 20):
                print(f"{name:14} {op:8} {line}")


if __name__ == "__main__":
    main()

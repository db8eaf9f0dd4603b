"""What the kernels share: their launch, and the rules that every one of them follows.

- Arithmetic is in float32, converted right behind each load: Triton's interpreter gets bfloat16 arithmetic silently
  wrong. Offsets that grow with the number of rows are 64 bits wide.
- Nothing is tuned at run time. Each module chooses tiles from shapes and dtype in one function, so that
  tests/test_triton_aot.py compiles exactly what is launched.
- Widths are compile-time constants: masks that they decide vanish, and rows keep the alignment that their width gives
  them (of a number known at run time only, Triton sees no more than whether 16 divides it).
- No atomics: sums over rows are partial sums, added in a fixed order, so that results repeat bit for bit.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
WARP = 32
VECTOR_BYTES = 16
"""The widest load that one thread has on every GPU."""
PROGRAMS = 512
"""Programs, some for every multiprocessor of a large GPU, below which none does several tiles to save partial sums."""


def launch(kernel: Any, programs: int, *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any) -> None:
    """Run `programs` instances of a kernel on the device of its first argument."""
    first: Tensor = arguments[0]
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        # Fused multiply-add is asked for by name: its default differs between versions of Triton.
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        kernel[(programs,)](*arguments, **constants, **options)

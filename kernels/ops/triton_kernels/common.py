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

from collections.abc import Callable
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

Decision = tuple[int, tuple[int | float, ...], dict[str, int]]
"""Programs, the numbers that follow the tensors among a kernel's arguments, constants and options."""
_ready: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[int | float, ...]]] = {}
"""What starts a kernel that has run before, and its arguments behind the tensors."""


def launch(kernel: Any, decide: Callable[..., Decision], sizes: tuple[Any, ...], *tensors: Tensor | None) -> None:
    """Run a kernel on the device of its first argument, in the way that `decide(*sizes)` says.

    That is asked once for each device, sizes, and dtypes of the tensors: from then on the compiled kernel is started
    without Triton's look at every argument, which takes longer on the host than all the rest of an op. Triton compiles
    anew where an address is no multiple of 16: such calls, which models do not make, go through it each time.
    """
    assert tensors[0] is not None, "the first tensor is a result"
    device = tensors[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, decide, sizes, *tensors)
        return
    dtypes: list[torch.dtype | None] = []
    addresses = 0
    for tensor in tensors:
        if tensor is None:
            dtypes.append(None)
        else:
            dtypes.append(tensor.dtype)
            addresses |= tensor.data_ptr()
    key, aligned = (id(kernel), device, sizes, *dtypes), addresses % VECTOR_BYTES == 0
    if aligned and key in _ready:
        start, rest = _ready[key]
        start(*tensors, *rest)
        return
    programs, numbers, options = decide(*sizes)
    # Fused multiply-add is asked for by name: its default differs between versions of Triton.
    compiled = kernel[(programs,)](*tensors, *numbers, enable_fp_fusion=True, **options)
    if aligned and compiled is not None:  # the interpreter compiles nothing
        constants = kernel.arg_names[len(tensors) + len(numbers) :]
        _ready[key] = compiled[(programs, 1, 1)], (*numbers, *(options[name] for name in constants))

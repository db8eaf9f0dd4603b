"""Every tensor that a Triton kernel gets, between margins of NaN: reading or writing beyond it shows.

And what Triton's interpreter does otherwise than a GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARGIN = 4096
INTEGERS = {1: (torch.int8, 0, 100), 2: (torch.int16, 0x7FC0, 63), 4: (torch.int32, 0x7FC00000, 1 << 20),
            8: (torch.int64, 0x7FF8 << 48, 1 << 20)}  # fmt: skip
"""By the size of an element: integers of that size, a NaN as one, and how many others follow it."""

ROUNDED = {"bf16": (torch.bfloat16, np.uint16), "fp8e4nv": (torch.float8_e4m3fn, np.uint8)}
"""By Triton's names of types."""


class Fenced:
    """A copy of a tensor with its strides and its place between two addresses that 16 divides."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = MARGIN + tensor.data_ptr() % 16 // tensor.element_size()
        # NaN of a payload that tells its place, since what is written beyond comes of what was read there
        kind, quiet_nan, payloads = INTEGERS[tensor.element_size()]
        places = torch.arange(start + span + MARGIN, device=tensor.device)
        self.whole = (quiet_nan + places % payloads).to(kind).view(tensor.dtype)
        self.copy = self.whole.as_strided(tensor.shape, tensor.stride(), start)
        # an expanded tensor has each element once
        once = tuple(slice(None if stride else 1) for stride in tensor.stride())
        self.inner, self.given = self.copy[once], tensor[once]
        self.inner.copy_(self.given)
        self.before = self.whole.clone()

    def take_back(self) -> None:
        """Put what was written where it belongs; fails where something was written beyond."""
        if not torch.equal(bits(self.inner), bits(self.given)):
            self.given.copy_(self.inner)
        self.inner.copy_(self.before.as_strided(self.inner.shape, self.inner.stride(), self.inner.storage_offset()))
        assert torch.equal(bits(self.whole), bits(self.before)), "written out of bounds"


def bits(t: Tensor) -> Tensor:
    """As integers, of which each is equal to itself."""
    return t.view(INTEGERS[t.element_size()][0])


def fenced(launch: Any) -> Any:
    """triton_kernels.common.launch with fences."""

    def call(kernel: Any, decide: Any, sizes: tuple[Any, ...], *tensors: Tensor | None) -> None:
        copies = [Fenced(t) if t is not None and t.numel() else None for t in tensors]
        launch(kernel, decide, sizes, *(t if c is None else c.copy for t, c in zip(tensors, copies, strict=True)))
        for copy in filter(None, copies):
            copy.take_back()

    return call


def rounded(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """triton.runtime.interpreter._convert_float, which cuts off where a GPU rounds to the nearest."""

    def call(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if str(source) != "fp32" or str(target) not in ROUNDED:
            return convert(data, source, target, mode)
        dtype, kind = ROUNDED[str(target)]
        rounded = torch.from_numpy(np.array(data, np.float32)).to(dtype)
        return rounded.view(bits(rounded).dtype).numpy().view(kind)

    return call

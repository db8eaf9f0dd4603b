"""Which backend runs an op. VADIT_KERNELS is read once, when this module is imported:

    auto        the fastest backend that takes the tensors (the default)
    reference   plain torch
    cpp         csrc/cpu wherever it has a kernel, even where `auto` finds plain torch faster; error if it is not built

An op that a backend does not have, or tensors that it does not take, go to plain torch, which does everything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("rms_norm", "rope", "swiglu", "vf_loss")
CPP_OPS = ("rms_norm", "rope", "swiglu")
"""What csrc/cpu has kernels for: float32 on the CPU."""
AUTO_CPP_OPS = CPP_OPS
"""Of those, the ones that measured faster than plain torch (kernels/README.md)."""
SETTINGS = ("auto", "reference", "cpp")


def _load() -> str | None:
    """Load vadit/_C.abi3.so; None on success, else why not."""
    import vadit

    library = Path(vadit.__file__).with_name("_C.abi3.so")
    if not library.is_file():
        return f"{library.name} is not built (pip install with a C++ compiler builds it)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    return None


_setting = os.environ.get("VADIT_KERNELS", "auto")
_missing = _load()
CPP_LOADED = _missing is None


def check_setting() -> None:
    """Refuse a setting that does not exist or cannot be had; at use, so that importing never fails."""
    if _setting not in SETTINGS:
        raise ValueError(f"VADIT_KERNELS is {_setting!r}; set it to one of {', '.join(SETTINGS)}")
    if _setting == "cpp" and not CPP_LOADED:
        raise ValueError(f"VADIT_KERNELS is 'cpp', but {_missing}; build it or set VADIT_KERNELS=auto")


def takes_cpp(op: str, *tensors: Tensor | None) -> bool:
    """Whether the compiled kernel of `op` runs for these tensors."""
    check_setting()
    if not CPP_LOADED or _setting == "reference" or op not in (CPP_OPS if _setting == "cpp" else AUTO_CPP_OPS):
        return False
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def refuse_second_derivative(op: str) -> None:
    """Make differentiating the backward op `op` an error; torch would warn and return zeros."""

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"vadit::{op} has no derivative; set VADIT_KERNELS=reference for second derivatives")

    torch.library.register_autograd(f"vadit::{op}", backward)


def backends() -> dict[str, str]:
    """The backend that each op takes for float32 tensors on the CPU; everything else takes the reference."""
    return {op: "cpp" if takes_cpp(op) else "reference" for op in OPS}


def reasons() -> dict[str, str]:
    """Why `backends()` says what it says, one sentence per op."""

    def reason(op: str) -> str:
        if takes_cpp(op):
            return "compiled for float32 on the CPU; other dtypes and devices take plain torch"
        if _setting == "reference":
            return "VADIT_KERNELS=reference"
        if op not in CPP_OPS:
            return "no compiled kernel; the low-rank form in plain torch"
        return _missing or "plain torch measured faster (kernels/README.md); VADIT_KERNELS=cpp takes the compiled one"

    return {op: reason(op) for op in OPS}


@contextlib.contextmanager
def setting(value: str) -> Iterator[None]:
    """VADIT_KERNELS for the duration of a block: tests and benchmarks compare backends in one process."""
    global _setting
    before, _setting = _setting, value
    try:
        yield
    finally:
        _setting = before


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Plain torch in place of `auto` for the duration of a block: for callers that amplify rounding."""
    with setting("reference" if _setting == "auto" else _setting):
        yield

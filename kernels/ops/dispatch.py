"""Which backend runs an op. VADIT_KERNELS is read once, when this module is imported:

    auto        per op and device the fastest one in benchmarks/results/kernels-*.csv (the default); see AUTO
    reference   plain torch
    cpp         csrc/cpu: tensors on the CPU
    cuda        csrc/cuda: tensors on a CUDA device
    triton      kernels/ops/triton_kernels: tensors on a CUDA device, or on the CPU under TRITON_INTERPRET=1

VADIT_LIBRARY names another build of csrc than the installed one (a sanitizer's, say).
A backend that was asked for by name and cannot be had is an error. Tensors that it does not take (another device, a
dtype other than float32 and bfloat16) go to plain torch, which takes everything.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("gated_norm", "rms_norm", "rope", "swiglu", "vf_loss", "group_norm_silu", "adamw_ema")
SETTINGS = ("auto", "reference", "cpp", "triton", "cuda")
NEWEST_OP = "vadit::rope_qkv"
DTYPES = (torch.float32, torch.bfloat16)
AUTO = {
    "cpu": dict.fromkeys(OPS, "cpp"),
    # No GPU row is committed yet: the backend that needs no nvcc at install time, after its self-check (self_check.py).
    "cuda": dict.fromkeys(OPS, "triton"),
}
"""What `auto` takes where it is there; a test holds it to the committed rows. Other devices take plain torch."""
NOT_WRITTEN = {("adamw_ema", "cuda")}
"""(op, backend) without kernels."""
EVIDENCE = {"cpu": "the fastest in the committed benchmarks", "cuda": "auto's choice, not yet measured on a GPU"}


@dataclass(frozen=True)
class Backend:
    """Compiled ops: where they are registered, whose tensors they take, and why they cannot run (None: they can)."""

    namespace: str
    device: str
    missing: str | None


def _load_library() -> str | None:
    """Load the compiled ops; None on success, else why not."""
    import vadit

    library = Path(os.environ.get("VADIT_LIBRARY") or Path(vadit.__file__).with_name("_C.abi3.so"))
    if not library.is_file():
        return f"{library.name} is not built (pip install with a C++ compiler builds it)"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load: {error}"
    if not torch._C._dispatch_has_kernel(NEWEST_OP):
        return f"{library.name} is older than this source; install again (pip install --no-build-isolation -e .)"
    return None


def _find_backends() -> dict[str, Backend]:
    library = _load_library()
    cuda = library
    if cuda is None and not torch._C._dispatch_has_kernel_for_dispatch_key("vadit::swiglu", "CUDA"):
        cuda = "_C.abi3.so was built without CUDA kernels (no nvcc at install time)"
    # The interpreter of Triton runs the same kernels on the CPU, slowly: for tests.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    triton = None if find_spec("triton") else "triton is not installed (pip install triton)"
    return {
        "cpp": Backend("vadit", "cpu", library),
        "cuda": Backend("vadit", "cuda", cuda),
        "triton": Backend("vadit_triton", "cpu" if interpreted else "cuda", triton),
    }


BACKENDS = _find_backends()
_setting = os.environ.get("VADIT_KERNELS", "auto")
_exact = False
_distrusted: dict[tuple[str, str], str] = {}
"""(op, backend) that failed the self-check, and how."""
_table: dict[tuple[str, str], Any | None] = {}
"""(op, device type) to the ops it runs on, None for plain torch: decided at import, and again by what changes it."""


def namespaces() -> list[str]:
    """The namespaces whose ops exist here and need their shapes and gradients registered."""
    return sorted({backend.namespace for backend in BACKENDS.values() if backend.missing is None})


def _backend_of(op: str, device: str) -> tuple[str, str]:
    """The backend that `op` takes for float32 tensors on a device type, and the reason, one sentence."""
    if _setting not in SETTINGS and _setting not in BACKENDS:
        raise ValueError(f"VADIT_KERNELS is {_setting!r}; set it to one of {', '.join(SETTINGS)}")
    if _setting == "reference":
        return "reference", "VADIT_KERNELS=reference"
    name = _auto(op, device) if _setting == "auto" else _setting
    if name == "reference":
        return name, f"no kernels for {device} tensors"
    backend = BACKENDS[name]
    if backend.missing is not None:
        if _setting != "auto":
            raise ValueError(f"VADIT_KERNELS is {_setting!r}, but {backend.missing}; set VADIT_KERNELS=auto")
        return "reference", backend.missing
    if backend.device != device:
        return "reference", f"the {name} kernels take {backend.device} tensors only"
    if (op, name) in NOT_WRITTEN:
        return "reference", f"there are no {name} kernels of it"
    if (op, name) in _distrusted:
        return "reference", f"{name} failed its self-check: {_distrusted[op, name]}"
    return name, f"VADIT_KERNELS={name}" if _setting == name else EVIDENCE[device]


def _auto(op: str, device: str) -> str:
    """AUTO's choice; on a GPU, where it is missing or distrusted, the other kernels, if they are there."""
    first = AUTO.get(device, {}).get(op, "reference")
    if first == "reference" or device != "cuda":
        return first
    for name in (first, *BACKENDS):
        backend = BACKENDS[name]
        if backend.device == device and backend.missing is None and (op, name) not in NOT_WRITTEN | _distrusted.keys():
            return name
    return first


def kernels_for(op: str, *tensors: Tensor | None) -> Any | None:
    """The ops (`torch.ops.NAMESPACE`) that `op` runs on for these tensors; None: plain torch."""
    first = tensors[0]
    assert first is not None, "the first tensor of an op is never optional"
    key = op, first.device.type
    ops = _table[key] if key in _table else _find(*key)
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return None
    return ops


def _find(op: str, device: str) -> Any | None:
    name, _ = _backend_of(op, device)
    return None if name == "reference" else getattr(torch.ops, BACKENDS[name].namespace)


def _decide() -> None:
    """Fill the table; without what cannot be had, which the first call reports."""
    _table.clear()
    for device in AUTO:
        with contextlib.suppress(ValueError):
            _table.update({(op, device): _find(op, device) for op in OPS})


def backends(device: str = "cpu") -> dict[str, str]:
    """The backend that each op takes for float32 and bfloat16 tensors on a device type."""
    return {op: _backend_of(op, device)[0] for op in OPS}


def reasons(device: str = "cpu") -> dict[str, str]:
    """Why `backends()` says what it says, one sentence per op."""
    return {op: _backend_of(op, device)[1] for op in OPS}


def distrust(op: str, backend: str, why: str) -> None:
    """Take plain torch instead of this backend's `op` from now on."""
    _distrusted[op, backend] = why
    _decide()


# ------------------------------------------------------------------------------------------------ registration


def define_triton_ops(op: str, schemas: dict[str, str]) -> None:
    """Define `op`'s schemas in the namespace of Triton; its module is imported when an op first runs."""
    library = torch.library.Library("vadit_triton", "FRAGMENT")
    _libraries.append(library)

    def implementation(name: str) -> Callable[..., Any]:
        found: list[Callable[..., Any]] = []

        def run(*args: Any) -> Any:
            if not found:
                found.append(getattr(importlib.import_module(f"vadit.kernels.triton_kernels.{op}"), name))
            return found[0](*args)

        return run

    for name, schema in schemas.items():
        library.define(name + schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, implementation(name), key)


_libraries: list[torch.library.Library] = []
"""Registrations last as long as the object that made them."""


def run_backward(namespace: str, name: str, *inputs: Any) -> Any:
    """Run a backward op. Differentiating it is an error; torch would warn and return zeros."""
    if torch.is_grad_enabled():
        return _Once.apply(namespace, name, *inputs)
    return getattr(getattr(torch.ops, namespace), name)(*inputs)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, namespace: str, name: str, *inputs: Any) -> Any:
        ctx.op = f"{namespace}::{name}"
        return getattr(getattr(torch.ops, namespace), name)(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{ctx.op} has no derivative; set VADIT_KERNELS=reference for second derivatives")


# ------------------------------------------------------------------------------------------------ switching


@contextlib.contextmanager
def setting(value: str) -> Iterator[None]:
    """VADIT_KERNELS for the duration of a block: tests and benchmarks compare backends in one process."""
    global _setting
    before, _setting = _setting, value
    _decide()
    try:
        yield
    finally:
        _setting = before
        _decide()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """For the duration of a block, plain torch in place of `auto`, and any memory layout: sums in torch depend on it.

    For callers that amplify rounding and want the bits of the authors' code.
    """
    global _exact
    before, _exact = _exact, True
    try:
        with setting("reference" if _setting == "auto" else _setting):
            yield
    finally:
        _exact = before


def is_exact() -> bool:
    """Whether a block of `exact()` runs."""
    return _exact


_decide()

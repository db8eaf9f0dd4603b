"""Argument checks that every backend shares, so that a wrong call reads the same whichever one would have run."""

from __future__ import annotations

from torch import Tensor

from . import dispatch


def fail(op: str, found: str, needed: str) -> None:
    """Raise the one form of error that the ops have."""
    raise ValueError(f"{op}: found {found}; needed {needed}")


def shape(tensor: Tensor) -> tuple[int, ...]:
    """A shape that prints without `torch.Size`."""
    return tuple(tensor.shape)


def check_kind(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point and on the first one's device."""
    first_name, first = next(iter(tensors.items()))
    assert first is not None, "the first tensor of an op is never optional"
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            fail(op, f"{name} of dtype {tensor.dtype} and shape {shape(tensor)}", "a floating-point tensor")
        if tensor.device != first.device:
            fail(
                op,
                f"{name} {shape(tensor)} on {tensor.device}, {first_name} {shape(first)} on {first.device}",
                "all on one device",
            )


def check_shape(op: str, name: str, tensor: Tensor | None, needed: tuple[int, ...], because: str) -> None:
    """`tensor`, where given, has exactly the shape `needed`; `because` says what that shape was derived from."""
    if tensor is not None and shape(tensor) != needed:
        fail(op, f"{name} {shape(tensor)}", f"{name} {needed} for {because}")


def check_inner(op: str, **tensors: Tensor) -> None:
    """The last axis of each is contiguous in memory. A copy would hide a layout that costs a pass over memory."""
    if dispatch.is_exact():
        return
    for name, tensor in tensors.items():
        if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1 and tensor.numel():
            found = f"{name} {shape(tensor)} with strides {tuple(tensor.stride())}"
            fail(op, found, f"{name} with a contiguous last axis (stride 1): call .contiguous()")

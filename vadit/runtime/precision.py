"""How exact products are: fp32 and TF32 on a GPU, and bf16 networks for passes without gradients.

torch leaves cuDNN's convolutions in TF32 (10 of fp32's 23 bits of mantissa) unless told otherwise, and some containers
set matrix products so. Both are set here alone, and together.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal, TypeVar

import torch
from torch import nn

from vadit.runtime.errors import UsageError

Precision = Literal["fp32", "tf32", "bf16"]
TF32 = Literal["none", "convolutions", "all"]
Network = TypeVar("Network")


def allow_tf32(which: TF32) -> None:
    """What a GPU may compute in TF32, from now on, of what is fp32; elsewhere nothing changes."""
    # not by their newer fp32_precision: torch refuses to read the one where the other was set
    torch.set_float32_matmul_precision("high" if which == "all" else "highest")
    torch.backends.cudnn.allow_tf32 = which != "none"


@contextlib.contextmanager
def computing(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """fp32 products and convolutions of a block in fp32 or TF32, whatever training has set.

    bf16 is that of the networks (`as_computed`); what they leave in fp32 stays fp32.
    """
    if not _has_tf32(device):
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32("all" if precision == "tf32" else "none")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def as_computed(network: Network, precision: Precision) -> Network:
    """A network for passes in `precision`: a copy with bf16 weights, or itself where its fp32 weights serve."""
    if precision != "bf16" or not isinstance(network, nn.Module):
        return network
    return copy.deepcopy(network).bfloat16()


def resolved(choice: Literal["auto"] | Precision, device: torch.device, *, generator: bool = False) -> Precision:
    """What runs for a setting of `precision`: auto is TF32 for a generator on a GPU, as in the authors' script.

    For all else it is fp32.
    """
    if choice == "tf32" and not _has_tf32(device):
        raise UsageError("tf32 is for GPUs; set --precision (vadit train: --evaluation.precision) fp32, bf16 or auto")
    if choice != "auto":
        return choice
    return "tf32" if generator and _has_tf32(device) else "fp32"


def _has_tf32(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"  # a CPU rounds otherwise where torch is told "high"

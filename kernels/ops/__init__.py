"""The ops of vadit: the only names that models and objectives import from here. See kernels/README.md."""

from __future__ import annotations

import importlib

from . import dispatch
from .adamw_ema import adamw_ema
from .dispatch import backends, exact, is_exact, reasons
from .gated_norm import gated_norm
from .group_norm_silu import group_norm_silu
from .rms_norm import rms_norm
from .rope import rope, rope_qkv
from .swiglu import swiglu
from .vf_loss import features_gram, vf_loss

__all__ = [
    "adamw_ema",
    "backends",
    "exact",
    "features_gram",
    "gated_norm",
    "group_norm_silu",
    "is_exact",
    "reasons",
    "register",
    "rms_norm",
    "rope",
    "rope_qkv",
    "swiglu",
    "vf_loss",
]


def register(namespace: str) -> None:
    """Register the shapes of every op's results in a namespace that has their implementations."""
    for op in dispatch.OPS:
        module = importlib.import_module(f".{op}", __name__)
        if namespace == "vadit_triton":
            dispatch.define_triton_ops(op, module.SCHEMAS)
        module.register(namespace)


for _namespace in dispatch.namespaces():
    register(_namespace)

"""The ops of vadit: the only names that models and objectives import from here. See kernels/README.md."""

from __future__ import annotations

from .dispatch import backends, exact, reasons
from .rms_norm import rms_norm
from .rope import rope
from .swiglu import swiglu
from .vf_loss import vf_loss

__all__ = ["backends", "exact", "reasons", "rms_norm", "rope", "swiglu", "vf_loss"]

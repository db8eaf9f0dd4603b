"""Which backend runs an op: VADIT_KERNELS=auto|reference, read once when the module is imported."""

from __future__ import annotations

import os

OPS = ("rms_norm", "rope", "swiglu", "vf_loss")
SETTINGS = ("auto", "reference")
_SETTING = os.environ.get("VADIT_KERNELS", "auto")


def backends() -> dict[str, str]:
    """The backend that each op takes."""
    if _SETTING not in SETTINGS:
        raise ValueError(f"VADIT_KERNELS is {_SETTING!r}; set it to one of {', '.join(SETTINGS)}")
    return dict.fromkeys(OPS, "reference")

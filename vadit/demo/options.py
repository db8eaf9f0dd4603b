"""What `vadit demo` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DemoOptions:
    """The whole system in small: train, encode, sample and evaluate on real pictures, on any machine."""

    out: str = "runs/demo"
    """Folder for everything that is made; the same command goes on from what is there."""
    data: Literal["digits", "photos"] = "digits"
    """digits: 1,797 scanned handwritten digits; photos: crops of photographs, blurred after so few steps."""
    quick: bool = False
    """A quarter of the training steps: everything runs, the pictures are worse."""

"""The recipes: named functions that return a whole frozen config, and a debug twin of each.

`NAME-debug` keeps every switch of NAME at a size that takes two steps on a CPU in seconds, on data that it makes.
Nothing here imports torch, so the command line can list recipes at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from vadit.config import Config
from vadit.errors import UsageError
from vadit.recipes.debug import debug_twin
from vadit.recipes.generators import (
    DIT_SIZES,
    dit_xl2_ddpm,
    lightningdit_b,
    lightningdit_xl_64ep,
    lightningdit_xl_800ep,
)
from vadit.recipes.tokenizers import vavae_f16d32_dinov2

__all__ = ["DIT_SIZES", "PAPER_RECIPES", "RECIPES", "get_recipe"]

PAPER_RECIPES: dict[str, Callable[[], Config]] = {
    "vavae-f16d32-dinov2": vavae_f16d32_dinov2,
    "lightningdit-xl-64ep": lightningdit_xl_64ep,
    "lightningdit-xl-800ep": lightningdit_xl_800ep,
    "lightningdit-b": lightningdit_b,
    "dit-xl2-ddpm": dit_xl2_ddpm,
}
"""What reproduces a row of the paper."""


def _twin(name: str) -> Callable[[], Config]:
    return lambda: debug_twin(name, PAPER_RECIPES[name]())


RECIPES: dict[str, Callable[[], Config]] = PAPER_RECIPES | {f"{name}-debug": _twin(name) for name in PAPER_RECIPES}
"""Every name that `vadit train` knows."""


def get_recipe(name: str) -> Config:
    """The config of recipe `name`; an unknown name is refused with the nearest ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"unknown recipe {name!r}; {hint}`vadit recipes` lists them")
    return RECIPES[name]()

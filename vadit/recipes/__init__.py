"""The recipes: named functions that return a whole frozen config, and a debug twin of each.

One module per group: `table1`, `tokenizers` (Tables 2, 4 and 5), `generators` (LightningDiT of Tables 2 to 5 and
beyond), `peers` (the others of Table 3), `small` (one's own pictures). `NAME-debug` keeps every switch of NAME at a
size that takes two steps on a CPU in seconds, on data that it makes. Nothing here imports torch, so the command line
can list recipes at once.
"""

import difflib
from collections.abc import Callable
from functools import partial

from vadit.config import Config, vary
from vadit.recipes import generators, peers, small, table1, tokenizers
from vadit.recipes.debug import debug_twin
from vadit.recipes.sizes import DIT_SIZES
from vadit.runtime.errors import UsageError

__all__ = ["DIT_SIZES", "PAPER_RECIPES", "RECIPES", "SHORT_NAMES", "SMALL_RECIPES", "get_recipe"]

Recipe = Callable[[], Config]


def _tables() -> dict[str, Recipe]:
    rows = tokenizers.TOKENIZERS
    found: dict[str, Recipe] = {
        "vavae-f16d32-dinov2": tokenizers.released_vavae,
        "lightningdit-xl-64ep": generators.lightningdit_xl_64ep,
        "lightningdit-xl-800ep": generators.lightningdit_xl_800ep,
        "lightningdit-xl-beyond": generators.lightningdit_xl_beyond,
    }
    found |= {
        f"table1-{number:02}-{row.name}": partial(table1.table1, number) for number, row in enumerate(table1.ROWS)
    }
    found |= {row.recipe: partial(tokenizers.tokenizer, row) for row in rows}
    for row in rows:
        for size in row.fid_10k:
            found[f"lightningdit-{size.lower()}-{row.name}"] = partial(generators.lightningdit, size, row)
    found |= {
        "dit-xl2": peers.dit_xl2,
        "sit-xl2": peers.sit_xl2,
        "fasterdit-xl2": peers.fasterdit_xl2,
        "repa-xl2": peers.repa_xl2,
        "maskdit-xl2": peers.maskdit_xl2,
        "maskdit-xl2-unmasked": peers.maskdit_xl2_unmasked,
        "mdt-xl2": peers.mdt_xl2,
    }
    return found


def _named(name: str, recipe: Recipe) -> Config:
    return vary(recipe(), run={"out": f"runs/{name}"})


def _twin(name: str) -> Config:
    return debug_twin(name, get_recipe(name))


PAPER_RECIPES: dict[str, Recipe] = {name: partial(_named, name, recipe) for name, recipe in _tables().items()}
"""What reproduces a row of the paper, and one that goes beyond it."""

SHORT_NAMES = {"lightningdit-b": "lightningdit-b-f16d32-dinov2", "dit-xl2-ddpm": "table1-00-dit"}
"""Second names of recipes."""

SMALL_RECIPES: dict[str, Recipe] = {
    "small-vavae": partial(_named, "small-vavae", small.small_vavae),
    "small-dit": partial(_named, "small-dit", small.small_dit),
}
"""What `vadit new` starts from."""

_NAMES = (
    PAPER_RECIPES
    | SMALL_RECIPES
    | {short: partial(_named, short, PAPER_RECIPES[name]) for short, name in SHORT_NAMES.items()}
)

RECIPES: dict[str, Recipe] = _NAMES | {f"{name}-debug": partial(_twin, name) for name in _NAMES}
"""Every name that `vadit train` knows."""


def get_recipe(name: str) -> Config:
    """The config of recipe `name`; an unknown name is refused with the nearest ones."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        folder = ", and there is no such folder" if "/" in name else ""
        raise UsageError(f"unknown recipe {name!r}{folder}; {hint}`vadit recipes` lists them")
    return RECIPES[name]()

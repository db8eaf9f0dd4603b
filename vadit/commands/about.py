"""vadit doctor and vadit recipes: what is here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import Positional, arg

from vadit.recipes import PAPER_RECIPES, SHORT_NAMES, SMALL_RECIPES
from vadit.recipes.sizes import model_name
from vadit.runtime.console import say, show
from vadit.runtime.errors import UsageError


@dataclass(frozen=True)
class DoctorOptions:
    """Say which accelerations this machine has, and how to get the others."""


@dataclass(frozen=True)
class RecipesOptions:
    """List the recipes and what they reproduce; with words, those that hold each of them (table1, xl, mae)."""

    words: Annotated[Positional[tuple[str, ...]], arg(metavar="[WORD ...]")] = ()
    """Words to look for in all columns, whatever their case."""


def doctor(options: DoctorOptions) -> None:
    from vadit.runtime.doctor import examine, report

    show(report(examine()))


def recipes(options: RecipesOptions) -> None:
    """Print the table of recipes, or of those that hold each of the given words."""
    table = recipe_table(options.words)
    if not table.row_count:
        raise UsageError(f"no recipe is about {' '.join(options.words)!r}; `vadit recipes` lists all")
    show(table)
    shorts = ", ".join(f"{short} is {name}" for short, name in SHORT_NAMES.items())
    say(
        "Each has a debug twin, NAME-debug: the same switches, two steps on a CPU, on data that it makes.",
        f"Short names: {shorts}. For your own pictures, and the base of `vadit new`: {', '.join(SMALL_RECIPES)}.",
    )


def recipe_table(words: Sequence[str] = ()) -> Any:
    """Name, what it reproduces, model, tokenizer, images and the paper's number of each recipe with all `words`."""
    from rich import box
    from rich.table import Table

    table = Table(title="recipes", title_justify="left", show_lines=True, box=box.ROUNDED)
    table.add_column("name", no_wrap=True)  # to be copied
    table.add_column("reproduces", overflow="fold")
    table.add_column("model, latents of", overflow="fold")
    table.add_column("images", justify="right")
    table.add_column("the paper's number", overflow="fold", min_width=36)  # most with their protocol's names
    for name, recipe in PAPER_RECIPES.items():
        config = recipe()
        paper = config.paper
        model = model_name(config) + f"\non {paper.tokenizer}" * bool(paper.tokenizer)
        row = (name, paper.source, model, f"{config.run.total_images:,}", paper.metric.replace(", fid", "\nfid"))
        if all(word.lower() in " ".join(row).lower() for word in words):
            table.add_row(*row)
    return table

"""vadit doctor and vadit recipes: what is here."""

from __future__ import annotations

from typing import Any

from vadit.commands.common import print_table
from vadit.config import Config, DiTConfig
from vadit.errors import UsageError
from vadit.recipes import PAPER_RECIPES


def doctor_command(arguments: list[str]) -> None:
    """Print what the doctor finds."""
    _no_settings("doctor", arguments, "Say which accelerations this machine has, and how to get the others.")
    from vadit.doctor import examine, report

    print_table(report(examine()))


def recipes_command(arguments: list[str]) -> None:
    """Print the table of recipes."""
    _no_settings("recipes", arguments, "List the recipes and what they reproduce.")
    print_table(recipe_table())
    print("Each has a debug twin, NAME-debug: the same switches, two steps on a CPU, on data that it makes.")


def recipe_table() -> Any:
    """Name, what it reproduces, model, images and the paper's number of each recipe."""
    from rich.table import Table

    table = Table(title="recipes", title_justify="left", show_lines=True)
    for column in ("name", "reproduces", "model", "images", "paper's number"):
        table.add_column(column, overflow="fold", justify="right" if column == "images" else "left")
    for name, recipe in PAPER_RECIPES.items():
        config = recipe()
        images = f"{config.run.total_images:,}"
        table.add_row(name, config.paper.source, _model_name(config), images, config.paper.metric)
    return table


def _model_name(config: Config) -> str:
    if isinstance(config, DiTConfig):
        model = config.model
        kind = "LightningDiT" if model.swiglu else "DiT"
        return f"{kind} {model.depth} x {model.hidden_size}, patch {model.patch_size}, {model.in_channels} channels"
    spec = config.autoencoder
    name = f"VA-VAE f{spec.downsample_ratio}d{spec.latent_channels}"
    return f"{name}, {config.foundation.name}, {max(len(config.stages), 1)} stage(s)"


def _no_settings(command: str, arguments: list[str], about: str) -> None:
    if arguments in (["-h"], ["--help"]):
        print(f"usage: vadit {command}\n\n{about}")
        raise SystemExit(0)
    if arguments:
        raise UsageError(f"unexpected argument {arguments[0]!r}; vadit {command} takes none")

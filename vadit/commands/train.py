"""vadit train: a recipe or a run folder, with settings changed, trained or only reckoned."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from vadit.commands.about import recipe_table
from vadit.commands.arguments import given_flags, parse, reported_once
from vadit.config import Config, DiTConfig, TokenizerConfig, settled, vary
from vadit.config.ranges import Checked, Count
from vadit.recipes import RECIPES, get_recipe
from vadit.runtime.console import note_once, say, show
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output


@dataclass(frozen=True, kw_only=True)
class DryRun(Checked):
    """What `vadit train` takes besides the recipe's settings."""

    fast: bool = False
    """On a GPU bf16 weights with fp32 masters, and engine.float8 fused for a generator, or bf16 where a card fails
    its check at start-up; what is set by name stays so. No change on a CPU, where bf16 is slower."""
    dry_run: bool = False
    """Print the resolved config, the parameters and the memory per GPU, and exit."""
    world_size: Count | None = None
    """Number of processes that --dry-run reckons with; default: as started."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizer(DryRun):
    """Train a tokenizer; the same command continues a run that was stopped."""

    config: Annotated[TokenizerConfig, arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TrainGenerator(DryRun):
    """Train a generator; the same command continues a run that was stopped."""

    config: Annotated[DiTConfig, arg(name="")]


def run(arguments: list[str]) -> None:
    """Train a recipe, or with --dry-run say what it would take."""
    options, asked = _options(arguments), _asked(*_recipe_name(arguments))
    if options is None:
        say("usage: vadit train RECIPE|FOLDER [--setting value ...] [--dry-run]", "")
        show(recipe_table())
        say("", "`vadit train RECIPE --help` explains every setting.")
    elif options.dry_run:
        _dry_run(options, asked)
    else:
        from vadit.project.stages import make_ready
        from vadit.train import dit, engine, tokenizer
        from vadit.train.loop import Stopped

        with reported_once():
            make_ready(options.config)
        try:
            if isinstance(options, TrainGenerator):
                dit.train(options.config, asked=asked)
            else:
                tokenizer.train(options.config)
        except Stopped:
            engine.finish()
            raise
        engine.finish()  # not after a failure: with others in a collective, leaving the group could wait for ever


@reported_once()
def _options(arguments: list[str]) -> TrainGenerator | TrainTokenizer | None:
    """The settings, known to be right as far as no data is needed for that; None asks for help."""
    name, rest = _recipe_name(arguments)
    if name is None:
        return None
    recipe = get_recipe(name) if name in RECIPES or not Path(name).is_dir() else _of_folder(name)
    about = f"{recipe.paper.source}: {recipe.paper.metric}. The same command continues a run that was stopped."
    kind: Any = TrainGenerator if isinstance(recipe, DiTConfig) else TrainTokenizer
    options = parse(kind, rest, command=f"train {name}", default=kind(config=recipe), description=about)
    if options.fast:
        quick = _faster(recipe, options.config)
        options = parse(kind, rest, command=f"train {name}", default=kind(config=quick), description=about)
        _say_changes(recipe, options.config)
    if isinstance(options, TrainTokenizer) and options.config.stages:
        options = replace(options, config=_whole_of_stages(options.config, recipe))
    if options.dry_run:
        return options
    if options.world_size is not None:
        raise UsageError(
            f"--world-size {options.world_size} belongs to --dry-run; a launcher starts processes (launch/README.md)"
        )
    from vadit.runtime import distributed

    check_output("--run.out", options.config.run.out)
    distributed.per_rank_batch(options.config.run.batch_size, options.config.engine.gradient_accumulation)
    return options


def _asked(name: str | None, arguments: list[str]) -> set[str] | None:
    """The settings of the model that flags name; None, for all, where help is asked for."""
    if name is None:
        return None
    settings = (flag.lstrip("-").replace("-", "_") for flag in given_flags(arguments))
    return {setting.removeprefix("model.") for setting in settings if setting.startswith("model.")}


def _of_folder(name: str) -> Config:
    from vadit.project.stages import run_config

    return run_config(name)


def _faster(recipe: Config, given: Config) -> Config:
    """`recipe` with the fastest arithmetic of the device that `given` runs on, less what `given` says otherwise."""
    from vadit.runtime import distributed

    device = distributed.device(given.run.device)
    if device.type != "cuda":
        return recipe
    engine = settled(given, processes=distributed.world_size(), device=device.type).engine
    # Whether the cards can is for all processes to find out together, at start-up (vadit.train.float8).
    eight = isinstance(given, DiTConfig) and engine.precision != "fp32" and engine.zero_stage != 3 and engine.compile
    return vary(recipe, engine={"precision": "bf16", "float8": "fused" if eight else None})


def _say_changes(recipe: Config, config: Config) -> None:
    """A line on what --fast changes."""
    names = ("precision", "float8")
    pairs = {name: (getattr(recipe.engine, name), getattr(config.engine, name)) for name in names}
    found = [f"engine.{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new]
    note_once(f"--fast: {', '.join(found) or 'no change, for this device has nothing faster'}")


def _recipe_name(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe and the other arguments; None asks for help. A recipe may stand behind settings."""
    known = [argument for argument in arguments if argument in RECIPES]
    name = known[0] if known else next(iter(arguments), None)
    if name in ("-h", "--help"):
        return None, []
    if name is None or name.startswith("-"):
        raise UsageError("vadit train needs the name of a recipe first; `vadit recipes` lists them")
    position = arguments.index(name)
    return name, arguments[:position] + arguments[position + 1 :]


def _whole_of_stages(config: TokenizerConfig, recipe: Config) -> TokenizerConfig:
    """`config` with the length of its stages; a change of what every stage has for itself is refused."""
    for name in vars(config.stages[0]):
        group = "run" if name == "total_images" else "loss"
        value, usual = (getattr(getattr(each, group), name) for each in (config, recipe))
        if value != usual and all(getattr(stage, name) is not None for stage in config.stages):
            flag = name.replace("_", "-")
            raise UsageError(f"--{group}.{flag} has no effect: each stage has its own; set --stages.0.{flag} and so on")
    return vary(config, run={"total_images": sum(stage.total_images for stage in config.stages)})


def _dry_run(options: TrainGenerator | TrainTokenizer, asked: set[str] | None) -> None:
    from vadit.estimate.memory import estimate
    from vadit.runtime import distributed
    from vadit.train.fit import follow_data

    world_size = distributed.world_size() if options.world_size is None else options.world_size
    with reported_once():
        if isinstance(options, TrainGenerator) and Path(options.config.data.path).is_dir():
            options = replace(options, config=follow_data(options.config, asked))
        needed = estimate(options.config, world_size)
        stage = settled(options.config, processes=world_size, device="cuda").engine.zero_stage
    if not distributed.is_main():
        return
    say(*json.dumps(asdict(options.config), indent=2).splitlines(), "")
    for network in needed.networks:
        frozen = f", {network.num_frozen:,} frozen" if network.num_frozen else ""
        say(f"{network.name}: {network.num_trained:,} trained parameters{frozen}")
    from rich.table import Table

    gib = 2**30
    accumulation = options.config.engine.gradient_accumulation
    table = Table(
        title=f"GiB per GPU: {world_size} process(es), {needed.micro_batch} images each in a forward pass"
        + (f", {accumulation} of them per step" if accumulation > 1 else ""),
        title_justify="left",
    )
    columns = ("weights", "optimizer", "averages", "gradients", "buffers", "activations", "total")
    for column in ("ZeRO", *columns, "fullest in"):
        table.add_column(column, justify="right")
    for row in needed.stages:
        chosen = row.stage == stage
        values = [f"{getattr(row, column) / gib:,.2f}" for column in columns]
        table.add_row(f"{row.stage}{' *' if chosen else ''}", *values, row.moment, style="bold" if chosen else None)
    show(table)
    say(
        f"* engine.zero_stage. Activations: {needed.activations.alone / needed.micro_batch / gib:.3f} GiB per image. "
        "Estimated, at the fullest moment of a step; CUDA's context, workspace and fragmentation come on top."
    )

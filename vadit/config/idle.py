"""Settings that were changed from the recipe's and have no effect, for nothing to be set in vain."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from vadit.config import Config, StageSpec, TokenizerConfig, vary
from vadit.runtime.errors import UsageError

IDLE = {
    "flow.objective ddpm": "flow.path flow.prediction flow.time_law flow.direction_loss",
    "flow.prediction velocity": "flow.loss_weighting",
    "flow.time_law uniform": "flow.uniform_after_images",
    "repa.weight 0": "repa. data.images",
    "repa.features cached": "data.images",
    "mask.kind none": "mask.",
    "sample.cfg_scale 1": "sample.cfg_",
    "sample.method dopri5": "sample.num_steps",
    "sample.method euler": "sample.atol sample.rtol sample.sde_",
    "loss.perceptual_weight 0": "loss.vgg_weights",
    "loss.disc_weight 0": "loss.disc_",
    "loss.vf_weight 0": "foundation. loss.vf_adaptive loss.cos_ loss.distmat_",
    "data.on_error raise": "data.max_bad_share",
    "optimizer.schedule one_cycle": "optimizer.warmup_images",
    "engine.zero_stage 0": "engine.overlap_comm",
    "guard.spike_factor 0": "guard.spike_window",
    "evaluation.every_images 0": "evaluation.",
}
"""A setting at a value, and what has no effect with it: names, or how they begin."""


def changed_in_vain(config: Config, recipe: Config) -> list[str]:
    """A sentence for each group of settings that differs from `recipe` and has no effect in `config`."""
    ours, found = _flat(config), []
    for cause, starts in IDLE.items():
        name, value = cause.split()
        if str(ours.get(name)).removesuffix(".0") == value:
            idle = [
                each for each in _changed(config, recipe) if each.startswith(tuple(starts.split())) and each != name
            ]
            found += [f"{', '.join(idle)} has no effect with {cause}"] * bool(idle)
    return found


def whole_of_stages(config: TokenizerConfig, recipe: Config) -> TokenizerConfig:
    """`config` with the length of its stages; a change of what every stage has for itself is refused."""
    for name in (field.name for field in fields(StageSpec)):
        group, flag = "run" if name == "total_images" else "loss", name.replace("_", "-")
        if f"{group}.{name}" in _changed(config, recipe) and all(getattr(s, name) is not None for s in config.stages):
            raise UsageError(f"--{group}.{flag} has no effect: each stage has its own; set --stages.0.{flag} and so on")
    return vary(config, run={"total_images": sum(stage.total_images for stage in config.stages)})


def _changed(config: Config, recipe: Config) -> list[str]:
    theirs = _flat(recipe)
    return [name for name, value in _flat(config).items() if value != theirs[name]]


def _flat(config: Config) -> dict[str, Any]:
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        f"{group}.{name}": value
        for group, spec in groups.items()
        if is_dataclass(spec)
        for name, value in vars(spec).items()
    }

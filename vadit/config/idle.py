"""Settings that were changed from the recipe's and have no effect, for nothing to be set in vain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vadit.config import Config, StageSpec, TokenizerConfig, vary
from vadit.runtime.errors import UsageError

Idle = tuple[str, Callable[[Any], bool], str]

GENERATOR: tuple[Idle, ...] = (
    ("flow.path flow.prediction flow.time_law", lambda c: c.flow.objective == "ddpm", "flow.objective ddpm"),
    ("flow.direction_loss", lambda c: c.flow.objective == "ddpm", "flow.objective ddpm"),
    ("flow.loss_weighting", lambda c: c.flow.prediction == "velocity", "flow.prediction velocity"),
    ("flow.uniform_after_images", lambda c: c.flow.time_law == "uniform", "flow.time_law uniform"),
    ("repa.", lambda c: c.repa.weight == 0, "repa.weight 0"),
    ("data.images", lambda c: c.repa.weight == 0 or c.repa.features == "cached", "repa.features cached"),
    ("mask.", lambda c: c.mask.kind == "none", "mask.kind none"),
    ("sample.cfg_", lambda c: c.sample.cfg_scale == 1, "sample.cfg_scale 1"),
    ("sample.num_steps", lambda c: c.sample.method == "dopri5", "sample.method dopri5"),
    ("sample.atol sample.rtol", lambda c: c.sample.method != "dopri5", "any sample.method but dopri5"),
    ("sample.sde_", lambda c: c.sample.method != "euler_maruyama", "any sample.method but euler_maruyama"),
)
TOKENIZER: tuple[Idle, ...] = (
    ("loss.vgg_weights", lambda c: c.loss.perceptual_weight == 0, "loss.perceptual_weight 0"),
    ("loss.disc_", lambda c: c.loss.disc_weight == 0, "loss.disc_weight 0"),
    ("data.max_bad_share", lambda c: c.data.on_error == "raise", "data.on_error raise"),
    (
        "foundation. loss.vf_adaptive loss.cos_ loss.distmat_",
        lambda c: c.loss.vf_weight == 0 and not any(stage.vf_weight for stage in c.stages),
        "loss.vf_weight 0",
    ),
)
BOTH: tuple[Idle, ...] = (
    ("optimizer.warmup_images", lambda c: c.optimizer.schedule == "one_cycle", "optimizer.schedule one_cycle"),
    ("engine.overlap_comm", lambda c: c.engine.zero_stage == 0, "engine.zero_stage 0"),
    ("guard.spike_window", lambda c: c.guard.spike_factor == 0, "guard.spike_factor 0"),
    ("evaluation.", lambda c: c.evaluation.every_images == 0, "evaluation.every_images 0"),
)
"""Settings, or how their names begin; when they are idle; and what makes them so."""


def changed_in_vain(config: Config, recipe: Config) -> list[str]:
    """A sentence for each group of settings that differs from `recipe` and has no effect in `config`."""
    found = []
    for names, is_idle, reason in (*(TOKENIZER if isinstance(config, TokenizerConfig) else GENERATOR), *BOTH):
        starts = tuple(names.split())
        idle = [name for name in _changed(config, recipe) if name.startswith(starts) and name != reason.split()[0]]
        if idle and is_idle(config):
            found.append(f"{', '.join(idle)} has no effect with {reason}")
    return found


def whole_of_stages(config: TokenizerConfig, recipe: Config) -> TokenizerConfig:
    """`config` with the length of its stages; a change of what every stage has for itself is refused."""
    for name in (field.name for field in dataclasses.fields(StageSpec)):
        group = "run" if name == "total_images" else "loss"
        if f"{group}.{name}" in _changed(config, recipe) and all(getattr(s, name) is not None for s in config.stages):
            flag = name.replace("_", "-")
            raise UsageError(f"--{group}.{flag} has no effect: each stage has its own; set --stages.0.{flag} and so on")
    return vary(config, run={"total_images": sum(stage.total_images for stage in config.stages)})


def _changed(config: Config, recipe: Config) -> list[str]:
    """The settings of all groups that differ, by their dotted names."""
    pairs = [(each.name, getattr(config, each.name), getattr(recipe, each.name)) for each in dataclasses.fields(config)]
    return [
        f"{group}.{each.name}"
        for group, ours, theirs in pairs
        if dataclasses.is_dataclass(ours)
        for each in dataclasses.fields(ours)
        if getattr(ours, each.name) != getattr(theirs, each.name)
    ]

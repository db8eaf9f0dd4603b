"""Recipes: the paper's numbers, and debug twins that keep every switch and train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from vadit import cli
from vadit.config import DiTConfig, TokenizerConfig
from vadit.config_files import from_dict, load_run_config, to_dict
from vadit.errors import UsageError
from vadit.recipes import DIT_SIZES, PAPER_RECIPES, RECIPES, get_recipe

SIZES = {
    "model": {"input_size", "hidden_size", "depth", "num_heads", "num_classes"},
    "autoencoder": {"image_size", "base_channels", "norm_groups", "num_res_blocks", "attention_resolutions"},
    "foundation": {"name", "weights", "model_args"},
    "loss": {"perceptual_weight", "disc_channels", "disc_start_step"},
    "flow": {"uniform_after_images"},
    "data": {"path", "num_workers"},
    "sample": {"num_steps"},
    "engine": {"precision"},
}
"""What a debug twin may change, by group; run, paper and the stages' lengths are looked at apart."""


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_a_whole_config_that_survives_the_disk(name: str) -> None:
    config = get_recipe(name)
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(type(config), values, origin=name) == config
    assert config.paper.source and config.paper.metric
    assert config.run.out == f"runs/{name}"


def test_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'lightningdit-xl-64'.*lightningdit-xl-64ep.*vadit recipes"):
        get_recipe("lightningdit-xl-64")


def test_vavae_is_the_three_stage_recipe_of_the_released_model() -> None:
    config = get_recipe("vavae-f16d32-dinov2")
    assert isinstance(config, TokenizerConfig)
    epoch = 1_281_167
    stages = [dataclasses.astuple(stage) for stage in config.stages]
    assert stages == [
        (100 * epoch, 0.5, 0.0, 0.0, 5001),
        (15 * epoch, 0.1, 0.0, 0.0, 1),
        (15 * epoch, 0.1, 0.5, 0.25, 1),
    ]
    assert config.run.total_images == 130 * epoch
    assert (config.run.batch_size, config.optimizer.lr, config.optimizer.betas) == (256, 1e-4, (0.5, 0.9))
    assert config.engine.precision == "fp32"
    assert config.foundation.input_range == "minus_one_one"
    assert (config.autoencoder.downsample_ratio, config.autoencoder.latent_channels) == (16, 32)


def test_headline_run_is_80000_steps_of_1024_without_clipping() -> None:
    config = get_recipe("lightningdit-xl-64ep")
    assert isinstance(config, DiTConfig)
    assert config.run.total_images == 80_000 * 1024 and config.run.batch_size == 1024
    assert config.engine.max_grad_norm == 0 and config.engine.precision == "autocast"
    assert config.engine.ema_decays == (0.9999,)
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (2e-4, (0.9, 0.95), 0.0)
    sample = config.sample
    assert (sample.method, sample.num_steps, sample.timestep_shift) == ("euler", 250, 0.3)
    assert (sample.cfg_scale, sample.cfg_interval, sample.cfg_channels) == (10.0, (0.11, 1.0), 3)


def test_long_run_changes_the_time_law_at_600k_steps() -> None:
    config = get_recipe("lightningdit-xl-800ep")
    assert isinstance(config, DiTConfig)
    assert config.run.total_images == 1_000_000 * 1024
    assert config.flow.uniform_after_images == 600_000 * 1024
    assert (config.sample.cfg_scale, config.sample.cfg_interval) == (6.7, (0.125, 1.0))


def test_baseline_is_the_plain_dit() -> None:
    config = get_recipe("dit-xl2-ddpm")
    assert isinstance(config, DiTConfig)
    model = config.model
    assert not any((model.swiglu, model.rope, model.rmsnorm, model.qk_norm, model.shift_free)) and model.learn_sigma
    assert (config.optimizer.lr, config.optimizer.betas, config.run.batch_size) == (1e-4, (0.9, 0.999), 256)
    assert (config.data.normalize, config.data.multiplier) == (False, 0.18215)
    assert not config.flow.direction_loss


def test_sizes_are_the_papers() -> None:
    table = {name: (size["depth"], size["hidden_size"], size["num_heads"]) for name, size in DIT_SIZES.items()}
    assert table == {
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
        "1p0B": (24, 1536, 24),
        "1p6B": (28, 1792, 28),
    }


# ------------------------------------------------------------------------------------------------ debug twins


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_debug_twin_keeps_every_switch(name: str) -> None:
    original, twin = to_dict(get_recipe(name)), to_dict(get_recipe(f"{name}-debug"))
    assert twin["run"]["total_images"] <= 6 * twin["run"]["batch_size"]
    assert twin["run"]["device"] == "cpu"
    for group, values in original.items():
        if group in ("run", "paper", "stages", "kind"):
            continue
        changed = {key for key, value in values.items() if twin[group][key] != value}
        assert changed <= SIZES.get(group, set()), group
    for stage, small in zip(original.get("stages", ()), twin.get("stages", ()), strict=True):
        assert {key for key in stage if stage[key] != small[key]} <= {"total_images", "disc_start_step"}


@pytest.mark.parametrize("name", PAPER_RECIPES)
def test_debug_twin_trains_and_logs(name: str, tmp_path: Path) -> None:
    assert cli.main(["train", f"{name}-debug", "--run.out", str(tmp_path)]) == 0
    config = load_run_config(tmp_path)
    stages = len(config.stages) if isinstance(config, TokenizerConfig) else 0
    logs = sorted(tmp_path.rglob("log.jsonl"))
    assert len(logs) == max(stages, 1)
    for log in logs:
        lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1]["step"] == 2 and lines[-1]["images"] == 2 * config.run.batch_size
        assert all(line["loss"] == line["loss"] for line in lines)
    assert list(tmp_path.rglob("checkpoints/*"))

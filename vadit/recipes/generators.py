"""Recipes of the generator: LightningDiT (arXiv 2501.01423) and the plain DiT that it is measured against."""

from __future__ import annotations

import dataclasses
from typing import Any

from vadit.config import (
    DiTConfig,
    DiTSpec,
    EngineSpec,
    FlowSpec,
    LatentDataSpec,
    OptimizerSpec,
    Paper,
    RunSpec,
    SampleSpec,
)

DIT_SIZES: dict[str, dict[str, Any]] = {
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "1p0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
    "1p6B": {"depth": 28, "hidden_size": 1792, "num_heads": 28},
}
"""Keyword arguments of DiTSpec for each size of the paper; patch_size 1 or 2 goes with any."""

BATCH_SIZE = 1024


def lightningdit_xl_64ep() -> DiTConfig:
    """The headline run: LightningDiT-XL/1 on VA-VAE f16d32 latents, 80,000 steps of 1024 images.

    The guidance scale is large because the authors guide three of the 32 channels, and only where t >= 0.11.
    Gradients are not clipped, as in the paper; on NaN, --engine.max-grad-norm 1 or --model.qk-norm is the cure.
    """
    return DiTConfig(
        model=DiTSpec(**DIT_SIZES["XL"], patch_size=1, in_channels=32, input_size=16),
        engine=EngineSpec(precision="autocast", max_grad_norm=0.0),
        run=RunSpec(out="runs/lightningdit-xl-64ep", batch_size=BATCH_SIZE, total_images=80_000 * BATCH_SIZE),
        sample=SampleSpec(
            method="euler", num_steps=250, timestep_shift=0.3, cfg_scale=10.0, cfg_interval=(0.11, 1.0), cfg_channels=3
        ),
        paper=Paper(source="Table 3, 64 epochs", metric="fid50k_euler249 5.14 (no guidance), 2.11 (guidance)"),
    )


def lightningdit_xl_800ep() -> DiTConfig:
    """The long run: 1,000,000 steps of 1024 images, uniform time after 600,000 of them, gentler guidance."""
    short = lightningdit_xl_64ep()
    return dataclasses.replace(
        short,
        flow=dataclasses.replace(short.flow, uniform_after_images=600_000 * BATCH_SIZE),
        run=dataclasses.replace(short.run, out="runs/lightningdit-xl-800ep", total_images=1_000_000 * BATCH_SIZE),
        sample=dataclasses.replace(short.sample, cfg_scale=6.7, cfg_interval=(0.125, 1.0)),
        paper=Paper(source="Table 3, 800 epochs", metric="fid50k_euler249 2.17 (no guidance), 1.35 (guidance)"),
    )


def lightningdit_b() -> DiTConfig:
    """LightningDiT-B/1 of the ablations: sampled with dopri5, without guidance, interval or shift."""
    large = lightningdit_xl_64ep()
    return dataclasses.replace(
        large,
        model=dataclasses.replace(large.model, **DIT_SIZES["B"]),
        run=dataclasses.replace(large.run, out="runs/lightningdit-b"),
        sample=SampleSpec(method="dopri5"),
        paper=Paper(source="Table 2, f16d32 + VF DINOv2, B", metric="fid10k_dopri5 15.82 (no guidance)"),
    )


def dit_xl2_ddpm() -> DiTConfig:
    """The baseline of Table 1's first row: plain DiT-XL/2 with DDPM on SD-VAE f8d4 latents, 400,000 steps of 256."""
    return DiTConfig(
        model=DiTSpec(
            **DIT_SIZES["XL"],
            patch_size=2,
            in_channels=4,
            input_size=32,
            learn_sigma=True,
            swiglu=False,
            rope=False,
            rmsnorm=False,
        ),
        flow=FlowSpec(objective="ddpm", time_law="uniform", direction_loss=False),
        optimizer=OptimizerSpec(lr=1e-4, betas=(0.9, 0.999)),
        engine=EngineSpec(precision="autocast", max_grad_norm=0.0),
        run=RunSpec(out="runs/dit-xl2-ddpm", batch_size=256, total_images=400_000 * 256),
        data=LatentDataSpec(normalize=False, multiplier=0.18215),
        sample=SampleSpec(method="ddpm", num_steps=250),
        paper=Paper(source="Table 1, first row", metric="fid50k_ddpm250 19.50 (no guidance)"),
    )

"""Recipes of LightningDiT (arXiv 2501.01423): the system of Table 3, and the generators of Tables 2, 4 and 5.

A metric's name holds the count of samples and the sampler as `vadit.sampling.draw.sampler_name` writes it. The authors
call the sampler of Table 3 "250 steps": linspace(0, 1, 250), which is 249 of them, and so euler249 here.
"""

from vadit.config import DiTConfig, DiTSpec, EngineSpec, Paper, RunSpec, SampleSpec, vary
from vadit.recipes.sizes import BATCH_SIZE, DIT_SIZES, EPOCHS_80
from vadit.recipes.tokenizers import Row

RELEASED = "vavae-f16d32-dinov2"  # tokenizer of Table 3


def lightningdit_xl_64ep() -> DiTConfig:
    """The headline run: LightningDiT-XL/1 on VA-VAE f16d32 latents, 80,000 steps of 1024 images.

    The guidance scale is large because the authors guide three of the 32 channels, and only where t >= 0.11.
    Gradients are not clipped, as in the paper; on NaN, --engine.max-grad-norm 1 or --model.qk-norm is the cure.
    """
    return DiTConfig(
        model=DiTSpec(**DIT_SIZES["XL"], patch_size=1, in_channels=32, input_size=16),
        engine=EngineSpec(precision="autocast", max_grad_norm=0.0, ema_warmup=False),
        run=RunSpec(batch_size=BATCH_SIZE, total_images=80_000 * BATCH_SIZE),
        sample=SampleSpec(
            method="euler", num_steps=250, timestep_shift=0.3, cfg_scale=10.0, cfg_interval=(0.11, 1.0), cfg_channels=3
        ),
        paper=Paper(
            source="Table 3, LightningDiT, 64 epochs",
            metric="fid50k_euler249_shift0.3_random 5.14, fid50k_euler249_shift0.3_cfg10_from0.11_ch3_random 2.11",
            tokenizer=RELEASED,
        ),
    )


def lightningdit_xl_800ep() -> DiTConfig:
    """The long run: 1,000,000 steps of 1024 images, uniform time after 600,000 of them, gentler guidance."""
    return vary(
        lightningdit_xl_64ep(),
        flow={"uniform_after_images": 600_000 * BATCH_SIZE},
        run={"total_images": 1_000_000 * BATCH_SIZE},
        sample={"cfg_scale": 6.7, "cfg_interval": (0.125, 1.0)},
        paper={
            "source": "Table 3, LightningDiT, 800 epochs",
            "metric": "fid50k_euler249_shift0.3_random 2.17, fid50k_euler249_shift0.3_cfg6.7_from0.125_ch3_random 1.35",
        },
    )


def lightningdit(size: str, row: Row) -> DiTConfig:
    """LightningDiT of a `size` on the latents of one of the tables' tokenizers: 160 epochs for B, 80 for L and XL.

    Sampled with dopri5, without guidance, interval or shift (section 5.2).
    """
    epochs = 160 if size == "B" else 80
    return vary(
        lightningdit_xl_64ep(),
        model={**DIT_SIZES[size], "in_channels": row.channels},
        run={"total_images": epochs // 80 * EPOCHS_80},
        sample=SampleSpec(method="dopri5"),
        paper=Paper(
            source=f"{row.tables if size == 'B' else 'Table 2'}, {row.label}, LightningDiT-{size}, {epochs} epochs",
            metric=f"fid10k_dopri5_random {row.fid_10k[size]:.2f}",
            tokenizer=row.recipe,
        ),
    )

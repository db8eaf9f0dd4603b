"""Recipes of LightningDiT (arXiv 2501.01423): the system of Table 3, the generators of Tables 2, 4 and 5, and beyond.

A metric's name holds the count of samples and the sampler as `vadit.sampling.draw.sampler_name` writes it. The authors
call the sampler of Table 3 "250 steps": linspace(0, 1, 250), which is 249 of them, and so euler249 here.
"""

from vadit.config import DiTConfig, DiTSpec, EngineSpec, FoundationSpec, Paper, RepaSpec, RunSpec, SampleSpec, vary
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


def lightningdit_xl_beyond() -> DiTConfig:
    """`lightningdit-xl-64ep` with what others report to help, each alone or in other company; its FID is not measured.

    - repa: DINOv2-B features align block 8 with weight 0.5 (REPA, Yu et al. 2024, on SiT and SD-VAE). Needs latents
      from `vadit encode --features vit_base_patch14_dinov2.lvd142m`; --repa.weight 0 leaves it out.
    - contrastive flow matching, weight 0.05 (Stoica et al. 2025, on SiT, also with REPA).
    - value residual (Zhou et al. 2024; in image models, with REPA, Bhanded 2025, "Speedrunning ImageNet Diffusion").
    - time shift sqrt(dim / 4096): 1.414 for 32 x 16 x 16 latents (Zheng et al. 2025, RAE, whose latents are larger).
    - QK-norm, and gradients clipped to 1: the authors' own cures of NaN; QK-norm slows convergence a little.
    - warm-up over 1,000 steps and linear decay to 0 (RAE decays to a tenth).
    - three EMA decays side by side, which warm up, to choose from at the end (Karras et al. 2024, EDM2).

    Left out: the dispersive loss (Wang & He 2025), which is for runs without REPA, and Muon, of which we know no
    measurement on such models (flow.dispersive_weight, optimizer.kind). Autoguidance is sampling's: `vadit sample
    --guide RUN` with a smaller or shorter trained run.
    """
    base = lightningdit_xl_64ep()
    latent_numbers = base.model.in_channels * base.model.input_size**2
    return vary(
        base,
        model={"qk_norm": True, "value_residual": True},
        flow={"contrastive_weight": 0.05, "time_shift": (latent_numbers / 4096) ** 0.5},
        repa=RepaSpec(weight=0.5, block=8, foundation=FoundationSpec(name="vit_base_patch14_dinov2.lvd142m")),
        optimizer={"schedule": "linear", "warmup_images": 1_000 * BATCH_SIZE},
        engine={"max_grad_norm": 1.0, "ema_decays": (0.9999, 0.9998, 0.9995), "ema_warmup": True},
        paper={
            "source": "no row: what others report to help",
            "metric": "none published; lightningdit-xl-64ep is what it is to beat",
        },
    )

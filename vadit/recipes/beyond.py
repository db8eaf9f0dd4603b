"""What others report to help on top of the paper, in one recipe."""

from vadit.config import DiTConfig, FoundationSpec, RepaSpec, vary
from vadit.recipes.generators import lightningdit_xl_64ep
from vadit.recipes.sizes import BATCH_SIZE


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

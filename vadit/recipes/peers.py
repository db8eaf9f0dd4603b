"""The latent diffusion systems that Table 3 compares with, as recipes of this trainer: all XL/2 on SD-VAE f8d4 latents.

MDTv2 is left out: its long skips, its optimizer (Adan) and its varying mask ratio are not here. The others of that
table (MaskGIT, LlamaGen, VAR, MagViT-v2, MAR) are no latent diffusion: `vadit evaluate samples` scores their sample
files. Published numbers are the paper's Table 3; where the settings or the sampler of a system are not all here, its
recipe says so. Guidance of DiT and SiT touches three of the four channels, as in their code.
"""

from vadit.config import DiTConfig, FoundationSpec, MaskSpec, RepaSpec, SampleSpec, vary
from vadit.recipes.table1 import plain_dit


def dit_xl2() -> DiTConfig:
    """DiT-XL/2 (Peebles & Xie 2023): Table 1's first row for 7,000,000 steps of 256 images, drawn with guidance."""
    return vary(
        plain_dit(),
        run={"total_images": 7_000_000 * 256},
        sample={"cfg_scale": 1.5, "cfg_channels": 3},
        paper={
            "source": "Table 3, DiT, 1400 epochs",
            "metric": "fid50k_ddpm250_random 9.62, fid50k_ddpm250_cfg1.5_ch3_random 2.27",
        },
    )


def sit_xl2() -> DiTConfig:
    """SiT-XL/2 (Ma et al. 2024): DiT as a flow with uniform time, drawn by the SDE in 250 steps."""
    return vary(
        dit_xl2(),
        model={"learn_sigma": False},
        flow={"objective": "flow"},
        sample={"method": "euler_maruyama"},
        paper={
            "source": "Table 3, SiT, 1400 epochs",
            "metric": "fid50k_euler_maruyama250_random 8.61, fid50k_euler_maruyama250_cfg1.5_ch3_random 2.06",
        },
    )


def fasterdit_xl2() -> DiTConfig:
    """FasterDiT-XL/2 (Yao et al. 2024): SiT with logit-normal time and the velocity direction loss, 2,000,000 steps.

    Its paper also scales the latents to choose the distribution of signal over noise. That factor is not known here:
    data.multiplier is SD-VAE's own, and the sampler is taken to be SiT's.
    """
    return vary(
        sit_xl2(),
        flow={"time_law": "logit_normal", "direction_loss": True},
        run={"total_images": 2_000_000 * 256},
        paper={
            "source": "Table 3, FasterDiT, 400 epochs",
            "metric": "fid50k 7.91 (no guidance), 2.03 (guidance); sampler not known",
        },
    )


def repa_xl2() -> DiTConfig:
    """REPA on SiT-XL/2 (Yu et al. 2024): block 8 aligned to DINOv2-B with weight 0.5, for 4,000,000 steps.

    Images are not mirrored and gradients are clipped to 1, as in its code. Its guidance, 1.8 on all channels, acts on
    the less noisy 70% of the way. Its code draws the latent anew at each use and resizes images for DINOv2 bicubically;
    here each latent is one draw and the resize is bilinear. Features: `vadit encode --features
    vit_base_patch14_dinov2.lvd142m`, or --repa.features online with --data.images.
    """
    return vary(
        sit_xl2(),
        repa=RepaSpec(weight=0.5, block=8, foundation=FoundationSpec(name="vit_base_patch14_dinov2.lvd142m")),
        engine={"max_grad_norm": 1.0},
        data={"flip": False},
        run={"total_images": 4_000_000 * 256},
        sample={"cfg_scale": 1.8, "cfg_interval": (0.3, 1.0), "cfg_channels": None},
        paper={
            "source": "Table 3, REPA, 800 epochs",
            "metric": "fid50k_euler_maruyama250_random 5.90, fid50k_euler_maruyama250_cfg1.8_from0.3_random 1.42",
            "tokenizer": "SD-VAE f8d4 (ft-mse)",
        },
    )


def maskdit_xl2() -> DiTConfig:
    """MaskDiT-XL/2 (Zheng et al. 2023), first stage: half of the tokens masked, 2,000,000 steps of 1024 images.

    The published system trains with EDM's preconditioning and noise levels; here it is a flow with uniform time.
    """
    return vary(
        sit_xl2(),
        mask=MaskSpec(kind="maskdit", ratio=0.5, decoder_depth=8, decoder_width=512, reconstruction_weight=0.1),
        run={"batch_size": 1024, "total_images": 2_000_000 * 1024},
        sample=SampleSpec(method="heun", num_steps=41, cfg_scale=1.5),
        paper={
            "source": "Table 3, MaskDiT, 1600 epochs",
            "metric": "fid50k 5.69 (no guidance), 2.28 (guidance); tuned without masks, drawn by EDM's sampler",
        },
    )


def maskdit_xl2_unmasked() -> DiTConfig:
    """MaskDiT's second stage: 50,000 steps of 512 images on all tokens from the first stage's weights, at 5e-5.

    Its code allows 100,000 steps and saves every 12,500; how many the published number took is not known here. It also
    knows a stage whose share of masked tokens falls as a cosine, which vadit does not.
    """
    return vary(
        maskdit_xl2(),
        mask={"unmasked_after_images": 0},
        optimizer={"lr": 5e-5},
        run={"init_from": "runs/maskdit-xl2", "batch_size": 512, "total_images": 50_000 * 512},
        paper={"source": "Table 3, MaskDiT, fine-tuning on all tokens"},
    )


def mdt_xl2() -> DiTConfig:
    """MDT-XL/2 (Gao et al. 2023): DiT with 30% of the tokens masked and a side-interpolater before the last two blocks.

    6,500,000 steps of 256 images at a rate of 3e-4. Its 1.79 is drawn with a guidance that rises during sampling
    (power-cosine, 3.8). In its code the two passes of a step share the time; here each draws its own.
    """
    return vary(
        dit_xl2(),
        mask=MaskSpec(kind="mdt", ratio=0.3, decoder_depth=2),
        optimizer={"lr": 3e-4},
        sample={"cfg_scale": 3.8, "cfg_power": 4.0},
        run={"total_images": 6_500_000 * 256},
        paper={
            "source": "Table 3, MDT, 1300 epochs",
            "metric": "fid50k_ddpm250_random 6.23, fid50k_ddpm250_cfg3.8_ch3_power4_random 1.79",
        },
    )

"""Recipes for one's own pictures on a laptop or one GPU: `vadit new` fits them to pictures, machine and time.

By themselves they are made for some hundred to some ten thousand pictures of 64 pixels. They reproduce nothing.
"""

from vadit.config import (
    AutoencoderSpec,
    DiTConfig,
    DiTSpec,
    EngineSpec,
    FoundationSpec,
    ImageDataSpec,
    OptimizerSpec,
    Paper,
    RunSpec,
    SampleSpec,
    TokenizerConfig,
    TokenizerLossSpec,
)

PAPER = Paper(source="no row: for your own pictures", metric="none: no two sets compare", tokenizer="small-vavae")


def small_vit(side: int, patch: int, num_classes: int = 0, weights: str = "own") -> FoundationSpec:
    """A ViT of 0.8M weights whose grid of features is that of latents of the factor `patch`."""
    sizes: dict[str, int | float | str | bool] = {
        "img_size": side, "patch_size": patch, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": num_classes,
    }  # fmt: skip
    return FoundationSpec(name="vit_tiny_patch16_224", weights=weights, model_args=sizes)


def small_vavae() -> TokenizerConfig:
    """An f8d16 VA-VAE of 0.7M weights without LPIPS, aligned to a ViT that is trained on the same pictures first.

    The VF loss is that of the paper's first of three stages. Many small steps: at 32 pixels 700 of 16 images reach
    32.9 dB where 320 of 32 reach 26.5. The discriminator comes in the last quarter.
    """
    batch, steps = 16, 2000
    return TokenizerConfig(
        autoencoder=AutoencoderSpec(
            image_size=64, latent_channels=16, base_channels=16, channel_multipliers=(1, 1, 2, 4), num_res_blocks=1,
            attention_resolutions=(), norm_groups=16,
        ),
        foundation=small_vit(64, 8),
        loss=TokenizerLossSpec(
            perceptual_weight=0.0, disc_channels=16, disc_layers=2, disc_start_step=steps * 3 // 4, disc_weight=0.1,
            vf_weight=0.5, cos_margin=0.0, distmat_margin=0.0,
        ),
        optimizer=OptimizerSpec(lr=2e-3, betas=(0.5, 0.9), schedule="one_cycle"),
        engine=EngineSpec(ema_decays=(), max_grad_norm=0.0),
        run=RunSpec(
            batch_size=batch, total_images=steps * batch, log_every_images=20 * batch, save_every_images=200 * batch,
            keep_checkpoints=1,
        ),
        data=ImageDataSpec(
            crop="random", flip=True, loader="torch", num_workers=2, on_error="skip", alpha="white", exif="apply",
        ),
        paper=PAPER,
    )  # fmt: skip


def small_dit() -> DiTConfig:
    """A LightningDiT of 1.3M weights for latents of `small-vavae`, with every switch of the paper's.

    Its average warms up, guidance acts on all channels, and labels start at a deviation of 1: with the 0.02 of long
    runs the classes are not learnt in so few steps.
    """
    batch, steps = 64, 3000
    return DiTConfig(
        model=DiTSpec(
            input_size=8, in_channels=16, hidden_size=128, depth=4, num_heads=4, num_classes=1, label_init_std=1.0,
        ),
        optimizer=OptimizerSpec(lr=2e-3, schedule="one_cycle"),
        engine=EngineSpec(ema_decays=(0.995,)),
        run=RunSpec(
            batch_size=batch, total_images=steps * batch, log_every_images=20 * batch, save_every_images=200 * batch,
            keep_checkpoints=1,
        ),
        sample=SampleSpec(num_steps=50, cfg_scale=2.0, labels="balanced"),
        paper=PAPER,
    )  # fmt: skip

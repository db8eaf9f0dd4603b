"""Recipes of the tokenizer, VA-VAE (arXiv 2501.01423)."""

from __future__ import annotations

from vadit.config import (
    AutoencoderSpec,
    FoundationSpec,
    ImageDataSpec,
    Paper,
    RunSpec,
    StageSpec,
    TokenizerConfig,
    TokenizerLossSpec,
)

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k: one epoch."""


def vavae_f16d32_dinov2() -> TokenizerConfig:
    """The released f16d32 tokenizer: 100 epochs of strong alignment, then 15 weaker, then 15 with margins.

    Everything else (autoencoder, losses, Adam at 1e-4, fp32, batch 256) is the default of its settings. The
    foundation model gets images in [-1, 1], as the authors fed it.
    """
    stages = (
        StageSpec(100 * IMAGENET_IMAGES, vf_weight=0.5, cos_margin=0.0, distmat_margin=0.0, disc_start_step=5001),
        StageSpec(15 * IMAGENET_IMAGES, vf_weight=0.1, cos_margin=0.0, distmat_margin=0.0, disc_start_step=1),
        StageSpec(15 * IMAGENET_IMAGES, vf_weight=0.1, cos_margin=0.5, distmat_margin=0.25, disc_start_step=1),
    )
    return TokenizerConfig(
        autoencoder=AutoencoderSpec(latent_channels=32),
        foundation=FoundationSpec(name="dinov2", input_range="minus_one_one"),
        loss=TokenizerLossSpec(vf_weight=0.5, cos_margin=0.0, distmat_margin=0.0),
        run=RunSpec(
            out="runs/vavae-f16d32-dinov2",
            batch_size=256,
            total_images=sum(stage.total_images for stage in stages),
            log_every_images=100 * 256,
            save_every_images=IMAGENET_IMAGES,
        ),
        # The authors' loader takes a random square of the short side and never mirrors.
        data=ImageDataSpec(crop="random", flip=False),
        stages=stages,
        paper=Paper(source="Tables 2-4, released VA-VAE", metric="rfid50k 0.28, PSNR 27.96, LPIPS 0.096, SSIM 0.79"),
    )

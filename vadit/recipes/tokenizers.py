"""Recipes of the tokenizers, VA-VAE and the VAE without alignment (arXiv 2501.01423, Tables 2, 4 and 5).

The released VA-VAE trains in three stages; the tables' tokenizers train for 50 epochs in one. All have the same
autoencoder but for the latent's channels, the same losses but for the alignment, Adam at 1e-4, fp32 and batch 256; the
foundation model gets images in [-1, 1], as the authors fed it. rFID, PSNR, LPIPS (VGG) and SSIM are of the 50,000
images of ImageNet's validation set.
"""

from dataclasses import dataclass, replace
from typing import Any

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
from vadit.recipes.sizes import IMAGENET_IMAGES

DATA = ImageDataSpec(crop="random", flip=False)  # The authors' loader takes a random square and never mirrors.
FOUNDATION_NAMES = {"none": "no VF loss", "mae": "MAE", "dinov2": "DINOv2", "sam": "SAM", "clip": "CLIP"}
"""As the tables write them."""


@dataclass(frozen=True)
class Row:
    """A tokenizer of Tables 2, 4 and 5, with the paper's numbers."""

    channels: int  # of the latent: 32 for f16d32
    foundation: str
    scores: tuple[float, float, float, float]  # rFID, PSNR, LPIPS, SSIM
    fid_10k: dict[str, float]  # FID-10K of LightningDiT of each size on its latents
    tables: str
    without: str = ""  # part of the VF loss that is left out (Table 5)

    @property
    def name(self) -> str:
        """Of its latents: f16d32-dinov2, f16d32 without alignment, f16d32-dinov2-no-mcos."""
        parts = (f"f16d{self.channels}", "" if self.foundation == "none" else self.foundation)
        return "-".join([part for part in parts if part] + [f"no-{self.without}"] * bool(self.without))

    @property
    def recipe(self) -> str:
        return f"{'vae' if self.foundation == 'none' else 'vavae'}-{self.name}-50ep"

    @property
    def label(self) -> str:
        """As the tables write it."""
        loss = FOUNDATION_NAMES[self.foundation] + f" without {self.without}" * bool(self.without)
        return f"f16d{self.channels}, {loss}"


TOKENIZERS = (
    Row(16, "none", (0.49, 26.10, 0.132, 0.72), {"B": 16.24, "L": 9.49, "XL": 8.28}, "Table 2"),
    Row(16, "mae", (0.51, 26.01, 0.137, 0.71), {"B": 16.86, "L": 10.93, "XL": 9.19}, "Table 2"),
    Row(16, "dinov2", (0.55, 25.29, 0.147, 0.69), {"B": 15.79, "L": 10.02, "XL": 8.71}, "Table 2"),
    Row(32, "none", (0.26, 28.59, 0.089, 0.80), {"B": 22.62, "L": 12.86, "XL": 10.92}, "Tables 2, 4 and 5"),
    Row(32, "mae", (0.28, 28.33, 0.091, 0.80), {"B": 19.89, "L": 11.51, "XL": 9.92}, "Tables 2 and 4"),
    Row(32, "dinov2", (0.28, 27.96, 0.096, 0.79), {"B": 15.82, "L": 9.82, "XL": 8.22}, "Tables 2, 4 and 5"),
    Row(64, "none", (0.17, 31.03, 0.055, 0.88), {"B": 36.83, "L": 20.73, "XL": 17.24}, "Table 2"),
    Row(64, "mae", (0.15, 31.03, 0.054, 0.87), {"B": 23.58, "L": 14.40, "XL": 11.69}, "Table 2"),
    Row(64, "dinov2", (0.14, 30.71, 0.055, 0.87), {"B": 24.00, "L": 14.95, "XL": 11.98}, "Table 2"),
    Row(32, "sam", (0.26, 28.31, 0.091, 0.80), {"B": 19.80}, "Table 4"),
    Row(32, "clip", (0.33, 28.39, 0.091, 0.80), {"B": 18.93}, "Table 4"),
    Row(32, "dinov2", (0.27, 28.52, 0.090, 0.80), {"B": 21.87}, "Table 5", without="mcos"),
    Row(32, "dinov2", (0.27, 28.24, 0.090, 0.80), {"B": 17.74}, "Table 5", without="mdistmat"),
    Row(32, "dinov2", (0.27, 28.07, 0.093, 0.79), {"B": 17.77}, "Table 5", without="margin"),
)
"""Every tokenizer of Tables 2, 4 and 5, once."""


ABLATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "mcos": {"cos_weight": 0.0, "vf_weight": 0.05},
    "mdistmat": {"distmat_weight": 0.0, "vf_weight": 0.05},
    "margin": {"cos_margin": 0.0, "distmat_margin": 0.0},
}
"""The losses of Table 5; w_hyper is halved where one of the two parts is left out, as section 6.3 says."""


def tokenizer(row: Row) -> TokenizerConfig:
    """50 epochs from scratch with w_hyper 0.1 and margins 0.5 and 0.25, or without alignment."""
    rfid, psnr, lpips, ssim = row.scores
    return TokenizerConfig(
        autoencoder=AutoencoderSpec(latent_channels=row.channels),
        foundation=FoundationSpec(name=row.foundation, input_range="minus_one_one"),
        loss=replace(TokenizerLossSpec(vf_weight=0.0 if row.foundation == "none" else 0.1), **ABLATIONS[row.without]),
        run=_run(50 * IMAGENET_IMAGES),
        data=DATA,
        paper=Paper(
            source=f"{row.tables}, {row.label}",
            metric=f"rfid50k {rfid:.2f}, PSNR {psnr:.2f}, LPIPS {lpips:.3f}, SSIM {ssim:.2f}",
        ),
    )


def released_vavae() -> TokenizerConfig:
    """The released f16d32 tokenizer: 100 epochs of strong alignment, then 15 weaker, then 15 with margins.

    These lengths are those of the authors' config; the paper speaks of 125 epochs.
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
        run=_run(sum(stage.total_images for stage in stages)),
        data=DATA,
        stages=stages,
        paper=Paper(source="Table 3, released VA-VAE", metric="rfid50k 0.28, PSNR 27.96, LPIPS 0.096, SSIM 0.79"),
    )


def _run(total_images: int) -> RunSpec:
    return RunSpec(
        batch_size=256, total_images=total_images, log_every_images=100 * 256, save_every_images=IMAGENET_IMAGES
    )

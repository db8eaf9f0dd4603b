"""How well a tokenizer gives images back: PSNR, SSIM, LPIPS and rFID, as the paper's Table 2 states them.

The latent is one posterior sample per image (as the authors evaluate); its noise is a function of the image's position
alone, so the numbers do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vadit import rng
from vadit.errors import UsageError
from vadit.eval.metrics import FeatureMoments, frechet_distance


class _Posterior(Protocol):
    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...


class Tokenizer(Protocol):
    """What is evaluated: `vadit.models.autoencoder.Autoencoder`, or anything with the same two methods."""

    def encode(self, x: Tensor, /) -> _Posterior: ...

    def decode(self, z: Tensor, /) -> Tensor: ...


SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels (sigma 1.5)."""


@dataclass(frozen=True)
class ReconstructionMetrics:
    """Means over images."""

    num_images: int
    psnr: float
    """dB, per image, on uint8 pixels (range 0..255) of all channels; infinite where an image came back exactly."""
    ssim: float
    """Gaussian window 11x11, sigma 1.5, on images clamped to [-1, 1] (range 2)."""
    lpips: float | None
    """On images clamped to [-1, 1]; the network is the caller's (the paper: VGG)."""
    rfid: float | None
    """Frechet distance to the very images given, in the caller's features (the paper: Inception's pool_3)."""


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] to uint8: 127.5 x + 128, clamped and truncated; the inverse of `to_unit_range` on every pixel value."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def reconstruct(
    autoencoder: Tokenizer,
    pixels: Tensor,
    first: int,
    *,
    posterior: Literal["sample", "mode"] = "sample",
    seed: int = 0,
) -> Tensor:
    """Reconstructions, about in [-1, 1], of images uint8 (B, 3, H, W) at positions first, first + 1, ... of a set."""
    encoded = autoencoder.encode(to_unit_range(pixels))
    latent = encoded.mean
    if posterior == "sample":
        ids = range(first, first + len(pixels))
        noise = rng.normal(rng.fold(seed, "reconstruction"), list(ids), latent.shape[1:])
        latent = latent + encoded.std * noise.to(latent)
    return autoencoder.decode(latent).float()


def psnr(pixels: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of B pairs of uint8 images (B, ...), shape (B,), float64."""
    errors = (pixels.double() - others.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(255.0**2 / errors)


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each of B pairs of images in [-1, 1] (B, C, H, W), shape (B,)."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise UsageError(
            f"SSIM's window has {SSIM_WINDOW} pixels, the images are {images.shape[-1]}x{images.shape[-2]}; "
            f"evaluate images of at least {SSIM_WINDOW} pixels"
        )
    values = structural_similarity_index_measure(
        images, others, kernel_size=SSIM_WINDOW, sigma=1.5, data_range=(-1.0, 1.0), reduction="none"
    )
    assert isinstance(values, Tensor)
    return values.reshape(len(images))


@torch.no_grad()
def evaluate_tokenizer(
    autoencoder: Tokenizer,
    batches: Iterable[Tensor],
    *,
    device: str | torch.device = "cpu",
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    posterior: Literal["sample", "mode"] = "sample",
    seed: int = 0,
) -> ReconstructionMetrics:
    """Encode and decode batches of uint8 images (B, 3, H, W) in a fixed order, and compare.

    `lpips(x, y)` takes images in [-1, 1] and gives B values; `features(uint8 images)` gives (B, D). The autoencoder and
    both functions are on `device` and in evaluation mode.
    """
    scores: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    real, fake = FeatureMoments(), FeatureMoments()
    num_images = 0
    for batch in batches:
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise UsageError(f"evaluation needs uint8 images (B, 3, H, W), found {batch.dtype} {tuple(batch.shape)}")
        pixels = batch.to(device)
        decoded = reconstruct(autoencoder, pixels, num_images, posterior=posterior, seed=seed)
        if decoded.shape != pixels.shape:
            raise UsageError(
                f"images of shape {tuple(pixels.shape)} came back as {tuple(decoded.shape)}; "
                "their side must be a multiple of the tokenizer's downsample ratio"
            )
        restored, clamped, original = to_pixels(decoded), decoded.clamp(-1, 1), to_unit_range(pixels)
        scores["psnr"].append(psnr(pixels, restored))
        scores["ssim"].append(ssim(clamped, original))
        if lpips is not None:
            scores["lpips"].append(lpips(clamped, original).reshape(len(pixels)))
        if features is not None:
            real.update(features(pixels))
            fake.update(features(restored))
        num_images += len(pixels)
    if num_images == 0:
        raise UsageError("there are no images to evaluate; name a folder that holds some")
    return ReconstructionMetrics(
        num_images=num_images,
        psnr=_mean(scores["psnr"]),
        ssim=_mean(scores["ssim"]),
        lpips=None if lpips is None else _mean(scores["lpips"]),
        rfid=None if features is None else frechet_distance(*real.result(), *fake.result()),
    )


def _mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())

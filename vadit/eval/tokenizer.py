"""How well a tokenizer gives images back: PSNR, SSIM, LPIPS and rFID, as the paper's Table 2 states them.

The latent is one posterior sample per image (as the authors evaluate); its noise is a function of the image's position
alone. Networks see groups of GROUP images, whole ones always, and scores are summed in the images' order, so that the
numbers depend on no batch size and no number of processes, to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from vadit.eval.metrics import count_name, frechet_distance, mean_and_covariance
from vadit.images.loader import ImageSet, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import to_signed, to_uint8
from vadit.models.autoencoder import Autoencoder
from vadit.runtime import distributed, rng
from vadit.runtime.console import counted
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.precision import Precision, as_computed, computing

GROUP = 32  # images that the networks see together
SSIM_WINDOW = 11  # side of SSIM's Gaussian window in pixels (sigma 1.5)


@torch.no_grad()
def reconstruct(
    autoencoder: Autoencoder,
    pixels: Tensor,
    first: int,
    *,
    posterior: Literal["sample", "mode"] = "sample",
    seed: int = 0,
) -> Tensor:
    """Reconstructions, about in [-1, 1], of images uint8 (B, 3, H, W) at positions first, first + 1, ... of a set."""
    encoded = autoencoder.encode(to_signed(pixels))
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


def evaluate_image_set(
    evaluate: Callable[..., tuple[int, dict[str, float]]],
    images: ImageSet,
    *,
    seeds: Iterable[int],
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> list[dict[str, float]]:
    """The numbers of all images, once for each seed of the posterior samples.

    `evaluate(batches, ids=, seed=)` is `evaluate_tokenizer` with the rest. Pillow decodes, whatever else is installed:
    the numbers are compared with those of others.
    """
    ids = share_of_images(len(images))
    found = []
    for seed in seeds:
        with pillow_decoder(images, num_workers, device)() as decoder:
            loaded = (batch.images.contiguous() for batch in load_in_order(images, ids, batch_size, decoder))
            batches = counted("reconstruct", len(ids), loaded)
            count, metrics = evaluate(batches, ids=ids, seed=seed)
        if count != len(images):
            raise RunError(f"{count} of {len(images)} images were read; a part of them gets no numbers")
        found.append(metrics)
    return found


def share_of_images(num_images: int) -> list[int]:
    """The images that this process evaluates: whole groups, which go to the processes in turn."""
    groups = range(distributed.rank(), -(-num_images // GROUP), distributed.world_size())
    return [index for group in groups for index in range(group * GROUP, min((group + 1) * GROUP, num_images))]


@torch.no_grad()
def evaluate_tokenizer(
    autoencoder: Autoencoder,
    batches: Iterable[Tensor],
    *,
    ids: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    posterior: Literal["sample", "mode"] = "sample",
    seed: int = 0,
    precision: Precision = "fp32",
) -> tuple[int, dict[str, float]]:
    """Encode and decode uint8 images (B, 3, H, W) in batches of any size, and compare: their count, and means.

    psnr: dB, per image, on uint8 pixels (range 0..255) of all channels; infinite where an image came back exactly.
    ssim: Gaussian window 11x11, sigma 1.5, on images clamped to [-1, 1] (range 2). With `lpips`, lpips: of images in
    [-1, 1] (the paper: VGG). With `features`, rfid50k: the Frechet distance of 50,000 images to the very images given,
    in these features (the paper: Inception's pool_3).
    `ids` names the images by their places in the whole set: a process's `share_of_images`, by default 0, 1, ...
    `lpips(x, y)` takes images in [-1, 1] and gives B values; `features(uint8 images)` gives (B, D). The autoencoder and
    both functions are on `device` and in evaluation mode; `precision` is the autoencoder's. Under a launcher every
    process gets the numbers of all.
    """
    places: list[int] = []
    rows: list[Tensor] = []
    pairs: list[Tensor] = []
    autoencoder = as_computed(autoencoder, precision)
    for number, group in enumerate(_groups(batches)):
        first = number * GROUP if ids is None else ids[number * GROUP]
        # The last bits of a convolution depend on how many images it gets: the last group is filled up.
        filled = torch.cat([group, group[-1:].expand(GROUP - len(group), -1, -1, -1)]).to(device)
        with computing(precision, device):
            decoded = reconstruct(autoencoder, filled, first, posterior=posterior, seed=seed)
        if decoded.shape != filled.shape:
            raise UsageError(
                f"images of shape {tuple(group.shape)} came back as {(len(group), *decoded.shape[1:])}; "
                "their side must be a multiple of the tokenizer's downsample ratio"
            )
        restored, clamped, original = to_uint8(decoded), decoded.clamp(-1, 1), to_signed(filled)
        scores = [psnr(filled, restored), ssim(clamped, original)]
        if lpips is not None:
            scores.append(lpips(decoded, original).reshape(GROUP))  # not clamped: the authors' numbers are so
        rows.append(torch.stack([score.double().cpu() for score in scores], dim=1)[: len(group)])
        if features is not None:
            pairs.append(torch.stack([features(filled).float(), features(restored).float()], dim=1)[: len(group)].cpu())
        places += range(first, first + len(group))
    scores_NS = _all_rows(places, rows)
    if not len(scores_NS):
        raise UsageError("there are no images to evaluate; name a folder that holds some")
    count = len(scores_NS)
    metrics = dict(zip(("psnr", "ssim", "lpips"), scores_NS.mean(dim=0).tolist(), strict=False))
    if features is not None:
        pairs_N2D = _all_rows(places, pairs)
        before, after = (mean_and_covariance(pairs_N2D[:, side]) for side in (0, 1))
        metrics[f"rfid{count_name(count)}"] = frechet_distance(*before, *after)
    return count, metrics


def _groups(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The images of batches of any size in groups of GROUP; the last one may be shorter."""
    waiting: Tensor | None = None
    for batch in batches:
        if batch.dtype != torch.uint8 or batch.ndim != 4:
            raise UsageError(f"evaluation needs uint8 images (B, 3, H, W), found {batch.dtype} {tuple(batch.shape)}")
        waiting = batch if waiting is None else torch.cat([waiting, batch])
        while len(waiting) >= GROUP:
            yield waiting[:GROUP]
            waiting = waiting[GROUP:]
    if waiting is not None and len(waiting):
        yield waiting


def _all_rows(places: list[int], rows: list[Tensor]) -> Tensor:
    """Rows (n, ...) of all processes in the order of their places in the set; every process must call."""
    found = distributed.all_gathered((places, torch.cat(rows) if rows else torch.zeros(0)))
    order = torch.tensor([place for places, _ in found for place in places], dtype=torch.int64).argsort()
    return torch.cat([rows for _, rows in found])[order]

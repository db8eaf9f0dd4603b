"""The images that latents were encoded from, decoded as the generator trains (REPA with online features)."""

import torch
from torch import Tensor

from vadit.config import ImageDataSpec, LatentDataSpec
from vadit.images.backends import open_images
from vadit.images.loader import ImageSet, Request
from vadit.images.pillow import ThreadedDecoder
from vadit.latents.dataset import DebugLatents, LatentDataset
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.reading import ReadFault

PIXELS_PER_TOKEN = 16
"""Side of an image over that of its grid of tokens, where no file has it: that of DiT/2 on f8, and of f16."""


class OnlineImages:
    """Images beside their latents, uint8, cropped as for encoding; a Companion of vadit.latents."""

    def __init__(self, images: ImageSet, image_ids: Tensor, device: str | torch.device) -> None:
        self.shape: tuple[int, ...] = (3, images.size, images.size)
        self._images = images
        self._image_ids = image_ids
        self._decoder = ThreadedDecoder(images, ImageDataSpec.num_workers, pinned=torch.device(device).type == "cuda")

    def batch(self, ids: Tensor, flips: Tensor, device: str | torch.device) -> Tensor:
        """Images (B, 3, H, W) of the latents `ids`, mirrored where `flips`; RunError names one that does not decode."""
        indices = self._image_ids[ids].tolist()
        requests = [Request(index, mirror=mirror) for index, mirror in zip(indices, flips.tolist(), strict=True)]
        decoded = self._decoder.submit(requests)()
        for place, error in decoded.failures.items():
            if isinstance(error, ReadFault):
                raise error
            name = self._images.source.describe(indices[place])
            raise RunError(
                f"{name}, the image of latent {int(ids[place])}, does not decode any more; put it back"
            ) from error
        return decoded.pixels.to(device, non_blocking=decoded.pixels.is_pinned()).permute(0, 3, 1, 2)


def open_online_images(
    spec: LatentDataSpec, latents: LatentDataset | DebugLatents, grid: int, device: str | torch.device = "cpu"
) -> OnlineImages:
    """The images of `data.images`; UsageError where number or classes show that the latents are of other images.

    grid: tokens of the generator along a side. device: where batches are wanted. Debug latents take any images, by
    default debug images.
    """
    made_up = spec.path.startswith("debug:")
    path = spec.images or (spec.path if made_up else "")
    if not path:
        raise UsageError(
            "repa.features is online but data.images is empty; set --data.images to the images that the latents were "
            "encoded from, or --repa.features cached"
        )
    spec_of_images = ImageDataSpec(path, alpha=latents.pictures.alpha, exif=latents.pictures.exif)
    images = open_images(spec_of_images, latents.image_size or PIXELS_PER_TOKEN * grid)
    ids, expected = latents.image_ids()
    if made_up:
        return OnlineImages(images, ids % len(images), device)
    remedy = "set data.images to the images that the latents were encoded from, in the same order"
    if len(images) != expected or int(ids.max()) >= len(images):
        raise UsageError(
            f"data.images {spec.images} holds {len(images)} images but the latents of {spec.path} are of {expected}; "
            f"{remedy}"
        )
    other = (images.source.labels[ids] != latents.labels).nonzero().flatten()
    if len(images.source.classes) > 1 and len(other):  # a flat folder has no classes to compare
        index = int(other[0])
        image = int(ids[index])
        raise UsageError(
            f"{images.source.describe(image)} is of class {int(images.source.labels[image])} but its latent {index} in "
            f"{spec.path} is of class {int(latents.labels[index])}; {remedy}"
        )
    return OnlineImages(images, ids, device)

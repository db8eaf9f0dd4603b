"""The pixel rules, once: how an image becomes RGB, how it is cropped, and how uint8 becomes [-1, 1].

EXIF rotation is left unapplied and transparency is dropped, as in ADM's and the authors' preprocessing: the
statistics that FID is measured against were made that way.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

RANDOM_CROP_SCALE = (0.8, 1.0)
"""Share of the image's area that a random crop keeps."""
RANDOM_CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop."""
MAX_ASPECT = 256
"""Longer images are refused: scaled to the crop's height they would take gigabytes."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB; 16-bit grey keeps its high byte (Pillow alone would clip it to white)."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "P":  # a palette with a transparent entry: through RGBA, or Pillow warns
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol 2021, image_datasets.py): size x size pixels.

    Halve with a box filter while the short side is at least twice the goal, bring the short side to it with a bicubic
    filter, cut out the middle (rounded towards the upper left).
    """
    image = _to_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, seed: int) -> Image.Image:
    """A random square of the short side, as the authors train their tokenizer; scaled like the centre crop."""
    image = _to_short_side(image, size)
    draw = random.Random(seed)
    left, top = draw.randint(0, image.width - size), draw.randint(0, image.height - size)
    return image.crop((left, top, left + size, top + size))


def _to_short_side(image: Image.Image, size: int) -> Image.Image:
    _check_aspect(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def random_resized_crop(image: Image.Image, size: int, seed: int) -> Image.Image:
    """A random part of the image, scaled to size x size (Szegedy et al. 2015, as torchvision draws it).

    Area and aspect ratio come from RANDOM_CROP_SCALE and RANDOM_CROP_RATIO; ten draws that do not fit end in the
    centre crop. The crop is a function of the image's size and the seed.
    """
    _check_aspect(image)
    draw = random.Random(seed)
    for _ in range(10):
        area = image.width * image.height * draw.uniform(*RANDOM_CROP_SCALE)
        ratio = math.exp(draw.uniform(math.log(RANDOM_CROP_RATIO[0]), math.log(RANDOM_CROP_RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
            box = (left, top, left + width, top + height)
            return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return center_crop(image, size)


def to_chw(image: Image.Image) -> np.ndarray:
    """An RGB image as uint8 (3, H, W)."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def to_signed(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) as float32 in [-1, 1], on the device where they are."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def _check_aspect(image: Image.Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels is longer than {MAX_ASPECT}:1")

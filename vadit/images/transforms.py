"""The pixel rules, once: how an image becomes RGB, and how it is cropped.

EXIF rotation is left unapplied and transparency is dropped, as in ADM's and the authors' preprocessing: the
statistics that FID is measured against were made that way.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

CropKind = Literal["center", "random", "random_resized"]

RANDOM_CROP_SCALE = (0.8, 1.0)
"""Share of the image's area that a random crop keeps."""
RANDOM_CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop."""
MAX_ASPECT = 256
"""Longer images are refused: scaled to the crop's height they would take gigabytes."""


def open_image(data: bytes) -> Image.Image:
    """An image file's content as a decoded image, in whatever mode; damaged data makes Pillow raise almost any type.

    A PNG's checksums are compared first: Pillow passes over those of the pixels, and shows some damaged files.
    """
    with Image.open(io.BytesIO(data)) as image:
        if image.format == "PNG":
            Image.open(io.BytesIO(data)).verify()
        image.load()
        return image


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


@dataclass(frozen=True)
class Crop:
    """How an image of a known size becomes size x size pixels; every loader follows the same four steps."""

    cut: tuple[int, int, int, int] | None
    """(left, top, right, bottom) in pixels of the image: what is kept of it, first of all; None: everything."""
    halvings: int
    """Then it is halved so many times, to (width // 2, height // 2), with a box filter."""
    scaled: tuple[int, int]
    """(width, height) that it then gets with Pillow's bicubic filter."""
    window: tuple[int, int]
    """(left, top) of the square that is cut out at last."""
    size: int
    """Side of that square."""


def plan_crop(kind: CropKind, width: int, height: int, size: int, seed: int = 0) -> Crop:
    """The crop of an image of width x height pixels: a function of these numbers and the seed alone.

    center: ADM's (Dhariwal & Nichol 2021, image_datasets.py): halve while the short side is at least twice the goal,
    bring the short side to it, cut out the middle (rounded towards the upper left). random: scaled in the same way, a
    random square of the short side, as the authors train their tokenizer. random_resized: a random part of the image
    (Szegedy et al. 2015, as torchvision draws it) with RANDOM_CROP_SCALE and RANDOM_CROP_RATIO; ten draws that do not
    fit end in the centre crop.

    Raises:
        ValueError: the image is longer than MAX_ASPECT allows.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels is longer than {MAX_ASPECT}:1")
    draw = random.Random(seed)
    if kind == "random_resized":
        for _ in range(10):
            area = width * height * draw.uniform(*RANDOM_CROP_SCALE)
            ratio = math.exp(draw.uniform(math.log(RANDOM_CROP_RATIO[0]), math.log(RANDOM_CROP_RATIO[1])))
            across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < across <= width and 0 < down <= height:
                left, top = draw.randint(0, width - across), draw.randint(0, height - down)
                return Crop((left, top, left + across, top + down), 0, (size, size), (0, 0), size)
    halvings = 0
    while min(width, height) >= 2 * size:
        width, height, halvings = width // 2, height // 2, halvings + 1
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    if kind == "random":
        window = draw.randint(0, width - size), draw.randint(0, height - size)
    else:
        window = (width - size) // 2, (height - size) // 2
    return Crop(None, halvings, (width, height), window, size)


def scale(image: Image.Image, crop: Crop) -> Image.Image:
    """An RGB image halved and scaled as a crop asks for, not yet cut: the second and the third step."""
    for _ in range(crop.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(crop.scaled, Image.Resampling.BICUBIC)


def apply_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """An RGB image through the four steps."""
    image = scale(image if crop.cut is None else image.crop(crop.cut), crop)
    left, top = crop.window
    return image.crop((left, top, left + crop.size, top + crop.size))

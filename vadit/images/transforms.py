"""The pixel rules, once: how an image becomes RGB, and how it is cropped.

By default EXIF's orientation is left unapplied and transparency is dropped, as in ADM's and the authors' preprocessing
(both call Pillow's convert("RGB")): the statistics that FID is measured against were made that way. Pillow itself turns
a TIFF by its orientation, which is a tag of that format, always.
"""

import contextlib
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from vadit.config.data import Alpha, Exif, PictureSpec

CropKind = Literal["center", "random"]

MAX_ASPECT = 256  # longer images are refused: scaled to the crop's height they would take gigabytes


_ORDER = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = dict(enumerate(map(Image.Transpose.__getitem__, _ORDER.split()), start=2))  # by EXIF's orientation; 1: upright


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What sets an image upright by its EXIF, if anything; decodes nothing."""
    with contextlib.suppress(Exception):  # damaged metadata says nothing
        return TURNS[Image.Image.getexif(image)[0x0112]]
    return None


def to_rgb(image: Image.Image, alpha: Alpha = PictureSpec.alpha, exif: Exif = PictureSpec.exif) -> Image.Image:
    """Any Pillow mode as RGB; 16-bit grey keeps its high byte (Pillow alone would clip it to white)."""
    if exif == "apply" and (turn := turn_of(image)) is not None:
        image = image.transpose(turn)
    if alpha != "drop" and image.has_transparency_data and not image.mode.startswith("I"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, alpha), image).convert("RGB")
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
    """How an image of a known size becomes size x size pixels; every loader follows the same three steps."""

    halvings: int  # it is halved so many times, to (width // 2, height // 2), with a box filter
    scaled: tuple[int, int]  # (width, height) that it then gets with Pillow's bicubic filter
    window: tuple[int, int]  # (left, top) of the square that is cut out at last
    size: int  # side of that square


def plan_crop(kind: CropKind, width: int, height: int, size: int, seed: int = 0) -> Crop:
    """The crop of an image of width x height pixels: a function of these numbers and the seed alone.

    center: ADM's (Dhariwal & Nichol 2021, image_datasets.py): halve while the short side is at least twice the goal,
    bring the short side to it, cut out the middle (rounded towards the upper left). random: scaled in the same way, a
    random square of the short side, as the authors train their tokenizer. ValueError for one longer than MAX_ASPECT.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} x {height} pixels is longer than {MAX_ASPECT}:1")
    halvings = 0
    while min(width, height) >= 2 * size:
        width, height, halvings = width // 2, height // 2, halvings + 1
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    if kind == "random":
        draw = random.Random(seed)
        window = draw.randint(0, width - size), draw.randint(0, height - size)
    else:
        window = (width - size) // 2, (height - size) // 2
    return Crop(halvings, (width, height), window, size)


def scale(image: Image.Image, crop: Crop) -> Image.Image:
    """An RGB image halved and scaled as a crop asks for, not yet cut: the first two steps."""
    for _ in range(crop.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(crop.scaled, Image.Resampling.BICUBIC)


def apply_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """An RGB image through the three steps."""
    image = scale(image, crop)
    left, top = crop.window
    return image.crop((left, top, left + crop.size, top + crop.size))

"""Pixels and what networks take: both formulas, PNG files of evaluation, and pictures for people."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vadit.runtime.errors import RunError, UsageError

_GAP = 2
"""Pixels between tiles."""
_BACKGROUND = (255, 255, 255)
_INK = (90, 98, 110)


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) as float32 in [-1, 1], on the device where they are.

    The layout is the one that convolutions are fast with there: channels last on a GPU, else channels first.
    """
    layout = torch.channels_last if pixels.is_cuda else torch.contiguous_format
    return pixels.to(torch.float32, memory_format=layout).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] to uint8: 127.5 x + 128, clamped and truncated; the inverse of `to_signed` on every pixel value."""
    return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)


def channels_last(images: Tensor) -> Tensor:
    """Images (B, 3 or 1, H, W) as files and pictures hold them: (B, H, W, 3), grey repeated."""
    return images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3)


def read_png(path: Path) -> np.ndarray:
    """A PNG of an evaluation, which no loss may have changed, as uint8 (H, W, 3); grey is repeated."""
    try:
        with Image.open(path) as image:
            if image.format == "JPEG":
                raise UsageError(f"{path} is a JPEG by its content, whose losses change every score; draw it as PNG")
            if image.mode not in ("RGB", "L"):
                raise UsageError(
                    f"{path} has pixel mode {image.mode}; needed: 8-bit RGB or grey without alpha or palette"
                )
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise RunError(f"{path} does not decode ({error}); delete it and draw this sample again") from None


def image_grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images uint8 (N, H, W, 3) row by row in `columns` columns (default: about square).

    `scale` enlarges by whole factors without smoothing; by default images below 64 pixels grow to about 64.
    """
    tiles = _enlarge(_checked(images), scale)
    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), _BACKGROUND, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * (height + _GAP), number % columns * (width + _GAP)
        canvas[top : top + height, left : left + width] = tile
    return Image.fromarray(canvas)


def reconstruction_pairs(
    originals: np.ndarray,
    reconstructions: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    labels: tuple[str, str] = ("original", "reconstruction"),
) -> Image.Image:
    """Rows of originals (N, H, W, 3), each with the row of its reconstructions right below, labelled at the left."""
    first, second = _enlarge(_checked(originals), scale), _enlarge(_checked(reconstructions), scale)
    if first.shape != second.shape:
        raise UsageError(f"originals {originals.shape} and reconstructions {reconstructions.shape} must have one shape")
    count, height, width, _ = first.shape
    columns = min(columns or 12, count)
    font = ImageFont.load_default(size=12)
    gutter = math.ceil(max(font.getlength(label) for label in labels)) + 12
    pair_height = 2 * height + _GAP
    rows = math.ceil(count / columns)
    size = (gutter + columns * (width + _GAP) - _GAP, rows * (pair_height + 5 * _GAP) - 5 * _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for row in range(rows):
        top = row * (pair_height + 5 * _GAP)
        part = slice(row * columns, (row + 1) * columns)
        for line, (label, tiles) in enumerate(zip(labels, (first[part], second[part]), strict=True)):
            y = top + line * (height + _GAP)
            draw.text((gutter - 10, y + height / 2), label, fill=_INK, font=font, anchor="rm")
            for column, tile in enumerate(tiles):
                canvas.paste(Image.fromarray(tile), (gutter + column * (width + _GAP), y))
    return canvas


def _checked(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise UsageError(f"pictures need images uint8 (N, H, W, 3) with N >= 1, found {images.dtype} {images.shape}")
    return images


def _enlarge(images: np.ndarray, scale: int | None) -> np.ndarray:
    factor = scale or max(1, 64 // max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)

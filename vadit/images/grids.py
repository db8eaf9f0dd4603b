"""Pictures for people: grids of images, and originals above their reconstructions."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vadit.runtime.errors import UsageError

_GAP = 2
"""Pixels between tiles."""
_BACKGROUND = (255, 255, 255)
_INK = (90, 98, 110)


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

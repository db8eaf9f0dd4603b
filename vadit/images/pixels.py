"""Pixels and what networks take: both formulas, PNG files of evaluation, and pictures for people."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from vadit.images.formats import open_image, reason
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import SPACE, saved_file
from vadit.runtime.reading import read_file

_GAP = 2  # pixels between tiles
_WHITE = 255
_INK = (90, 98, 110)
_TILES = "tiles"  # keyword of a PNG's text that says where its tiles are: count, height, width, gap of rows, left


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
        image = open_image(read_file(path))
    except RunError:
        raise
    except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
        raise RunError(f"{path} does not decode ({reason(error)}); delete it and draw this sample again") from None
    if image.format != "PNG":
        raise UsageError(f"{path} is a {image.format} by its content; draw it as PNG: losses change every score")
    if image.mode not in ("RGB", "L"):
        raise UsageError(f"{path} has pixel mode {image.mode}; needed: 8-bit RGB or grey without alpha or palette")
    return np.asarray(image.convert("RGB"))


def write_png(path: Path, image: Image.Image, advice: str = SPACE, *, flush: bool = True) -> None:
    """Write a picture as a `saved_file`, with a note of its tiles where it has some."""
    notes = PngInfo()
    if _TILES in image.info:
        notes.add_text(_TILES, image.info[_TILES])
    with saved_file(path, advice, flush=flush) as partial:
        image.save(partial, format="png", pnginfo=notes)


def read_tiles(image: Image.Image, limit: int) -> np.ndarray | None:
    """The first tiles (N, H, W, 3) of a picture of this module that was opened; a pair is one. None of any other."""
    try:
        count, height, width, gap, left = map(int, image.info[_TILES].split())
        pixels = np.asarray(image.convert("RGB"))[:, left:]
        columns = (pixels.shape[1] + _GAP) // (width + _GAP)
        places = ((n // columns * (height + gap), n % columns * (width + _GAP)) for n in range(min(count, limit)))
        tiles = np.stack([pixels[top : top + height, start : start + width] for top, start in places])
        return tiles if tiles.shape[1:] == (height, width, 3) and tiles.size else None
    except (KeyError, ValueError, ZeroDivisionError):
        return None


def image_grid(images: np.ndarray, columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Images uint8 (N, H, W, 3) row by row in `columns` columns (default: about square).

    `scale` enlarges by whole factors without smoothing; by default images below 64 pixels grow to about 64.
    """
    return _tiled(_enlarged(images, scale), columns or math.ceil(math.sqrt(len(images))), _GAP)


def reconstruction_pairs(
    originals: np.ndarray, reconstructions: np.ndarray, columns: int = 12, scale: int | None = None
) -> Image.Image:
    """Rows of originals (N, H, W, 3), each with the row of its reconstructions right below, labelled at the left."""
    first, second = _enlarged(originals, scale), _enlarged(reconstructions, scale)
    if first.shape != second.shape:
        raise UsageError(f"originals {originals.shape} and reconstructions {reconstructions.shape} must have one shape")
    height = first.shape[1]
    pairs = np.concatenate([np.pad(first, ((0, 0), (0, _GAP), (0, 0), (0, 0)), constant_values=_WHITE), second], 1)
    body = _tiled(pairs, min(columns, len(pairs)), 5 * _GAP)
    font = ImageFont.load_default(size=12)
    labels = ("original", "reconstruction")
    gutter = math.ceil(max(font.getlength(label) for label in labels)) + 12
    canvas = Image.new("RGB", (gutter + body.width, body.height), (_WHITE,) * 3)
    canvas.paste(body, (gutter, 0))
    canvas.info[_TILES] = body.info[_TILES].removesuffix("0") + str(gutter)
    draw = ImageDraw.Draw(canvas)
    for top in range(0, body.height, pairs.shape[1] + 5 * _GAP):
        for line, label in enumerate(labels):
            y = top + line * (height + _GAP) + height / 2
            draw.text((gutter - 10, y), label, fill=_INK, font=font, anchor="rm")
    return canvas


def _tiled(tiles: np.ndarray, columns: int, row_gap: int) -> Image.Image:
    """Tiles (N, H, W, 3) row by row, on white."""
    count, height, width, _ = tiles.shape
    rows = math.ceil(count / columns)
    margins = ((0, rows * columns - count), (0, row_gap), (0, _GAP), (0, 0))
    padded = np.pad(tiles, margins, constant_values=_WHITE).reshape(rows, columns, height + row_gap, width + _GAP, 3)
    canvas = padded.swapaxes(1, 2).reshape(rows * (height + row_gap), columns * (width + _GAP), 3)
    picture = Image.fromarray(canvas[:-row_gap, :-_GAP])
    picture.info[_TILES] = f"{count} {height} {width} {row_gap} 0"
    return picture


def _enlarged(images: np.ndarray, scale: int | None) -> np.ndarray:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) == 0:
        raise UsageError(f"pictures need images uint8 (N, H, W, 3) with N >= 1, found {images.dtype} {images.shape}")
    factor = scale or max(1, 64 // max(images.shape[1:3]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)

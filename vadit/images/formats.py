"""The one door for pictures: which kinds of files are read, and what is said of all others.

Pillow on its own opens forty formats, and starts another program (Ghostscript) for one of them.
"""

import contextlib
import io
from collections.abc import Mapping

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
OTHER_EXTENSIONS = (
    *(".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".tga", ".psd", ".svg", ".exr"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
"""Of pictures that are not read here, whatever is installed; they are counted, and named where pictures are opened."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What Pillow is asked to read, by the content, whatever a file is called."""
MAX_PIXELS = 2 * (1 << 30) // 12  # of a picture, as Pillow's own limit: 0.5 GB of RGB
_OTHERS = {b"": "empty", b"%PDF": "PDF", b"<": "HTML, SVG or XML", b"PK\x03\x04": "ZIP", b"\x1f\x8b": "gzip"}


class NoPicture(ValueError):
    """What a file holds that is no picture that is read here, in words for people."""


def peek(data: bytes | memoryview) -> Image.Image:
    """An image file's header; the pixels are not decoded. Raises what Pillow does."""
    return Image.open(io.BytesIO(data), formats=FORMATS)


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image file's content as a decoded image, in whatever mode, its `format` that of the content.

    A PNG's checksums are compared first: Pillow passes over those of the pixels, and shows some damaged files.
    NoPicture: it is of another format, or has more than `max_pixels`. Damaged data makes Pillow raise almost any type.
    """
    try:
        with peek(data) as image:
            if image.width * image.height > max_pixels:
                raise NoPicture(f"it has {image.width} x {image.height} pixels, more than the {max_pixels:,} allowed")
            if image.format == "PNG":
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
            image.load()
            return image
    except Image.DecompressionBombError as error:
        raise NoPicture(str(error)) from None
    except UnidentifiedImageError:
        raise NoPicture(f"it is {_kind(data)}; needed: {', '.join(FORMATS)}") from None


def describe_unread(unread: Mapping[str, int]) -> str:
    """How many pictures are left out by their formats ({"HEIC": 12}), the most frequent first; empty where none is."""
    counts = sorted(unread.items(), key=lambda each: (-each[1], each[0]))
    kinds = ", ".join(f"{count:,} {name}" for name, count in counts)
    return f"pictures of formats that are not read, convert them to JPEG or PNG: {kinds}" if counts else ""


def reason(error: Exception) -> str:
    """Why a picture cannot be had, by the error of `open_image`."""
    return str(error) if isinstance(error, NoPicture) else f"{type(error).__name__}: {error}"


def _kind(data: bytes) -> str:
    """What a file is by its first bytes; no decoder is started."""
    Image.init()
    for name, (_, accepts) in Image.OPEN.items():
        with contextlib.suppress(Exception):  # some look further than a short file goes
            if accepts is not None and accepts(data[:16]):
                return f"a damaged {name}" if name in FORMATS else name
    if data[4:8] == b"ftyp":
        return "HEIC, or a film"
    return next((name for start, name in _OTHERS.items() if data[: max(len(start), 1)] == start), "no known picture")

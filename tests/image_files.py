"""Image files for tests: photographs, and every odd or damaged file that a folder of images may hold.

What the pixels of an odd file are is worked out here by other means than reading the file back: a palette is looked up
by hand, a 16-bit value loses its low byte, a progressive file shows what its sequential twin shows.
"""

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vadit.demo.data import photograph
from vadit.images.loader import ImageBatch
from vadit.images.transforms import apply_crop, plan_crop

NAMES = ("china", "astronaut", "coffee", "rocket", "chelsea", "flower")
EXACT = float("inf")


@dataclass(frozen=True)
class OddFile:
    """The content of a file and what it shows."""

    name: str  # File name; the suffix may lie about the content.
    data: bytes
    pixels: np.ndarray  # uint8 (H, W, 3).
    min_psnr: float = EXACT  # How near a decoder's pixels must come, in dB.


def photo(number: int, width: int = 120, height: int = 90) -> Image.Image:
    """A photograph, RGB: `number` counts through the pictures and, round after round, through parts of them."""
    whole = _photo(NAMES[number % len(NAMES)])
    if number >= len(NAMES):
        draw = random.Random(number)
        side = draw.uniform(0.5, 0.9)
        span = [round(full * side) for full in whole.size]
        left, top = (draw.randint(0, full - part) for full, part in zip(whole.size, span, strict=True))
        whole = whole.crop((left, top, left + span[0], top + span[1]))
    return whole.resize((width, height), Image.Resampling.LANCZOS)


@functools.cache
def _photo(name: str) -> Image.Image:
    return photograph(name).resize((320, 240), Image.Resampling.LANCZOS)


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The image as a file of Pillow's `kind`; JPEGs of quality 92 unless told otherwise."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 92} | options if kind == "JPEG" else options))
    return buffer.getvalue()


def jpeg(number: int, width: int = 120, height: int = 90, **options: Any) -> bytes:
    """A photograph as a JPEG file."""
    return encode(photo(number, width, height), **options)


def decoded(data: bytes) -> np.ndarray:
    """uint8 (H, W, 3): an ordinary RGB file as Pillow reads it."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.array(image)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of an RGB image, by the rule that all loaders follow."""
    return apply_crop(image, plan_crop("center", *image.size, size))


def ids_of(batches: Iterable[ImageBatch]) -> list[int]:
    return [index for batch in batches for index in batch.ids.tolist()]


def write_folder(root: Path, files: dict[str, bytes]) -> list[Path]:
    """Write files by name (folders on the way are made); their paths."""
    paths = [root / name for name in files]
    for path, data in zip(paths, files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return paths


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 arrays in dB; infinite where they are equal."""
    error = np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def odd_files() -> dict[str, OddFile]:
    """Files out of the ordinary that show an image, by kind."""
    image = photo(0)
    rgb = np.array(image)
    plain = encode(image)
    shown = decoded(plain)
    deep = rgb.astype(np.uint16) * 256 + np.arange(120, dtype=np.uint16)[None, :, None]
    palette = image.quantize(32)
    # one row of colours of alpha 0 and 80, the others opaque
    alpha = bytes([0, 80, *[255] * 30])
    colours = np.array(palette.getpalette()).reshape(-1, 3).astype(np.uint8)
    cmyk = image.convert("CMYK")
    thin = encode(photo(1, 1, 60), "PNG")
    flat = encode(photo(1, 60, 1), "PNG")
    found = [
        ("jpeg", "plain.jpg", plain, shown),
        ("jpeg without an ending", "endless.JPEG", plain + b"\xff\xd8\xff\x00trailing bytes", shown),
        ("progressive jpeg", "progressive.jpg", encode(image, progressive=True), shown),
        ("jpeg with restart markers", "restart.jpg", encode(image, restart_marker_rows=1), shown),
        ("grey jpeg", "grey-photo.jpg", encode(image.convert("L")), _grey(decoded_grey(encode(image.convert("L"))))),
        ("exif-rotated jpeg", "rotated.jpg", encode(image, exif=_orientation(6)), shown),
        ("png named jpg", "really.jpg", encode(image, "PNG"), rgb),
        ("jpeg named png", "really-not.png", plain, shown),
        ("grey png", "grey.png", encode(image.convert("L"), "PNG"), _grey(np.array(image.convert("L")))),
        ("16-bit grey png", "deep-grey.png", deep_png(deep[..., :1]), _grey(rgb[..., 0])),
        ("16-bit rgb png", "deep.png", deep_png(deep), rgb),
        ("palette png", "palette.png", encode(palette, "PNG"), colours[np.array(palette)]),
        (
            "palette png with alpha",
            "palette-alpha.png",
            encode(palette, "PNG", transparency=alpha),
            colours[np.array(palette)],
        ),
        ("rgba png", "rgba.png", encode(_with_alpha(image), "PNG"), rgb),
        ("1-bit png", "bits.png", encode(image.convert("1"), "PNG"), _grey(np.array(image.convert("1")) * 255)),
        ("animated gif", "moving.gif", *_gif(palette)),
        ("1-pixel-wide image", "thin.png", thin, decoded(thin)),
        ("1-pixel-high image", "flat.png", flat, decoded(flat)),
        ("one pixel", "one.png", encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"), np.uint8([[[9, 8, 7]]])),
        ("extreme aspect", "long.png", encode(photo(2, 600, 6), "PNG"), np.array(photo(2, 600, 6))),
    ]
    files = {kind: OddFile(name, data, np.ascontiguousarray(pixels)) for kind, name, data, pixels in found}
    # Four inks come back as three colours only nearly.
    files["cmyk jpeg (adobe)"] = OddFile("inks.jpg", encode(cmyk, quality=97), rgb, min_psnr=32)
    # Without Adobe's mark: Pillow writes and reads inverted inks all the same.
    files["cmyk jpeg (no mark)"] = OddFile("inks-bare.jpg", without_adobe(encode(cmyk, quality=97)), rgb, min_psnr=32)
    return files


def decoded_grey(data: bytes) -> np.ndarray:
    """uint8 (H, W): a grey file as Pillow reads it."""
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "L"
        return np.array(image)


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)


def _with_alpha(image: Image.Image) -> Image.Image:
    """The same colours, transparent from left to right."""
    ramp = np.tile(np.linspace(0, 255, image.width).astype(np.uint8), (image.height, 1))
    return Image.fromarray(np.dstack([np.array(image), ramp]))


def _orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


_SIDES = "top left, top right, bottom right, bottom left, left top, right top, right bottom, left bottom"
SIDES = dict(enumerate(_SIDES.split(", "), start=1))
"""By EXIF's orientation: where the first stored row lies in the picture, and the first stored column."""


def turned(upright: np.ndarray, value: int, kind: str = "JPEG", **options: Any) -> bytes:
    """A file that shows `upright` (H, W, 3) where its EXIF is applied."""
    rows, columns = SIDES[value].split()
    pixels = upright.swapaxes(0, 1) if rows in ("left", "right") else upright
    pixels = pixels[::-1] if rows in ("bottom", "right") else pixels
    pixels = pixels[:, ::-1] if columns in ("bottom", "right") else pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return encode(image, kind, **({"exif": _orientation(value)} | options))


def _gif(palette: Image.Image) -> tuple[bytes, np.ndarray]:
    """Three frames; the first is what is shown."""
    others = [photo(number).quantize(32) for number in (1, 2)]
    data = encode(palette, "GIF", save_all=True, append_images=others, duration=40, loop=0)
    return data, np.array(palette.convert("RGB"))


def deep_png(values: np.ndarray) -> bytes:
    """A PNG file of 16 bits per channel, which Pillow writes for grey only: uint16 (H, W, 1 or 3)."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    return png([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG file of the given chunks, checksums added."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def without_adobe(data: bytes) -> bytes:
    """A JPEG without its APP14 segment, by which Adobe marks the meaning of four channels."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def bad_files() -> dict[str, tuple[str, bytes]]:
    """Files of whatever bytes that show no image: kind to (file name, content)."""
    data = jpeg(3)
    scan = data.index(b"\xff\xda")
    frame = data.index(b"\xff\xc0")
    whole_png = encode(photo(3), "PNG")
    body = whole_png.index(b"IDAT")
    bomb = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return {
        "empty": ("empty.jpg", b""),
        "zero bytes": ("zeros.jpg", bytes(4096)),
        "text": ("text.jpg", b"404: this is no image\n" * 40),
        "jpeg cut in its header": ("cut-header.jpg", data[: scan // 2]),
        "jpeg cut before its data": ("cut-scan.jpg", data[: scan + 14]),
        "jpeg cut in the middle": ("cut-middle.jpg", data[: (scan + len(data)) // 2]),
        "jpeg cut near its end": ("cut-end.jpg", data[:-40]),
        "jpeg of only a marker": ("marker.jpg", data[:2]),
        "jpeg of height 0": ("no-height.jpg", data[: frame + 5] + b"\0\0" + data[frame + 7 :]),
        "png cut short": ("cut-still.png", whole_png[: len(whole_png) // 2]),
        "png of damaged data": ("damaged.png", whole_png[: body + 40] + bytes(200) + whole_png[body + 240 :]),
        "gif cut short": ("cut-moving.gif", encode(photo(3).quantize(64), "GIF")[:500]),
        "huge png": ("bomb.png", png([(b"IHDR", bomb), (b"IDAT", zlib.compress(bytes(64))), (b"IEND", b"")])),
        "huge jpeg": ("bomb-photo.jpg", data[: frame + 5] + struct.pack(">HH", 65_000, 65_000) + data[frame + 9 :]),
        "line of 3000 pixels": ("line.png", encode(Image.new("RGB", (1, 3000)), "PNG")),
    }


def bad_places(nowhere: Path) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Names in a folder that cannot be read: kind to (file name, function that makes it)."""
    places: dict[str, tuple[str, Callable[[Path], None]]] = {
        "broken link": ("broken-link.jpg", lambda path: path.symlink_to(nowhere / "gone.jpg")),
        "link to itself": ("loop.jpg", lambda path: path.symlink_to(path)),
    }
    if Path("/dev/zero").exists():
        places["device"] = ("device.jpg", lambda path: path.symlink_to("/dev/zero"))
    if os.geteuid() != 0:  # root may read everything
        places["no permission"] = ("forbidden.jpg", _forbid)
    return places


def _forbid(path: Path) -> None:
    path.write_bytes(jpeg(4))
    path.chmod(0)

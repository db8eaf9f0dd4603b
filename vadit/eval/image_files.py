"""Sets of images on disk as evaluation takes them: lossless, of one size, in a fixed order, never all in memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vadit.images.formats import EXTENSIONS, OTHER_EXTENSIONS
from vadit.images.pixels import read_png
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.npz_files import Npz
from vadit.runtime.walk import walk

# Left out in silence, they would leave the scores of a part of a set.
_OTHER_PICTURES = (*(ending for ending in EXTENSIONS if ending != ".png"), *OTHER_EXTENSIONS)

MAX_SIDE, MAX_IMAGES = 8192, 10_000_000
MAX_BATCH_BYTES = 128 << 20


class PngFolder:
    """The PNGs under a folder, by number where their names are numbers, else by name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = [self.path / file for file in walk(self.path, (".png", *_OTHER_PICTURES)).files()]
        other = [file for file in files if file.suffix.lower() != ".png"]
        if other:
            raise UsageError(
                f"{other[0]} is no PNG; store all images of {self.path} as PNG, or as one .npz with arr_0 "
                "(a JPEG's losses change every score)"
            )
        self.files = sorted(files, key=_file_order)
        if not self.files:
            raise UsageError(f"{self.path} holds no PNG files; name a folder of PNGs or an .npz with arr_0")
        if (self.path.parent / "settings.json").is_file():
            _check_complete(self.files)
        height, width, _ = read_png(self.files[0]).shape
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int, limit: int | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """Batches uint8 (B, H, W, 3) of `limit` images (default all) from place `first` on, in file order."""
        files = self.files[first:][:limit]
        step = _at_once(batch_size, self.size)
        for start in range(0, len(files), step):
            images = [read_png(file) for file in files[start : start + step]]
            for file, image in zip(files[start:], images, strict=False):
                if image.shape[:2] != self.size:
                    raise UsageError(
                        f"{file} is {image.shape[1]}x{image.shape[0]} pixels, {self.files[0].name} is "
                        f"{self.size[1]}x{self.size[0]}; all images must have one size"
                    )
            yield np.stack(images)


class NpzImages:
    """`arr_0` of an ADM .npz, streamed: 50,000 images of 256 pixels are 9.8 GB and never in memory at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._npz = Npz(path)
        entry = self._npz.entries.get("arr_0")
        if entry is None:
            raise UsageError(f"{path} holds no arr_0; name an .npz with images uint8 (N, H, W, 3)")
        if entry.fortran:
            raise UsageError(f"{path}: arr_0 is in Fortran order; store it in C order (np.ascontiguousarray)")
        if entry.dtype != np.uint8 or len(entry.shape) != 4 or entry.shape[3] != 3:
            raise UsageError(f"{self.path}: arr_0 is {entry}; needed: uint8 (N, H, W, 3)")
        self._count, height, width, _ = entry.shape
        self.size = (height, width)
        if not (min(self.size) > 0 and max(self.size) <= MAX_SIDE and self._count <= MAX_IMAGES):
            raise UsageError(
                f"{self.path}: arr_0 is {entry}; it may hold {MAX_IMAGES:,} images of 1 to {MAX_SIDE} pixels a side"
            )

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, limit: int | None = None, first: int = 0) -> Iterator[np.ndarray]:
        """As those of a folder."""
        remaining = max(min(self._count - first, self._count if limit is None else limit), 0)
        with self._npz.stream("arr_0") as stream:
            stream.seek(first * math.prod(self.size) * 3, os.SEEK_CUR)  # a compressed member is read up to there
            while remaining:
                shape = (min(_at_once(batch_size, self.size), remaining), *self.size, 3)
                data = stream.read(math.prod(shape))
                if len(data) != math.prod(shape):
                    raise RunError(f"{self.path}: arr_0 ends early, the file is truncated; write it again")
                yield np.frombuffer(data, np.uint8).reshape(shape).copy()
                remaining -= shape[0]


def _at_once(batch_size: int, size: tuple[int, int]) -> int:
    """Images of a batch: fewer where they are so large that the batch would fill the memory."""
    return max(1, min(batch_size, MAX_BATCH_BYTES // (3 * math.prod(size))))


def open_images(path: str | Path) -> PngFolder | NpzImages:
    """A folder of PNGs, what `vadit sample` wrote (its images/ lie beside a grid), or an .npz with arr_0."""
    path = Path(path)
    if path.is_dir():
        return PngFolder(path / "images" if (path / "images").is_dir() else path)
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(f"{path} is no folder and no .npz file; name a folder of PNGs or an .npz with arr_0")
    return NpzImages(path)


def _check_complete(files: list[Path]) -> None:
    """Refuse what `vadit sample` wrote and somebody lost a part of: its images are 0, 1, 2, ... (files are sorted)."""
    for index, file in enumerate(files):
        if file.stem.isdecimal() and int(file.stem) != index:
            raise UsageError(
                f"{file.parent} lacks image {index:06d}.png, though later ones are there; "
                "run the same `vadit sample` again to draw what is missing"
            )


def _file_order(path: Path) -> tuple[str, int, str]:
    """Folder by folder; 2.png before 10.png, so that the splits of the inception score are those of the indices."""
    return str(path.parent), int(path.stem) if path.stem.isdecimal() else -1, path.name

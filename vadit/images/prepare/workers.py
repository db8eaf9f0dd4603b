"""The processes of `vadit prepare`: they read, decode, scale and encode images, and later read them back.

Results come in the order of the images whatever the number of processes, and only a few parts are under way at a time,
so memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Literal, TypeVar

from PIL import Image, UnidentifiedImageError

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images
from vadit.images.beton_writer import MAX_SIDE, PAGE_SIZE
from vadit.images.folders import FolderSource
from vadit.images.loader import ImageSource
from vadit.images.transforms import open_image, plan_crop, to_rgb
from vadit.runtime.errors import RunError

PART_IMAGES = 8
"""Images that a process takes at a time; some MB of results."""
PARTS_AHEAD = 3
"""Parts per process that may wait for the writer."""
VERIFY_IMAGES = 64
PNG_LEVEL = 3
"""A third of the time of the usual 6, and a twelfth more bytes."""

Encode = Literal["raw", "jpeg", "png", "keep"]
Format = Literal["beton", "webdataset"]
Verify = Literal["decode", "checksum", "none"]
In = TypeVar("In")
Out = TypeVar("Out")

_EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "PPM": "ppm",
}


@dataclass(frozen=True)
class Job:
    """What becomes of each image."""

    spec: ImageDataSpec
    """Where the images are."""
    format: Format
    size: int
    """Short side in pixels; 0: as it is."""
    encode: Encode
    quality: int


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored."""

    extension: str
    """Of its file; "raw": height x width x 3 bytes."""
    width: int
    height: int
    data: bytes


@dataclass(frozen=True)
class Part:
    """Some images in a row."""

    ids: range
    files: FolderSource | None
    """They alone, where they are files: not every process needs the paths of millions."""


@dataclass(frozen=True)
class Written:
    """Some images of a file that was written, to be read back."""

    path: str
    ids: range
    size: int
    decode: bool


def encode_part(job: Job, part: Part) -> list[Encoded | str]:
    """The images of a part, or why they cannot be had."""
    source: ImageSource = _source(job.spec, job.size) if part.files is None else part.files
    results: list[Encoded | str] = []
    for place, index in enumerate(part.ids):
        try:
            data = source.read(index if part.files is None else place)
            results.append(encode_image(data, job))
        except MemoryError:
            raise
        except RunError as error:
            results.append(str(error))
        except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
            results.append(_reason(error))
    return results


def _reason(error: Exception) -> str:
    """One line; the same for the same bytes, so without the addresses that Pillow puts into its messages."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image of a kind that Pillow knows"
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(f"{type(error).__name__}: {error}".split()))


def encode_image(data: bytes, job: Job) -> Encoded:
    """An image file's bytes as they will be stored; raises whatever Pillow raises, ValueError where it does not fit.

    Every image is decoded, also where its bytes are kept.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        image = open_image(data)
        kind, mode = image.format, image.mode
        rgb = to_rgb(image)
    if job.encode == "keep":
        if kind not in _EXTENSIONS:
            raise ValueError(f"{kind} files cannot be kept as they are; set --size, or --encode png")
        return Encoded(_EXTENSIONS[kind], *rgb.size, data)
    if job.size:
        rgb = short_side(rgb, job.size)
    if job.format == "beton" and max(rgb.size) > MAX_SIDE:
        raise ValueError(f"{rgb.width} x {rgb.height} pixels is more than the {MAX_SIDE} that a beton can hold")
    if job.encode == "raw":
        stored = Encoded("raw", *rgb.size, rgb.tobytes())
    elif job.encode == "jpeg" and not job.size and kind == "JPEG" and mode == "RGB":
        stored = Encoded("jpg", *rgb.size, data)  # no second loss
    else:
        buffer = io.BytesIO()
        if job.encode == "jpeg":
            rgb.save(buffer, "JPEG", quality=job.quality, subsampling=0)
        else:
            rgb.save(buffer, "PNG", compress_level=PNG_LEVEL)
        stored = Encoded("jpg" if job.encode == "jpeg" else "png", *rgb.size, buffer.getvalue())
    if job.format == "beton" and len(stored.data) > PAGE_SIZE:
        raise ValueError(f"{len(stored.data)} bytes do not fit a page of a beton ({PAGE_SIZE}); set --encode jpeg")
    return stored


def short_side(image: Image.Image, size: int) -> Image.Image:
    """An RGB image whose short side is `size` by ADM's rule: what its centre crop is cut from."""
    crop = plan_crop("center", *image.size, size)
    for _ in range(crop.halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image.resize(crop.scaled, Image.Resampling.BICUBIC)


def verify_part(written: Written) -> int:
    """Read images back, and decode them where that is asked; their number. RunError names what is not as it should be.

    The source compares checksums.
    """
    source = _source(ImageDataSpec(path=written.path), written.size)
    for index in written.ids:
        data = source.read(index)
        if not written.decode:
            continue
        try:
            sides = open_image(data).size
        except Exception as error:  # Pillow's decoders raise almost any type
            raise RunError(f"{source.describe(index)} was written but does not decode ({error}); remove it") from error
        if written.size and min(sides) != written.size:
            raise RunError(
                f"{source.describe(index)} has {sides[0]} x {sides[1]} pixels, not {written.size}; remove it"
            )
    return len(written.ids)


def parts(source: ImageSource, ids: Iterable[range]) -> Iterator[Part]:
    """Stretches of images, cut into parts."""
    for stretch in ids:
        for start in range(stretch.start, stretch.stop, PART_IMAGES):
            some = range(start, min(start + PART_IMAGES, stretch.stop))
            files = None
            if isinstance(source, FolderSource):
                files = copy.copy(source)
                files.paths = source.paths[some.start : some.stop]
                files.labels = source.labels[:0].clone()
                files.classes = []
            yield Part(some, files)


@contextlib.contextmanager
def workers(num_workers: int) -> Iterator[Callable[[Callable[[In], Out], Iterable[In]], Iterator[Out]]]:
    """A map over so many processes (1: none besides this one) that keeps the order and runs a little ahead."""
    _source.cache_clear()  # of an earlier call in this process: files may have changed since
    if num_workers == 1:
        yield map
        return
    # The processes are forked from a server that has imported everything: they start at once and share its memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start)

    def ordered(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
        pending: deque[Future[Out]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= num_workers * PARTS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                "a process of vadit prepare was killed, perhaps for want of memory; lower --num-workers "
                "(the same command goes on where it was)"
            ) from None

    try:
        yield ordered
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    """Of each process: leave Ctrl-C to the parent, and end with it, even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, name="vadit-follow", daemon=True).start()


@functools.lru_cache(maxsize=2)
def _source(spec: ImageDataSpec, size: int) -> ImageSource:
    """What this process reads from, opened once."""
    return open_images(spec, size).source

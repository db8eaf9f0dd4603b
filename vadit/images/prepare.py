"""Images of any source -> one .beton, scaled once instead of in every epoch (`vadit prepare`).

Images are decoded with Pillow and scaled so that their short side is `size` by ADM's rule, and not cropped: a centre
crop or a random square of the result is a slice of it, with the very pixels that the source would give. The order is
that of the source. The same command goes on where it was stopped, and what it makes does not depend on where that was
or on the number of worker processes, which read, decode, scale and encode, and at the end read everything back. Only a
few parts are under way at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from PIL import UnidentifiedImageError
from torch import Tensor

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images
from vadit.images.loader import ImageSource
from vadit.images.sources.beton import BetonFile, BetonSource, EncodedImage
from vadit.images.sources.beton_writer import PAGE_SIZE, BetonWriter, encode_image
from vadit.images.sources.folders import FolderSource, read_file
from vadit.images.transforms import open_image, plan_crop, scale, to_rgb
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import refuse_other_settings, saved_file

PART_IMAGES = 8
"""Images that a worker takes at a time; some MB of results."""
PARTS_AHEAD = 3
"""Parts per worker that may wait for the writer."""
VERIFY_IMAGES = 64
REPORT_EVERY = 16
GOES_ON = "make room or give permission, then start again: it goes on where it was"

Progress = Callable[[str, int, int], object]
"""Called with "prepare" or "verify", the images done and their number."""
In = TypeVar("In")
Out = TypeVar("Out")
Ordered = Callable[[Callable[[In], Out], Iterable[In]], Iterator[Out]]


@dataclass
class PrepareSummary:
    """What one call made."""

    num_images: int
    """Images in the result."""
    num_new: int
    """Those of them that this call made."""
    num_bytes: int
    """Size of the result."""
    classes: list[str]
    bad: dict[str, str] = field(default_factory=dict)
    """Place of each image that is left out -> why."""
    bad_file: Path | None = None
    """Where `bad` is written down."""
    seconds: float = 0.0
    """Of making, without verifying."""

    @property
    def images_per_s(self) -> float:
        """Images made per second."""
        return self.num_new / max(self.seconds, 1e-9)


class Job(NamedTuple):
    """What becomes of each image."""

    spec: ImageDataSpec
    """Where the images are."""
    size: int
    """Short side in pixels; 0: as it is."""
    encode: Literal["raw", "jpeg"]
    quality: int
    """Of JPEGs; 0 for raw pixels."""


class Part(NamedTuple):
    """Some images in a row."""

    ids: range
    paths: list[str] | None
    """Where they are files: not every worker needs the paths of millions."""


def prepare_images(
    spec: ImageDataSpec,
    out: str | Path,
    *,
    size: int = 256,
    encode: Literal["raw", "jpeg"] = "raw",
    quality: int = 95,
    num_workers: int | None = None,
    verify: Literal["decode", "checksum", "none"] = "decode",
    progress: Progress | None = None,
) -> PrepareSummary:
    """Make `out` (NAME.beton) of the images that `spec` names; `spec.on_error` and `spec.max_bad_share` are kept to.

    `size` 0 keeps the pixels as they are. JPEGs are of `quality` with full colour (4:4:4): at 256 pixels, halved colour
    would be seen, and learned. `num_workers` None: all cores. `verify` reads everything back and decodes it, or only
    compares checksums. `progress` is called with "prepare" or "verify", the images done and their number.

    UsageError: settings that do not fit, or `out` was begun with others. RunError: a bad image (on_error="raise"), too
    many of them, a full disk, or what was written does not read back.
    """
    out = Path(out)
    _check_settings(out, size, quality, num_workers)
    job = Job(spec, size, encode, quality if encode == "jpeg" else 0)
    source = open_images(spec, max(size, 1)).source
    settings = _settings(job, source)
    report = progress or (lambda *_: None)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        ordered = stack.enter_context(_workers(num_workers or len(os.sched_getaffinity(0))))
        num_new, writer = 0, None
        if out.exists():
            bad = _bad_of_finished(out, settings)
        else:
            writer = stack.enter_context(BetonWriter(out, max_samples=len(source), settings=settings))
            bad = writer.skipped
        if bad and spec.on_error == "raise":
            raise _refusal(source, *next(iter(bad.items())))
        if writer is not None:
            results = ordered(functools.partial(encode_part, job), _parts(source, writer.done))
            num_new = _append(writer, source, results, raises=spec.on_error == "raise", report=report)
        seconds = time.monotonic() - started
        left_out = {source.describe(int(index)): why for index, why in bad.items()}
        left_out |= getattr(source, "bad_files", {})  # what the shards of a source could not give
        bad_file = _list_bad(out, left_out)
        if len(left_out) > spec.max_bad_share * len(source):
            raise RunError(
                f"{len(left_out)} of {len(source)} images are bad, more than max_bad_share {spec.max_bad_share:g} "
                f"allows; see {bad_file}, then replace them and begin anew without {out}, or set --max-bad-share"
            )
        if writer is not None:
            writer.finish({"classes": source.classes, "settings": settings, "bad": bad})
        with saved_file(out.with_name(f"{out.name}.classes.json"), GOES_ON) as partial:
            partial.write_text(json.dumps(source.classes, indent=0) + "\n", encoding="utf-8")
        labels = source.labels[[index for index in range(len(source)) if str(index) not in bad]]
        if verify != "none":
            _check_labels(out, source, labels)
            spans = [
                range(len(labels))[start : start + VERIFY_IMAGES] for start in range(0, len(labels), VERIFY_IMAGES)
            ]
            for span in ordered(functools.partial(verify_part, str(out), size, verify == "decode"), spans):
                report("verify", span.stop, len(labels))
    return PrepareSummary(len(labels), num_new, out.stat().st_size, list(source.classes), left_out, bad_file, seconds)


def _check_settings(out: Path, size: int, quality: int, num_workers: int | None) -> None:
    if out.suffix != ".beton":
        raise UsageError(f"{out} is no name for the result; it must end in .beton")
    if out.is_dir():
        raise UsageError(f"{out} is a folder; choose another name for the result")
    if size < 0:
        raise UsageError(f"--size is {size}; it must be at least 1 pixel, or 0 for images as they are")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality is {quality}; it must be from 1 to 100")
    if num_workers is not None and num_workers < 1:
        raise UsageError(f"--num-workers is {num_workers}; it must be at least 1")


def _settings(job: Job, source: ImageSource) -> dict[str, Any]:
    """Whatever the bytes of the result depend on."""
    digest = hashlib.sha256(source.labels.numpy().tobytes())
    root = str(Path(source.name))
    for index in range(len(source)):
        digest.update(source.describe(index).removeprefix(root).encode(errors="surrogateescape") + b"\n")
    return {
        "source": f"{len(source)} images, {digest.hexdigest()[:16]}",  # of names and labels; their folder may move
        "size": job.size,
        "encode": job.encode,
        "quality": job.quality,
    }


def _bad_of_finished(out: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The images that a finished file does without; UsageError where it was made with other settings."""
    notes = BetonFile(out).notes
    if "settings" not in notes:
        raise UsageError(f"{out} is there, and not from vadit prepare; choose another name")
    refuse_other_settings(out, "images", notes["settings"], settings, "set it as it was, or choose another name")
    bad: dict[str, str] = notes["bad"]
    return bad


def _append(
    writer: BetonWriter,
    source: ImageSource,
    results: Iterator[list[EncodedImage | str]],
    *,
    raises: bool,
    report: Progress,
) -> int:
    """Write what is missing, from the last whole page on; the number of images that were written."""
    first, index = writer.num_samples, writer.done
    for part in results:
        for result in part:
            if not isinstance(result, str):
                writer.append(result, int(source.labels[index]))
            elif raises:
                raise _refusal(source, index, result)
            else:
                writer.skip(str(index), result)
            index += 1
            if index % REPORT_EVERY == 0 or index == len(source):
                report("prepare", index, len(source))
    return writer.num_samples - first


def _refusal(source: ImageSource, index: int | str, why: str) -> RunError:
    place = source.describe(int(index))
    said = why if place in why else f"image {place} does not decode ({why})"
    return RunError(f"{said}; replace it, or leave it out with --on-error skip")


def _list_bad(out: Path, bad: dict[str, str]) -> Path | None:
    """Write the list of bad images, where there are any; its path."""
    path = out.with_name(f"{out.name}.bad-images.txt")
    if not bad:
        path.unlink(missing_ok=True)
        return None
    with saved_file(path, GOES_ON) as partial:
        lines = "".join(f"{place}\t{why}\n" for place, why in bad.items())
        partial.write_text(lines, encoding="utf-8", errors="backslashreplace")
    return path


def _check_labels(out: Path, source: ImageSource, labels: Tensor) -> None:
    """RunError where the file's labels, as they lie on the disk, are not those that it should have."""
    with open(out, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if BetonSource(out).labels.tolist() != labels.tolist():
        raise RunError(f"the labels in {out} are not those of {source.name}; remove it")


# ------------------------------------------------------------------------------------------------ in the workers


def encode_part(job: Job, part: Part) -> list[EncodedImage | str]:
    """The images of a part, or why they cannot be had."""
    results: list[EncodedImage | str] = []
    for place, index in enumerate(part.ids):
        try:
            data = _source(job.spec, job.size).read(index) if part.paths is None else read_file(part.paths[place])
            results.append(encode_file(data, job))
        except MemoryError:
            raise
        except RunError as error:
            results.append(str(error))
        except UnidentifiedImageError:
            results.append("it is no image of a kind that Pillow knows")
        except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
            words = " ".join(f"{type(error).__name__}: {error}".split())
            results.append(re.sub(r" at 0x[0-9a-f]+", "", words))  # the same for the same bytes
    return results


def encode_file(data: bytes, job: Job) -> EncodedImage:
    """An image file's bytes as they will be stored; raises whatever Pillow raises, ValueError where it does not fit.

    Every image is decoded, also a JPEG that is kept as it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        image = open_image(data)
        is_plain_jpeg = image.format == "JPEG" and image.mode == "RGB"
        rgb = to_rgb(image)
    if job.size:
        rgb = scale(rgb, plan_crop("center", *rgb.size, job.size))
    if job.encode == "jpeg" and not job.size and is_plain_jpeg:
        stored = EncodedImage("jpg", *rgb.size, data)  # no second loss
    else:
        stored = encode_image(rgb, "jpg" if job.encode == "jpeg" else "raw", job.quality)
    if len(stored.data) > PAGE_SIZE:
        raise ValueError(f"{len(stored.data)} bytes do not fit a page of a beton ({PAGE_SIZE}); set --encode jpeg")
    return stored


def verify_part(path: str, size: int, decode: bool, ids: range) -> range:
    """Read images of a .beton back (that compares their checksums), and decode them; RunError names a bad one."""
    source = _source(ImageDataSpec(path=path), size)
    for index in ids:
        data = source.read(index)
        if not decode:
            continue
        try:
            sides = open_image(data).size
        except Exception as error:  # Pillow's decoders raise almost any type
            raise RunError(f"{source.describe(index)} was written but does not decode ({error}); remove it") from error
        if size and min(sides) != size:
            raise RunError(f"{source.describe(index)} has {sides[0]} x {sides[1]} pixels, not {size}; remove it")
    return ids


def _parts(source: ImageSource, first: int) -> Iterator[Part]:
    """The images from `first` on, cut into parts."""
    for start in range(first, len(source), PART_IMAGES):
        ids = range(start, min(start + PART_IMAGES, len(source)))
        yield Part(ids, source.paths[ids.start : ids.stop] if isinstance(source, FolderSource) else None)


@functools.lru_cache(maxsize=2)
def _source(spec: ImageDataSpec, size: int) -> ImageSource:
    """What this process reads from, opened once."""
    return open_images(spec, max(size, 1)).source


@contextlib.contextmanager
def _workers(num_workers: int) -> Iterator[Ordered[Any, Any]]:
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
    """Of each worker: leave Ctrl-C to the parent, and end with it, even where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, name="vadit-follow", daemon=True).start()

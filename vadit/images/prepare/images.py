"""Images of any source -> a .beton or WebDataset shards, scaled once instead of in every epoch.

Images are decoded with Pillow and scaled so that their short side is `size` by ADM's rule, and not cropped: a centre
crop or a random square of the result is a slice of it, with the very pixels that the source would give. The order is
that of the source. The same command goes on where it was stopped, and what it makes does not depend on where that was
or on the number of processes. At the end everything is read back.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images
from vadit.images.loader import ImageSource
from vadit.images.prepare.files import Beton, Progress, Shards, Task, write_text
from vadit.images.prepare.workers import Encode, Encoded, Format, Job, Verify, encode_part, parts, verify_part, workers
from vadit.runtime.errors import RunError, UsageError

BAD_FILE = "bad-images.txt"
SHARD_SIZE = 5_000
QUALITY = 95


@dataclass
class PrepareSummary:
    """What one call made."""

    num_images: int = 0
    """Images in the result."""
    num_new: int = 0
    """Those of them that this call made."""
    num_bytes: int = 0
    """Size of the result."""
    classes: list[str] = field(default_factory=list)
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


def prepare_images(
    spec: ImageDataSpec,
    out: str | Path,
    *,
    format: Format | None = None,
    size: int = 256,
    encode: Literal["raw", "jpeg", "png"] | None = None,
    quality: int = QUALITY,
    shard_size: int = SHARD_SIZE,
    num_workers: int | None = None,
    verify: Verify = "decode",
    progress: Progress | None = None,
) -> PrepareSummary:
    """Make `out` from the images that `spec` names; `spec.on_error` and `spec.max_bad_share` are kept to.

    `format` None: beton where `out` ends in .beton, else webdataset. `size` 0 keeps the pixels as they are, and in
    webdataset the very files. `encode` None: raw pixels in a beton, JPEG in webdataset. JPEGs are of `quality` with
    full colour (4:4:4): at 256 pixels, halved colour would be seen, and learned. `num_workers` None: all cores.
    `progress` is called with "prepare" or "verify", the images done and their number.

    UsageError: settings that do not fit, or `out` was begun with others. RunError: a bad image (on_error="raise"), too
    many of them, a full disk, or what was written does not read back.
    """
    out = Path(out)
    job = _job(spec, out, format, size, encode, quality)
    for flag, value in (("--shard-size", shard_size), ("--num-workers", num_workers)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} is {value}; it must be at least 1")
    num_workers = num_workers or len(os.sched_getaffinity(0))
    source = open_images(spec, max(size, 1)).source
    settings = _settings(job, source, shard_size)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        ordered = stack.enter_context(workers(num_workers))

        def results(stretches: list[range]) -> Iterator[Encoded | str]:
            for some in ordered(_Encoder(job), parts(source, stretches)):
                yield from some

        task = Task(out, source, settings, shard_size, results, progress, spec.on_error == "raise")
        made = stack.enter_context(contextlib.closing((Beton if job.format == "beton" else Shards)(task)))
        made.write()
        seconds = time.monotonic() - started
        left_out = {source.describe(index): why for index, why in sorted(made.bad.items())}
        left_out |= getattr(source, "bad_files", {})  # what the shards of a source could not give
        bad_file = _list_bad(out, job.format, left_out)
        if len(left_out) > spec.max_bad_share * len(source):
            raise RunError(
                f"{len(left_out)} of {len(source)} images are bad, more than max_bad_share {spec.max_bad_share:g} "
                f"allows; see {bad_file}, then replace them and begin anew without {out}, or set --max-bad-share"
            )
        made.complete()
        labels = source.labels[[index for index in range(len(source)) if index not in made.bad]]
        if verify != "none":
            made.check_labels(labels)
            done = 0
            for count in ordered(verify_part, made.written(size, verify == "decode")):
                done += count
                if progress is not None:
                    progress("verify", done, len(labels))
    return PrepareSummary(
        num_images=len(labels),
        num_new=made.num_new,
        num_bytes=sum(path.stat().st_size for path in made.files()),
        classes=list(source.classes),
        bad=left_out,
        bad_file=bad_file,
        seconds=seconds,
    )


@dataclass(frozen=True)
class _Encoder:
    """encode_part for one job; it travels to the processes."""

    job: Job

    def __call__(self, part: Any) -> list[Encoded | str]:
        return encode_part(self.job, part)


def _job(spec: ImageDataSpec, out: Path, format: Format | None, size: int, encode: Encode | None, quality: int) -> Job:
    """The settings, checked."""
    is_beton = out.suffix == ".beton"
    format = format or ("beton" if is_beton else "webdataset")
    if is_beton != (format == "beton"):
        needed = "a name that ends in .beton" if format == "beton" else "a folder, whose name does not end in .beton"
        raise UsageError(f"{out} is not for --format {format}, which needs {needed}")
    if (out.is_file() and not is_beton) or (out.is_dir() and is_beton):
        raise UsageError(f"{out} is a {'folder' if is_beton else 'file'}; choose another name for the result")
    if size < 0:
        raise UsageError(f"--size is {size}; it must be at least 1 pixel, or 0 for images as they are")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality is {quality}; it must be from 1 to 100")
    refused = {"beton": "png", "webdataset": "raw"}[format]
    if encode == refused:
        raise UsageError(f"--encode is {encode}, which {format} cannot hold; set --encode jpeg or another --format")
    if format == "webdataset" and size == 0:
        if encode is not None:
            raise UsageError(f"--encode is {encode}, but --size 0 keeps the files of webdataset; leave out one of both")
        encode = "keep"
    chosen = encode or ("raw" if format == "beton" else "jpeg")
    return Job(spec, format, size, chosen, quality if chosen == "jpeg" else 0)


def _settings(job: Job, source: ImageSource, shard_size: int) -> dict[str, Any]:
    """Whatever the bytes of the result depend on."""
    digest = hashlib.sha256(source.labels.numpy().tobytes())
    root = str(Path(source.name))
    for index in range(len(source)):
        digest.update(source.describe(index).removeprefix(root).encode(errors="surrogateescape") + b"\n")
    settings = {
        "source": f"{len(source)} images, {digest.hexdigest()[:16]}",  # of names and labels; their folder may move
        "size": job.size,
        "encode": job.encode,
        "quality": job.quality,
    }
    return settings if job.format == "beton" else {**settings, "shard_size": shard_size}


def _list_bad(out: Path, format: Format, bad: dict[str, str]) -> Path | None:
    """Write the list of bad images, where there are any; its path."""
    path = out / BAD_FILE if format == "webdataset" else out.with_name(f"{out.name}.{BAD_FILE}")
    if bad:
        write_text(path, "".join(f"{place}\t{why}\n" for place, why in bad.items()))
        return path
    path.unlink(missing_ok=True)
    return None

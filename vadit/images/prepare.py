"""Images of any source -> one .beton, scaled once instead of in every epoch (`vadit prepare`).

Images are decoded with Pillow and scaled so that their short side is `size` by ADM's rule, and not cropped: a centre
crop or a random square of the result is a slice of it, with the very pixels that the source would give. The order is
that of the source. The same command goes on where it was stopped, and what it makes does not depend on where that was
or on the number of worker processes. Memory does not grow with the data set.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader

from vadit.config.data import Alpha, Exif, ImageDataSpec, PictureSpec
from vadit.images.backends import open_images
from vadit.images.formats import open_image, reason
from vadit.images.loader import ImageSource, most_bad
from vadit.images.sources.beton import BetonFile, BetonSource, EncodedImage
from vadit.images.sources.beton_writer import GOES_ON, PAGE_SIZE, BetonWriter, encode_image
from vadit.images.transforms import plan_crop, scale, to_rgb
from vadit.runtime.console import ProgressBar
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.files import refuse_other_settings, saved_file
from vadit.runtime.reading import ReadFault, no_memory

PART_IMAGES = 8  # images that a worker takes at a time; some MB of results
PARTS_AHEAD = 3  # parts per worker that may wait for the writer
VERIFY_IMAGES = 64

Out = TypeVar("Out")


@dataclass
class PrepareSummary:
    """What one call made."""

    num_images: int  # images in the result
    num_new: int  # those of them that this call made
    num_bytes: int  # size of the result
    classes: list[str]
    labels: Tensor  # of the images in the result, int64 (num_images,)
    bad: dict[str, str]  # place of each image that is left out -> why
    bad_file: Path | None  # where `bad` is written down
    images_per_s: float  # images made per second, without verifying


class Job(NamedTuple):
    """What becomes of each image."""

    size: int  # short side in pixels; 0: as it is
    encode: Literal["raw", "jpeg"]
    quality: int  # of JPEGs; 0 for raw pixels
    alpha: Alpha = PictureSpec.alpha
    exif: Exif = PictureSpec.exif


def prepare_images(
    spec: ImageDataSpec,
    out: str | Path,
    *,
    size: int = 256,
    encode: Literal["raw", "jpeg"] = "raw",
    quality: int = 95,
    num_workers: int | None = None,
    verify: bool = True,
) -> PrepareSummary:
    """Make `out` (NAME.beton) of the images that `spec` names; `spec.on_error` and `spec.max_bad_share` are kept to.

    `size` 0 keeps the pixels as they are. JPEGs are of `quality` with full colour (4:4:4): at 256 pixels, halved colour
    would be seen, and learned. `num_workers` None: all cores. `verify` reads everything back and decodes it.

    UsageError: settings that do not fit, or `out` was begun with others. RunError: a bad image (on_error="raise"), too
    many of them, a full disk, or what was written does not read back.
    """
    out = Path(out)
    if out.suffix != ".beton":
        raise UsageError(f"{out} is no name for the result; it must end in .beton")
    job = Job(size, encode, quality if encode == "jpeg" else 0, spec.alpha, spec.exif)
    num_workers = num_workers or len(os.sched_getaffinity(0))
    source = open_images(spec, max(size, 1)).source
    settings = _settings(job, source)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        num_new, writer = 0, None
        if out.exists():
            bad = _bad_of_finished(out, settings)
        else:
            writer = stack.enter_context(BetonWriter(out, max_samples=len(source), settings=settings))
            bad = writer.skipped
        if bad and spec.on_error == "raise":
            raise _refusal(source, *next(iter(bad.items())))
        if writer is not None:
            parts = _cut(range(writer.done, len(source)), PART_IMAGES)
            results = _in_order(lambda ids: encode_part(source, job, ids), parts, num_workers)
            stack.callback(results.close)
            bar = stack.enter_context(ProgressBar("prepare", len(source), done=writer.done))
            num_new = _append(writer, source, results, raises=spec.on_error == "raise", bar=bar)
        seconds = time.monotonic() - started
        left_out = {source.describe(int(index)): why for index, why in bad.items()}
        left_out |= getattr(source, "bad_files", {})  # what the shards of a source could not give
        bad_file = _list_bad(out, left_out)
        if len(left_out) > most_bad(spec.max_bad_share, len(source)):
            raise RunError(
                f"{len(left_out)} of {len(source)} images are bad, more than max_bad_share {spec.max_bad_share:g} "
                f"allows; see {bad_file}, then replace them and begin anew without {out}, or set --max-bad-share"
            )
        if writer is not None:
            writer.finish({"classes": source.classes, "settings": settings, "bad": bad})
    with saved_file(out.with_name(f"{out.name}.classes.json"), GOES_ON) as partial:
        partial.write_text(json.dumps(source.classes, indent=0) + "\n", encoding="utf-8")
    count = len(source) - len(bad)
    if verify:
        written, parts = BetonSource(out), _cut(range(count), VERIFY_IMAGES)
        problems = _in_order(lambda ids: verify_part(written, size, ids), parts, num_workers)
        with ProgressBar("verify", count) as bar:
            for ids, problem in zip(parts, problems, strict=True):
                if problem:
                    raise RunError(problem)
                bar.update(ids.stop)
    images_per_s = num_new / max(seconds, 1e-9)
    labels = source.labels[[index for index in range(len(source)) if str(index) not in bad]]
    return PrepareSummary(count, num_new, out.stat().st_size, source.classes, labels, left_out, bad_file, images_per_s)


def _settings(job: Job, source: ImageSource) -> dict[str, Any]:
    """Whatever the bytes of the result depend on."""
    digest = hashlib.sha256(source.labels.numpy().tobytes())
    # of a pattern's shards, what comes before its numbers is the part that may move with them
    root = str(Path(source.name)) if Path(source.name).exists() else source.name.partition("{")[0]
    for index in range(len(source)):
        digest.update(source.describe(index).removeprefix(root).encode(errors="surrogateescape") + b"\n")
    return {
        "source": f"{len(source)} images, {digest.hexdigest()[:16]}",  # of names and labels; their folder may move
        **job._asdict(),
    }


def _bad_of_finished(out: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The images that a finished file does without; UsageError where it was made with other settings."""
    notes = BetonFile(out).notes
    if "settings" not in notes:
        raise UsageError(f"{out} is there, and not from vadit prepare; choose another name")
    kept = {"alpha": PictureSpec.alpha, "exif": PictureSpec.exif} | notes["settings"]  # of before there was a choice
    refuse_other_settings(out, "images", kept, settings, "set it as it was, or choose another name")
    bad: dict[str, str] = notes["bad"]
    return bad


def _append(
    writer: BetonWriter,
    source: ImageSource,
    results: Iterator[list[EncodedImage | str | ReadFault]],
    *,
    raises: bool,
    bar: ProgressBar,
) -> int:
    """Write what is missing, from the last whole page on; the number of images that were written."""
    first, index = writer.num_samples, writer.done
    for part in results:
        for result in part:
            if isinstance(result, ReadFault):
                raise result
            if not isinstance(result, str):
                writer.append(result, int(source.labels[index]))
            elif raises:
                raise _refusal(source, index, result)
            else:
                writer.skip(str(index), result)
            index += 1
        bar.update(index)
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


def encode_part(source: ImageSource, job: Job, ids: range) -> list[EncodedImage | str | ReadFault]:
    """Some images, or why they cannot be had; a fault that is not theirs comes last."""
    results: list[EncodedImage | str | ReadFault] = []
    for index in ids:
        try:
            results.append(encode_file(source.read(index), job))
        except (ReadFault, MemoryError) as error:
            return [*results, error if isinstance(error, ReadFault) else no_memory(source.describe(index))]
        except RunError as error:
            results.append(str(error))
        except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
            results.append(" ".join(reason(error).split()))
    return results


def encode_file(data: bytes, job: Job) -> EncodedImage:
    """An image file's bytes as they will be stored; raises whatever Pillow raises, ValueError where it does not fit.

    Every image is decoded, also a JPEG that is kept as it is.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        image = open_image(data)
        rgb = to_rgb(image, job.alpha, job.exif)
        is_plain_jpeg = image.format == "JPEG" and rgb is image
    if job.size:
        rgb = scale(rgb, plan_crop("center", *rgb.size, job.size))
    if job.encode == "jpeg" and not job.size and is_plain_jpeg:
        stored = EncodedImage("jpg", *rgb.size, data)  # no second loss
    else:
        stored = encode_image(rgb, "jpg" if job.encode == "jpeg" else "raw", job.quality)
    if len(stored.data) > PAGE_SIZE:
        raise ValueError(f"{len(stored.data)} bytes do not fit a page of a beton ({PAGE_SIZE}); set --encode jpeg")
    return stored


def verify_part(source: BetonSource, size: int, ids: range) -> str:
    """Read images of a .beton back (that compares their checksums), and decode them; what is wrong, if anything is."""
    for index in ids:
        try:
            sides = open_image(source.read(index)).size
        except RunError as error:
            return str(error)
        except Exception as error:  # Pillow's decoders raise almost any type
            return f"{source.describe(index)} was written but does not decode ({reason(error)}); remove it"
        if size and min(sides) != size:
            return f"{source.describe(index)} has {sides[0]} x {sides[1]} pixels, not {size}; remove it"
    return ""


def _cut(ids: range, count: int) -> list[range]:
    """Parts of `count` ids in a row, the last one of fewer."""
    return [ids[start : start + count] for start in range(0, len(ids), count)]


def _in_order(function: Callable[[range], Out], parts: list[range], num_workers: int) -> Generator[Out, None, None]:
    """A map over so many processes (1: none besides this one) that keeps the order and runs a little ahead."""
    if num_workers == 1:
        yield from map(function, parts)
        return
    loader: DataLoader[Out] = DataLoader(
        parts,  # type: ignore[arg-type]  # a list is a data set, too
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PARTS_AHEAD,
        collate_fn=function,  # type: ignore[arg-type]  # called in the workers
        multiprocessing_context="fork",  # they share the source, whose paths may be millions
        worker_init_fn=_start_worker,
    )
    try:
        yield from loader
    except RuntimeError as error:
        raise RunError(
            f"a process of vadit prepare was killed, perhaps for want of memory ({first_line(error)}); lower "
            "--num-workers (the same command goes on where it was)"
        ) from error


def _start_worker(_: int) -> None:
    """Each ends with its parent: torch's own end hangs where the parent was killed and its pipe is full."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="vadit-follow", daemon=True).start()

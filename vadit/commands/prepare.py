"""vadit prepare: images in a form that loads faster."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional

from vadit.commands.common import image_data
from vadit.config import ImageDataSpec, PictureSpec
from vadit.config.ranges import PathName, Range, Share, Workers
from vadit.runtime.files import check_output

NAMED_BAD = 10


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PictureSpec):
    """Scale images once and write them as one .beton; the same command goes on where it stopped."""

    images: Positional[PathName]
    """Images: a folder (one subfolder per class, or flat), a folder or pattern of .tar shards, or a .beton."""
    out: Positional[PathName]  # Result: NAME.beton.
    size: Annotated[int, Range(0, 16_384)] = 256
    """Short side in pixels, by the rule of the centre crop; nothing is cut off. 0: images as they are."""
    encode: Literal["raw", "jpeg"] = "raw"  # raw: pixels (exact, 0.2 MB at 256 x 256); jpeg: 4:4:4.
    quality: Annotated[int, Range(1, 100)] = 95  # Of JPEGs.
    num_workers: Workers | None = None  # Processes that decode and encode; default: all cores.
    labels_file: PathName | None = None  # File with a line "NAME LABEL" per image of a flat folder.
    on_error: Literal["raise", "skip"] = "skip"
    """What to do with an image that does not decode: stop and name it, or leave it out and list it."""
    max_bad_share: Share = ImageDataSpec.max_bad_share
    """With --on-error skip: the share of bad images above which the command fails at its end."""
    verify: bool = True  # Read everything back at the end and decode it.


def run(options: PrepareOptions) -> None:
    from rich.filesize import decimal

    from vadit.images.loader import describe_classes
    from vadit.images.prepare import prepare_images
    from vadit.runtime.console import say

    check_output("OUT", options.out, folder=False)
    settings = {name: getattr(options, name) for name in ("size", "encode", "quality", "num_workers", "verify")}
    summary = prepare_images(image_data(options), options.out, **settings)
    for place, why in list(summary.bad.items())[:NAMED_BAD]:
        say(f"left out: {place}: {why}")
    if summary.bad:
        say(f"{len(summary.bad):,} bad images are left out; {summary.bad_file} lists them")
    say(describe_classes(summary.classes, summary.labels))
    say(
        f"{options.out}: {summary.num_images:,} images, {decimal(summary.num_bytes)} "
        f"({decimal(summary.num_bytes // max(summary.num_images, 1))} each); {summary.num_new:,} made now, "
        f"{summary.images_per_s:,.1f} images/s; {'all decoded again' if options.verify else 'not verified'}"
    )

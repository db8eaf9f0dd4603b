"""Which source, which decoder, which loader: by path, by what is installed, and by what works here."""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch

from vadit.config import ImageDataSpec, PictureSpec
from vadit.images.formats import describe_unread, peek
from vadit.images.loader import Decoder, ImageBatch, ImageLoader, ImageSet, ImageSource, Request
from vadit.images.pillow import decode, pillow_decoder
from vadit.images.sources.beton import BetonSource
from vadit.images.sources.folders import DebugSource, FolderSource
from vadit.images.sources.page_order import PageOrder
from vadit.images.sources.tar import TarSource
from vadit.images.transforms import turn_of
from vadit.runtime import launcher
from vadit.runtime.choices import Choice
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.reading import ReadFault
from vadit.runtime.spread import spread
from vadit.runtime.stream import PositionedLoader, debug_count
from vadit.runtime.walk import visible

SETTING = "data.loader"
SURVEYED = 1000  # pictures whose headers are looked at before a run, at most
TRIAL_IMAGES = 4
TRIAL_ERROR = 4.0
"""Largest root mean square difference, in levels of 255, between a decoder's pixels and Pillow's (36 dB)."""


def open_images(spec: ImageDataSpec, size: int) -> ImageSet:
    """The images that the settings name; `size` is the side in pixels that the network needs.

    A line each is printed of pictures that are left out by their format, and of what data.alpha and data.exif concern.
    """
    source = _open_source(spec, size)
    if launcher.place().rank == 0 and not isinstance(source, DebugSource):
        for line in filter(None, [describe_unread(getattr(source, "unread", {})), *survey(source, spec)]):
            note(f"{source.name} holds {line}")
    return ImageSet(source, size, spec.crop, spec.flip, spec.on_error, spec.max_bad_share, spec.alpha, spec.exif)


def survey(source: ImageSource, spec: PictureSpec) -> list[str]:
    """How many pictures, of SURVEYED by their headers, have transparency or an orientation, and what becomes of it."""
    looked, transparent, turned = spread(len(source), SURVEYED).tolist(), 0, 0
    for index in looked:
        try:
            image = peek(source.read(index))
            transparent += image.has_transparency_data
            turned += turn_of(image) is not None
        except ReadFault:
            raise
        except Exception:  # whoever decodes it will name it
            continue
    of = f"{len(looked):,} pictures" + (f" (looked at, of {len(source):,})" if len(looked) < len(source) else "")
    alpha = "dropped" if spec.alpha == "drop" else f"laid on {spec.alpha}"
    exif = "ignored" if spec.exif == "ignore" else "applied"
    found = {f"transparency: {alpha} (data.alpha)": transparent, f"EXIF's orientation: {exif} (data.exif)": turned}
    return [f"{count:,} of {of} with {what}" for what, count in found.items() if count]


def _open_source(spec: ImageDataSpec, size: int) -> ImageSource:
    if spec.path.startswith("debug:"):
        return DebugSource(debug_count(spec.path), size)
    if spec.labels_file is not None:
        return FolderSource(spec.path, spec.labels_file, on_error=spec.on_error)
    if spec.path.endswith(".beton"):
        return BetonSource(spec.path)
    if spec.path.endswith(".tar") or (Path(spec.path).is_dir() and visible(Path(spec.path), ".tar")):
        return TarSource(spec.path, on_error=spec.on_error)
    return FolderSource(spec.path)


def open_loader(
    spec: ImageDataSpec,
    images: ImageSet,
    batch_size: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    begun_with: str | None = None,
) -> tuple[PositionedLoader[ImageBatch], Choice]:
    """A loader of training batches, and which it is.

    `begun_with` is the loader of the run that is continued: `auto` stays with it, since any two loaders give pixels
    that are alike but not equal. UsageError where the settings ask for what cannot be had here.
    """
    choice = _pick(spec.loader, images, torch.device(device), begun_with)
    order = None
    if spec.order == "quasi_random":
        if not isinstance(images.source, BetonSource):
            raise UsageError(
                f"data.order quasi_random is for a .beton, and {images.source.name} is none; set --data.order random"
            )
        order = PageOrder(images.source)
    decoder = _decoder(choice.name, images, spec.num_workers, device)
    return ImageLoader(images, batch_size, seed, rank, world_size, decoder=decoder, order=order), choice


def open_decoder(
    name: str, images: ImageSet, num_workers: int, device: torch.device | str = "cpu"
) -> tuple[Decoder, Choice]:
    """A decoder for reading images in order, by the name of its loader."""
    choice = _pick(name, images, torch.device(device))
    return _decoder(choice.name, images, num_workers, device), choice


def _decoder(name: str, images: ImageSet, num_workers: int, device: torch.device | str) -> Decoder:
    if name == "dali":
        from vadit.images.dali import DaliDecoder

        return functools.partial(DaliDecoder, images, num_workers, device)
    if name == "ffcv":
        from vadit.images.ffcv import ffcv_decoder

        return ffcv_decoder(images, num_workers, device)
    return pillow_decoder(images, num_workers, device)


def _pick(wanted: str, images: ImageSet, device: torch.device, begun_with: str | None = None) -> Choice:
    """The loader, why it is this one, and what was wished instead and why it cannot be had."""
    if wanted != "auto":
        name, reason = wanted, "as the setting says"
    elif begun_with is not None:
        name, reason = begun_with, "the run began with it"
    elif isinstance(images.source, DebugSource):
        name, reason = "torch", "debug images need no decoder"
    else:
        name = "ffcv" if images.source.name.endswith(".beton") else "dali"
        reason = f"it is here, and it reads {images.source.name}"
    problem = ""
    if name == "dali":
        problem = _trial(images, device)
    elif name == "ffcv":
        from vadit.images.ffcv import why_not

        problem = why_not(images)
    if not problem:
        return Choice(SETTING, name, reason)
    if wanted != "auto":
        raise UsageError(
            f"the loader is set to {wanted}, but {problem}; set --loader torch or auto (vadit train: --data.loader)"
        )
    if begun_with is not None:
        return Choice(SETTING, "torch", "always there", refused=f"the run began with {begun_with}, but {problem}")
    return Choice(SETTING, "torch", f"not {name}: {problem}")


def _trial(images: ImageSet, device: torch.device) -> str:
    """What goes wrong where DALI decodes some images of the set, compared with Pillow."""
    expected: list[np.ndarray] = []
    requests: list[Request] = []
    for request in map(Request, spread(len(images), TRIAL_IMAGES).tolist()):
        with contextlib.suppress(RunError):  # the loader will meet it, and report it
            expected.append(decode(images, request))
            requests.append(request)
    if not requests:
        return ""
    try:
        with _decoder("dali", images, 1, device)() as decoder:
            decoded = decoder.submit(requests)()
    except Exception as error:  # a package that imports may still not run on this machine
        return f"it does not run here ({first_line(error)})"
    if decoded.failures:
        return f"it does not decode what Pillow does ({first_line(next(iter(decoded.failures.values())))})"
    differences = decoded.pixels.cpu().numpy().astype(np.float64) - np.stack(expected)
    worst = float(np.sqrt((differences**2).mean(axis=(1, 2, 3))).max())
    if worst > TRIAL_ERROR:
        return f"its pixels are not Pillow's here (root mean square difference {worst:.1f} of 255)"
    return ""

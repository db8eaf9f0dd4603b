"""Pictures of the page: samples by class beside real images, reconstructions, and how both changed over training."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vadit.config import ImageDataSpec
from vadit.config.files import load_run_config
from vadit.images.backends import open_images
from vadit.images.formats import open_image
from vadit.images.loader import load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import channels_last, read_png, read_tiles
from vadit.latents.shards import read_index
from vadit.report.page import SMALL, Row, Section, Tiles
from vadit.report.runs import PROJECT, Run, progress
from vadit.report.words import duration, sampler_words
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.npz_files import Npz
from vadit.runtime.reading import read_file
from vadit.runtime.spread import spread
from vadit.sampling.info import SamplingInfo, read_info
from vadit.sampling.write import noted_sampler

CLASSES = 12  # of a gallery, evenly spread over those that were sampled
SETS = 2  # of samples, the newest
EVALUATIONS = 5  # of a run: the first, the last, and between them
ACROSS = 8  # samples of a class or an evaluation
PAIRS = 24
_UNREADABLE = (UsageError, RunError, OSError)


def picture_sections(runs: Sequence[Run]) -> list[Section]:
    """What runs of one kind made, as far as it is there."""
    sections = []
    for run in runs:
        name = f"{run.name}: " if len(runs) > 1 else ""
        sections += [_by_class(run, npz, name, first=not n) for n, npz in enumerate(_sample_sets(run)[:SETS])]
        sections += _pairs(run, name) if run.kind == "tokenizer" else []
    return [*sections, *_over_training(runs)]


def _project(run: Run) -> list[Path]:
    """The folder of the project that a run is part of, where it is."""
    return [run.folder.parent] * (run.folder.resolve().name in PROJECT)


def _sample_sets(run: Run) -> list[Path]:
    """The samples.npz that were drawn into a generator's run or its project, the newest first."""
    places = [run.folder, *_project(run)] if run.kind == "dit" else []
    patterns = ("samples*/samples.npz", "samples*/*/samples.npz")
    found = {path for place in places for pattern in patterns for path in place.glob(pattern)}
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _by_class(run: Run, npz: Path, name: str, *, first: bool) -> Section:
    """A row for each class that was sampled, the first set beside real images of the class."""
    title = f"{name}{'Samples' if first else 'More samples'}"
    try:
        info, labels = read_info(run.folder), Npz(npz).array("labels", (None,), "iu")
        classes = np.unique(labels)
        shown = classes[spread(len(classes), CLASSES)].tolist()
        samples = {label: _samples(npz, np.flatnonzero(labels == label)[:ACROSS]) for label in shown}
    except _UNREADABLE as error:
        return Section(title, notes=[f"{npz.parent} could not be read: {error}."])
    notes, real = [], {}
    try:
        real = _real(run, info, shown, samples[shown[0]].shape[1]) if first else {}
    except _UNREADABLE as error:
        notes.append(f"Real images are not shown: {error}.")
    few = f" {len(shown)} of {len(classes):,} classes." if len(shown) < len(classes) else ""
    rows = []
    for label, images in samples.items():
        beside = [Tiles("your images", real.get(label, images[:0]))] if real else []
        rows.append(Row(info.class_name(label), [*beside, Tiles("samples", images)]))
    sampler = noted_sampler(npz)
    text = f"The first samples of each class{': ' + sampler_words(sampler) if sampler else ''}.{few}"
    return Section(title, gallery=rows, text=text, notes=notes)


def _samples(npz: Path, indices: np.ndarray) -> np.ndarray:
    images = [read_png(npz.parent / "images" / f"{index:06d}.png") for index in indices]
    return np.stack(images if images[0].shape[0] <= SMALL else images[:5])


def _real(run: Run, info: SamplingInfo, labels: Sequence[int], side: int) -> dict[int, np.ndarray]:
    """Images (N, side, side, 3) that the latents were made of, by label; by name where it has one."""
    images = open_images(_image_data(run, info), side)
    names, count, found = images.source.classes, 4 if side <= SMALL else 3, {}
    with pillow_decoder(images, 1)() as decoder:
        for label in labels:
            name = info.class_name(label)
            place = names.index(name) if name in names else label
            here = np.flatnonzero(images.source.labels.numpy() == place)
            ids = here[spread(len(here), count)].tolist()
            for batch in load_in_order(images, ids, count, decoder):
                found[label] = channels_last(batch.images).numpy()
    return found


def _image_data(run: Run, info: SamplingInfo) -> ImageDataSpec:
    """Where the images are: as the tokenizer's training found them, or else as the latents name them."""
    data: Any = None
    with contextlib.suppress(*_UNREADABLE):
        data = load_run_config(info.tokenizer or "").data
    if not isinstance(data, ImageDataSpec):
        index = read_index(Path(run.config.data.path)) if run.config else None
        if index is None or index.settings is None:
            raise UsageError("nothing says which images its latents were made of")
        data = ImageDataSpec(path=index.settings.source)
    return data


def _pairs(run: Run, name: str) -> Iterator[Section]:
    """Originals above their reconstructions: of a project's held-out images, or of the last evaluation."""
    held_out = [path for folder in _project(run) if (path := folder / "reconstructions.png").is_file()]
    for path in [*held_out, *(path for _, path in reversed(run.grids))]:
        if (tiles := _tiles(run, path, PAIRS)) is not None and len(tiles) > 1:
            which = "Images that no network was trained on" if path in held_out else "Images of training"
            row = Row("", [Tiles("images, each above its reconstruction", tiles)])
            text = f"{which}, and below each what the tokenizer makes of it."
            yield Section(f"{name}Reconstructions", gallery=[row], text=text)
            return


def _over_training(runs: Sequence[Run]) -> Iterator[Section]:
    """The pictures of evaluations, a row each."""
    rows, notes = [], []
    what, same = ("Samples", "noise and classes") if runs[0].kind != "tokenizer" else ("Reconstructions", "images")
    for run in runs:
        whole = [(seen, tiles) for seen, path in run.grids if (tiles := _tiles(run, path, ACROSS)) is not None]
        if missing := len(run.grids) - len(whole):
            notes.append(f"{run.name}: {missing} pictures are gone or damaged.")
        now = progress(run)
        for seen, tiles in (whole[number] for number in spread(len(whole), EVALUATIONS)):
            spent = duration(float(np.interp(seen, [0, *now.hours.x], [0, *now.hours.y]))) if now else ""
            title = f"{run.name}, {seen:,.0f} images" if len(runs) > 1 else f"{seen:,.0f} images"
            rows.append(Row(f"{title}\n{spent}".strip(), [Tiles(f"the same {same} each time", tiles)]))
    if rows or notes:
        yield Section(f"{what} over training", gallery=rows, notes=notes)


def _tiles(run: Run, path: Path, limit: int) -> np.ndarray | None:
    """The first tiles of a picture, or all of it as one; None where it is missing, too large, or damaged."""
    try:
        image = open_image(read_file(path))
    except Exception:  # of whatever kind: Pillow's decoders raise almost any
        return None
    tiles = read_tiles(image, limit)
    if tiles is not None and run.kind == "tokenizer":
        half = tiles.shape[1] // 2 - 1
        tiles[:, half:-half] = 128  # the gap of a pair, for a light page and a dark one
    return np.asarray(image.convert("RGB"))[None] if tiles is None else tiles

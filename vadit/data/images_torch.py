"""Images from a folder: Pillow decodes in threads (it releases the interpreter's lock), nothing else is needed."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vadit import rng
from vadit.config import ImageDataSpec
from vadit.data.stream import PREFETCH_BATCHES, PositionedLoader, debug_count, sample_ids
from vadit.data.transforms import center_crop, random_crop, random_resized_crop, to_chw, to_rgb
from vadit.errors import RunError, UsageError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DEBUG_CLASSES = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageBatch:
    """A batch as the loaders hand it out."""

    images: Tensor
    """uint8 (B, 3, H, W)."""
    labels: Tensor
    """int64 (B,): index into `classes`."""
    ids: Tensor
    """int64 (B,): index of the image in the data set."""


class ImageSource(Protocol):
    """What loaders and `vadit encode` need of a set of images."""

    source: str
    size: int
    classes: list[str]
    labels: Tensor
    on_error: Literal["raise", "skip"]
    bad_files: dict[str, str]

    def __len__(self) -> int: ...

    def load(self, index: int, *, seed: int, epoch: int) -> np.ndarray: ...

    def load_plain(self, index: int) -> np.ndarray: ...


class ImageFolder:
    """Images of one folder: a subfolder per class (label = rank of its name in sorted order), or flat (label 0).

    `.classes` names the labels, `.labels` is int64 (n,), `.paths` the files, sorted. `.bad_files` maps the path of each
    image that did not decode to the reason (on_error="skip").
    """

    def __init__(
        self,
        path: str | Path,
        size: int,
        crop: Literal["center", "random", "random_resized"] = ImageDataSpec.crop,
        flip: bool = ImageDataSpec.flip,
        on_error: Literal["raise", "skip"] = ImageDataSpec.on_error,
    ) -> None:
        self.source = str(path)
        self.size = size
        self.crop = crop
        self.flip = flip
        self.on_error = on_error
        self.bad_files: dict[str, str] = {}
        if not self.source:
            raise UsageError("data.path is empty; set --data.path to a folder of images")
        self.classes, self.paths, labels = _scan(Path(path))
        self.labels = torch.tensor(labels, dtype=torch.int64)
        Image.init()  # register all of Pillow's decoders before threads need them

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, *, seed: int, epoch: int) -> np.ndarray:
        """Image as a training sample, uint8 (3, size, size): crop and flip are functions of (seed, index, epoch).

        RunError names a file that does not decode.
        """
        crop_seed = rng.fold(seed, "crop", epoch, index)
        if self.crop == "random":
            pixels = self._decode(index, lambda image: random_crop(image, self.size, crop_seed))
        elif self.crop == "random_resized":
            pixels = self._decode(index, lambda image: random_resized_crop(image, self.size, crop_seed))
        else:
            pixels = self.load_plain(index)
        if self.flip and rng.uniform(rng.fold(seed, "flip", epoch), [index]).item() < 0.5:
            pixels = pixels[:, :, ::-1]
        return pixels

    def load_plain(self, index: int) -> np.ndarray:
        """Image under the centre crop and never mirrored, uint8 (3, size, size): for encoding and evaluation."""
        return self._decode(index, lambda image: center_crop(image, self.size))

    def _decode(self, index: int, crop: Callable[[Image.Image], Image.Image]) -> np.ndarray:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                image.load()  # now, while the file is open
                rgb = to_rgb(image)
            return to_chw(crop(rgb))
        except Exception as error:  # damaged data makes Pillow's decoders raise almost any type
            raise RunError(
                f"image {path} does not decode ({type(error).__name__}: {error}); "
                "replace or remove it, or leave it out with --on-error skip (vadit train: --data.on-error skip)"
            ) from error


class DebugImages:
    """`num_images` smooth random pictures, made on the fly from their index; labels go round DEBUG_CLASSES."""

    def __init__(self, num_images: int, size: int) -> None:
        self.source = f"debug:{num_images}"
        self.size = size
        self.classes = [str(label) for label in range(min(DEBUG_CLASSES, num_images))]
        self.labels = torch.arange(num_images) % DEBUG_CLASSES
        self.on_error: Literal["raise", "skip"] = "raise"
        self.bad_files: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, *, seed: int, epoch: int) -> np.ndarray:
        """uint8 (3, size, size); the same in every epoch."""
        return self.load_plain(index)

    def load_plain(self, index: int) -> np.ndarray:
        """uint8 (3, size, size)."""
        coarse = rng.normal(rng.fold(0, "debug images"), [index], (3, 4, 4))
        smooth = torch.nn.functional.interpolate(coarse, size=(self.size, self.size), mode="bilinear")[0]
        return (127.5 + 64 * smooth).clamp(0, 255).to(torch.uint8).numpy()


def open_images(spec: ImageDataSpec, size: int) -> ImageSource:
    """The images that the settings name; `size` is the side in pixels that the network needs."""
    if spec.path.startswith("debug:"):
        return DebugImages(debug_count(spec.path), size)
    return ImageFolder(spec.path, size, spec.crop, spec.flip, spec.on_error)


class ImageLoader(PositionedLoader[ImageBatch]):
    """Shuffled training batches of an image set; see PositionedLoader for order, position and ranks.

    on_error="skip": an image that does not decode gives its place to the next one of the epoch's order that does (a
    function of the position alone), is noted in the data set's `bad_files`, and a warning closes the iteration.
    """

    def __init__(
        self,
        dataset: ImageSource,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = ImageDataSpec.num_workers,
    ) -> None:
        super().__init__(len(dataset), batch_size, seed, rank, world_size, num_workers)
        self.dataset = dataset

    def _start(self, pool: ThreadPoolExecutor, positions: Tensor) -> Callable[[], ImageBatch]:
        futures: list[Future[tuple[int, np.ndarray]]] = []
        for epoch, ids in sample_ids(positions, self.num_samples, self.seed):
            places = (positions[len(futures) : len(futures) + len(ids)] - epoch * self.num_samples).tolist()
            futures += [
                pool.submit(self._load, index, place, epoch, self.seed)
                for index, place in zip(ids.tolist(), places, strict=True)
            ]

        def wait() -> ImageBatch:
            return _assemble(self.dataset, [future.result() for future in futures])

        return wait

    def _load(self, index: int, place: int, epoch: int, seed: int) -> tuple[int, np.ndarray]:
        order_seed = rng.fold(seed, "order", epoch)
        for step in range(self.num_samples):
            if step > 0:
                next_place = torch.tensor([(place + step) % self.num_samples])
                index = int(rng.permute(next_place, self.num_samples, order_seed)[0])
            try:
                return index, self.dataset.load(index, seed=seed, epoch=epoch)
            except RunError as error:
                _note_bad_file(self.dataset, index, error)
        raise RunError(f"none of the {self.num_samples} images of {self.dataset.source} decodes; set data.path anew")

    def _finish(self) -> None:
        warn_of_bad_files(self.dataset)


def load_in_order(
    dataset: ImageSource, ids: Sequence[int], batch_size: int, num_workers: int = ImageDataSpec.num_workers
) -> Iterator[ImageBatch]:
    """Centre-cropped, unmirrored batches of the given images, in order, each image once.

    Images that do not decode are left out (on_error="skip") or end the iteration with a RunError ("raise").
    """

    def load(index: int) -> tuple[int, np.ndarray] | None:
        try:
            return index, dataset.load_plain(index)
        except RunError as error:
            _note_bad_file(dataset, index, error)
            return None

    pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="vadit-data")
    pending: deque[list[Future[tuple[int, np.ndarray] | None]]] = deque()
    starts = iter(range(0, len(ids), batch_size))
    try:
        while True:
            for start in starts:
                pending.append([pool.submit(load, index) for index in ids[start : start + batch_size]])
                if len(pending) == PREFETCH_BATCHES:
                    break
            if not pending:
                return
            loaded = [future.result() for future in pending.popleft()]
            if good := [item for item in loaded if item is not None]:
                yield _assemble(dataset, good)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def warn_of_bad_files(dataset: ImageSource) -> None:
    """Log how many images did not decode, with the first ten names."""
    if dataset.bad_files:
        names = ", ".join(sorted(dataset.bad_files)[:10])
        logger.warning("%d images do not decode and were skipped: %s", len(dataset.bad_files), names)


def _note_bad_file(dataset: ImageSource, index: int, error: RunError) -> None:
    if dataset.on_error == "raise":
        raise error
    dataset.bad_files[_name(dataset, index)] = str(error)


def _name(dataset: ImageSource, index: int) -> str:
    return dataset.paths[index] if isinstance(dataset, ImageFolder) else str(index)


def _assemble(dataset: ImageSource, loaded: list[tuple[int, np.ndarray]]) -> ImageBatch:
    ids = torch.tensor([index for index, _ in loaded], dtype=torch.int64)
    images = torch.from_numpy(np.stack([pixels for _, pixels in loaded]))
    return ImageBatch(images=images, labels=dataset.labels[ids], ids=ids)


def _scan(root: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, image paths and their labels."""
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UsageError(
            f"data.path {root} {problem}; set --data.path (vadit encode and evaluate: --images) to a folder of images"
        )
    try:
        flat = [str(path) for path in sorted(root.iterdir()) if _is_image(path.name) and not path.is_dir()]
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        by_class = {folder.name: _walk(folder) for folder in folders}
    except OSError as error:
        raise UsageError(
            f"data.path {root} cannot be read ({error}); give read permission or set another folder"
        ) from None
    if not any(by_class.values()):
        if not flat:
            raise UsageError(f"data.path {root} holds no images ({' '.join(EXTENSIONS)}); set it to a folder of images")
        return ["all"], flat, [0] * len(flat)
    if flat:
        raise UsageError(
            f"data.path {root} holds images beside its class folders (such as {Path(flat[0]).name}); "
            "move them into a class folder"
        )
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise UsageError(f"data.path {root}: the class folder {empty[0]} holds no images; remove it, or fill it")
    paths = [path for members in by_class.values() for path in members]
    labels = [label for label, members in enumerate(by_class.values()) for _ in members]
    return list(by_class), paths, labels


def _walk(folder: Path) -> list[str]:
    """All images below a folder, sorted."""

    def fail(error: OSError) -> None:
        raise error

    found: list[str] = []
    for parent, _, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [os.path.join(parent, name) for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")

"""Images as files of a folder, and debug images that need no files."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from vadit.images.formats import EXTENSIONS, OTHER_EXTENSIONS, describe_unread
from vadit.images.sources.labels import GIVE_LABELS, LabelsFile
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.runtime.reading import read_file, readable
from vadit.runtime.walk import Tree, walk

logger = logging.getLogger(__name__)

DEBUG_CLASSES = 10
REMEDY = "replace or remove it, or leave it out with --on-error skip (vadit train: --data.on-error skip)"
SET_FOLDER = "set IMAGES of vadit prepare, --images of new, encode and evaluate, or --data.path of train"


class FolderSource:
    """Image files: a subfolder per class (label = rank of its name, see `in_order`), flat (label 0), or with labels.

    `.paths` are the files, sorted by class and name. With `labels_file` (see `LabelsFile`) the order is that of its
    lines, of names relative to the folder. One without its image is an error, or read in vain (on_error="skip").
    `.unread`: as `walk_pictures` counts.
    """

    def __init__(
        self, path: str | Path, labels_file: str | Path | None = None, *, on_error: Literal["raise", "skip"] = "raise"
    ) -> None:
        self.name = str(path)
        root = Path(path)
        if not self.name or not root.is_dir():
            raise UsageError(f"{self.name!r} is no folder; {SET_FOLDER} to a folder of images")
        tree, self.unread = walk_pictures(root)
        if labels_file is None:
            self.classes, self.paths, labels = _scan(root, tree, describe_unread(self.unread))
        else:
            there = set(tree.files())
            self.classes, self.paths, labels = _read_labels(root, there, Path(labels_file), on_error == "raise")
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        with readable(f"image {self.paths[index]}", REMEDY):
            return read_file(self.paths[index])

    def describe(self, index: int) -> str:
        return self.paths[index]


class DebugSource:
    """`num_images` smooth random pictures, made on the fly from their index; labels go round DEBUG_CLASSES."""

    def __init__(self, num_images: int, size: int) -> None:
        self.name = f"debug:{num_images}"
        self.size = size
        self.classes = [str(label) for label in range(min(DEBUG_CLASSES, num_images))]
        self.labels = torch.arange(num_images) % DEBUG_CLASSES

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """A picture of size x size pixels as PPM."""
        coarse = rng.normal(rng.fold(0, "debug images"), [index], (3, 4, 4))
        smooth = torch.nn.functional.interpolate(coarse, size=(self.size, self.size), mode="bilinear")[0]
        pixels = (127.5 + 64 * smooth).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        return ppm(self.size, self.size, pixels.contiguous().numpy().tobytes())

    def describe(self, index: int) -> str:
        return f"{self.name}:{index}"


def ppm(width: int, height: int, pixels: bytes) -> bytes:
    """RGB pixels, rows from the top, as the bytes of a PPM file."""
    return b"P6 %d %d 255\n" % (width, height) + pixels


def walk_pictures(root: Path) -> tuple[Tree, Counter[str]]:
    """The pictures below a folder that are read, and how many are not, by their endings: {"HEIC": 12, "AVIF": 2}."""
    tree, unread = walk(root, EXTENSIONS + OTHER_EXTENSIONS), Counter[str]()
    for folder, names in tree.folders.items():
        others = [name for name in names if name.lower().endswith(OTHER_EXTENSIONS)]
        unread.update(name.rpartition(".")[2].upper() for name in others)
        tree.folders[folder] = sorted(set(names).difference(others)) if others else names
    return tree, unread


def _scan(root: Path, tree: Tree, unread: str) -> tuple[list[str], list[str], list[int]]:
    unread = unread and f" ({unread})"
    by_class: dict[str, list[str]] = {}
    for folder, names in tree.folders.items():
        by_class.setdefault(folder.partition("/")[0], []).extend(os.path.join(root, folder, name) for name in names)
    flat = by_class.pop("")
    for link, place in tree.again.items():
        if "/" not in link and place not in ("", ".."):  # a class, but for links to the folder itself or one above
            raise UsageError(f"{root}: the class folder {link} is a link to {place}, which is read already; remove it")
    if not any(by_class.values()):
        if not flat:
            endings = " ".join(EXTENSIONS)
            raise UsageError(f"{root} holds no images ({endings}){unread}; {SET_FOLDER} to a folder of images")
        return ["all"], sorted(flat), [0] * len(flat)
    if flat:
        raise UsageError(
            f"{root} holds images beside its class folders (such as {Path(min(flat)).name}); "
            f"move them into a class folder, or give {GIVE_LABELS}"
        )
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise UsageError(f"{root}: the class folder {min(empty)} holds no images{unread}; remove it, or fill it")
    classes = in_order(by_class)
    paths = [path for name in classes for path in sorted(by_class[name])]
    return classes, paths, [label for label, name in enumerate(classes) for _ in by_class[name]]


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: by number where all are numbers, else by characters."""
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numeric else (0, name))


def _read_labels(root: Path, there: set[str], file: Path, all_needed: bool) -> tuple[list[str], list[str], list[int]]:
    listed = LabelsFile(file, lambda name: name.lower().endswith(EXTENSIONS) or os.path.isfile(root / name))
    paths = {name: os.path.join(root, name) for name in listed.lines}
    absent = {name for name, path in paths.items() if name not in there and not os.path.exists(path)}
    if absent and (all_needed or len(absent) == len(listed.lines)):
        name = next(name for name in listed.lines if name in absent)
        raise listed.refusal(
            f"names {name} in line {listed.lines[name]}, which is not in {root} ({len(absent)} of "
            f"{len(listed.lines)} images are not; --on-error skip leaves them out)"
        )
    if others := there - listed.lines.keys():
        logger.warning(
            "%s of the %s images in %s have no label in %s and are left out, such as %s",
            *(f"{len(others):,}", f"{len(there):,}", root, file, min(others)),
        )
    return listed.classes, list(paths.values()), listed.labels

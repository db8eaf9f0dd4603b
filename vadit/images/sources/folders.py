"""Images as files of a folder, and debug images that need no files."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vadit.images.formats import EXTENSIONS
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.reading import read_file

DEBUG_CLASSES = 10
MAX_CLASSES = 1_000_000
"""Largest label + 1 where classes have no names: a damaged label shall not make a list of billions."""
SET_FOLDER = "set --data.path (vadit encode and evaluate: --images)"
GIVE_LABELS = "--labels-file (of vadit encode and prepare; vadit train: --data.labels-file)"


class FolderSource:
    """Image files: a subfolder per class (label = rank of its name in sorted order), flat (label 0), or with labels.

    `.paths` are the files, sorted by class and name. With `labels_file` the order is that of its lines, "NAME LABEL"
    each, NAME relative to the folder; labels are integers from 0, or names, which are numbered in sorted order.
    """

    def __init__(self, path: str | Path, labels_file: str | Path | None = None) -> None:
        self.name = str(path)
        root = Path(path)
        if not self.name or not root.is_dir():
            raise UsageError(f"data.path {self.name!r} is no folder; {SET_FOLDER} to a folder of images")
        if labels_file is None:
            self.classes, self.paths, labels = _scan(root)
        else:
            self.classes, self.paths, labels = _read_labels(root, Path(labels_file))
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        try:
            return read_file(self.paths[index])
        except OSError as error:
            raise RunError(
                f"image {self.paths[index]} cannot be read ({error.strerror}); replace or remove it, "
                "or leave it out with --on-error skip (vadit train: --data.on-error skip)"
            ) from None

    def describe(self, index: int) -> str:
        """The file's path."""
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
        """Its name."""
        return f"{self.name}:{index}"


def ppm(width: int, height: int, pixels: bytes) -> bytes:
    """RGB pixels, rows from the top, as the bytes of a PPM file."""
    return b"P6 %d %d 255\n" % (width, height) + pixels


def _scan(root: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, image paths and their labels."""
    try:
        flat = [str(path) for path in sorted(root.iterdir()) if _is_image(path.name) and not path.is_dir()]
        folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        by_class = {folder.name: _walk(folder) for folder in folders}
    except OSError as error:
        raise UsageError(
            f"data.path {root} cannot be read ({error}); give read permission, or {SET_FOLDER} to another folder"
        ) from None
    if not any(by_class.values()):
        if not flat:
            raise UsageError(
                f"data.path {root} holds no images ({' '.join(EXTENSIONS)}); {SET_FOLDER} to a folder of images"
            )
        return ["all"], flat, [0] * len(flat)
    if flat:
        raise UsageError(
            f"data.path {root} holds images beside its class folders (such as {Path(flat[0]).name}); "
            f"move them into a class folder, or give {GIVE_LABELS}"
        )
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise UsageError(f"data.path {root}: the class folder {empty[0]} holds no images; remove it, or fill it")
    paths = [path for members in by_class.values() for path in members]
    labels = [label for label, members in enumerate(by_class.values()) for _ in members]
    return list(by_class), paths, labels


def _read_labels(root: Path, file: Path) -> tuple[list[str], list[str], list[int]]:
    """Class names, image paths and labels of a file with a line "NAME LABEL" (or "NAME,LABEL") per image.

    Labels stay as they are where all are integers from 0, else they are numbered in the sorted order of the names.
    """

    def refusal(problem: str) -> UsageError:
        return UsageError(f"data.labels_file {file}{problem}; correct it, or set another {GIVE_LABELS}")

    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise refusal(f" cannot be read ({error})") from None
    words: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        name, _, word = line.rpartition("," if "," in line else " ")
        if line and not (name.strip() and word.strip()):
            raise refusal(f", line {number}: {line!r} is not NAME LABEL or NAME,LABEL")
        if name.strip() in words:
            raise refusal(f" names {name.strip()} twice")
        if line:
            words[name.strip()] = word.strip()
    if not words:
        raise refusal(" names no images")
    classes = sorted(set(words.values()))
    rank = {name: label for label, name in enumerate(classes)}
    if all(word.isdecimal() for word in classes):
        rank = {word: int(word) for word in classes}
        largest = max(rank.values())
        if largest >= MAX_CLASSES:
            raise refusal(f" holds the label {largest}; the highest is {MAX_CLASSES - 1}: number the classes from 0")
        classes = [str(label) for label in range(largest + 1)]
    return classes, [str(root / name) for name in words], [rank[word] for word in words.values()]


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

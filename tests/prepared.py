"""What the tests of `vadit prepare` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_files import photo

from vadit.config import ImageDataSpec
from vadit.images.prepare import PrepareSummary, prepare_images

SIZE = 32
SHAPES = ((90, 70), (64, 200), (33, 32), (20, 30), (300, 260))


def fill(root: Path, count: int, kind: str = "png") -> Path:
    """Photographs of several shapes in three classes, one of them named later than the others in the alphabet."""
    for number in range(count):
        path = root / ("owl", "ant", "zebra")[number % 3] / f"{number:03d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = SHAPES[number % len(SHAPES)]
        photo(number, width, height).save(path)
    return root


def prepare(source: Path, out: Path, **settings: Any) -> PrepareSummary:
    spec_names = ("labels_file", "on_error", "max_bad_share")
    spec = {name: settings.pop(name) for name in spec_names if name in settings}
    spec.setdefault("on_error", "skip")
    defaults = {"size": SIZE, "num_workers": 1}
    return prepare_images(ImageDataSpec(path=str(source), **spec), out, **(defaults | settings))


def content(out: Path) -> dict[str, bytes]:
    """Every file that is part of the result."""
    return {path.name: path.read_bytes() for path in [out, *out.parent.glob(f"{out.name}.*")]}

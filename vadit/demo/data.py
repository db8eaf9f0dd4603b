"""The demo's pictures, out of packages that are installed anyway, written as an ordinary folder of PNGs.

digits: scikit-learn's scans of handwritten digits (Alpaydin & Kaynak 1998), 8x8, enlarged bicubically to 32x32.
photos: 32x32 crops of the photographs in scikit-image and scikit-learn; the class is the photograph.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from vadit.images.formats import open_image
from vadit.images.sources.folders import in_order
from vadit.runtime.files import whole_file
from vadit.runtime.reading import read_file

SIZE = 32  # side of the demo's images in pixels
PHOTOS = {
    "astronaut": ("skimage.data", "astronaut.png"), "chelsea": ("skimage.data", "chelsea.png"),
    "coffee": ("skimage.data", "coffee.png"), "rocket": ("skimage.data", "rocket.jpg"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"), "ihc": ("skimage.data", "ihc.png"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"), "retina": ("skimage.data", "retina.jpg"),
    "china": ("sklearn.datasets", "images/china.jpg"), "flower": ("sklearn.datasets", "images/flower.jpg"),
}  # fmt: skip
"""Package and file of each photograph."""
CROPS_PER_PHOTO = 300
HELD_OUT = 0.2  # share of the images that no network trains on


@dataclass(frozen=True)
class DemoData:
    """Pictures in memory, and those of training as a folder of PNGs, too, with one subfolder per class."""

    train: Path
    classes: list[str]
    train_images: np.ndarray  # uint8 (N, 32, 32, 3)
    train_labels: np.ndarray
    held_out_images: np.ndarray
    held_out_labels: np.ndarray


def prepare(folder: Path, kind: Literal["digits", "photos"]) -> DemoData:
    """Write the pictures under `folder` (once) and return them."""
    images, labels, classes = _digits() if kind == "digits" else _photos()
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    cut = int(len(images) * (1 - HELD_OUT))
    names = classes if classes == in_order(classes) else [f"{label}-{name}" for label, name in enumerate(classes)]
    data = DemoData(folder / "train", classes, images[:cut], labels[:cut], images[cut:], labels[cut:])
    if not folder.is_dir():
        with whole_file(folder) as partial:
            for part, start, stop in (("train", 0, cut), ("held_out", cut, len(images))):
                for index in range(start, stop):
                    target = partial / part / names[labels[index]] / f"{index:05d}.png"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(images[index]).save(target)
    return data


def _digits() -> tuple[np.ndarray, np.ndarray, list[str]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = [Image.fromarray(np.uint8(scan * (255 / 16))) for scan in bunch.images]
    large = [np.asarray(scan.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")) for scan in grey]
    return np.stack(large), bunch.target.astype(np.int64), [str(digit) for digit in range(10)]


def _photos() -> tuple[np.ndarray, np.ndarray, list[str]]:
    generator = np.random.default_rng(1)
    crops, labels = [], []
    for label, name in enumerate(PHOTOS):
        photo = photograph(name)
        # A crop of a quarter of the photograph's short side shows something that can be told apart.
        side = min(photo.size) // 4
        for _ in range(CROPS_PER_PHOTO):
            left, top = (int(generator.integers(0, full - side + 1)) for full in photo.size)
            crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            crops.append(np.asarray(crop))
            labels.append(label)
    return np.stack(crops), np.asarray(labels, np.int64), list(PHOTOS)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) to (N, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def photograph(name: str) -> Image.Image:
    """One of PHOTOS in RGB, from the wheels: none of these is a download."""
    package, file = PHOTOS[name]
    return open_image(read_file(Path(str(resources.files(package))) / file)).convert("RGB")

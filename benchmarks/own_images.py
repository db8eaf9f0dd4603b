"""The three commands of docs/own-images.md on photographs, and whether what they end with is not noise.

    python benchmarks/own_images.py [--size 64] [--minutes 18] [--per-class 60] [--keep FOLDER]

Photographs of scikit-image's and scikit-learn's wheels are cut into a folder of crops per photograph. Samples are
compared with other crops of the same photographs by the Frechet distance in features that nothing was trained on:
colours and gradients on a coarse grid, and fixed random convolutions. Noise of the pictures' colours and the pictures
themselves with their patches shuffled are compared in the same way. Row: results/own-images.csv.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import torch
import torch.nn.functional as F

from vadit.config import ImageDataSpec
from vadit.demo.data import PHOTOS, photograph
from vadit.eval.metrics import frechet_distance, mean_and_covariance
from vadit.images.backends import open_images
from vadit.images.loader import load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import to_signed
from vadit.runtime.npz_files import Npz

DOCUMENT = harness.HERE.parent / "docs" / "own-images.md"
SAMPLES = 400
PATCH = 4  # side of a shuffled patch in pixels


def commands() -> list[list[str]]:
    """The first block of commands in the document, by words."""
    (block, *_) = re.findall(r"```\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    lines = [part for line in block.splitlines() for part in line.split("#")[0].split("&&")]
    return [shlex.split(line) for line in lines if line.strip()]


def cut(folder: Path, per_class: int, seed: int) -> None:
    """Crops of a third of each photograph's short side, a subfolder per photograph."""
    generator = np.random.default_rng(seed)
    for name in PHOTOS:
        photo = photograph(name)
        side = min(photo.size) // 3
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            left, top = (int(generator.integers(0, full - side + 1)) for full in photo.size)
            photo.crop((left, top, left + side, top + side)).save(folder / name / f"{index:04}.jpg", quality=95)


def pixels(folder: Path, size: int) -> torch.Tensor:
    """The pictures of a folder as training sees them, uint8 (N, 3, size, size)."""
    images = open_images(ImageDataSpec(str(folder)), size)
    with pillow_decoder(images, 2)() as decoder:
        return torch.cat([batch.images for batch in load_in_order(images, range(len(images)), 64, decoder)])


def features(images: torch.Tensor) -> np.ndarray:
    """uint8 (N, 3, H, W) to (N, 73): colour, contrast, gradients and random convolutions on 3 scales from half on.

    Fine sharpness is left out: what is asked is whether there are shapes.
    """
    x = to_signed(images)
    parts = [F.adaptive_avg_pool2d(x, 2).flatten(1), x.std(dim=(2, 3)), x.mean(1).amax(dim=(1, 2))[:, None]]
    weights = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 27**0.5
    for factor in (2, 4, 8):
        scaled = F.avg_pool2d(x, factor)
        grey = scaled.mean(1)
        parts += [torch.stack([grey.diff(dim=dim).abs().mean(dim=(1, 2)) for dim in (1, 2)], dim=1)]
        parts += [grey.std(dim=(1, 2))[:, None], F.conv2d(scaled, weights).relu().mean(dim=(2, 3))]
    return torch.cat(parts, dim=1).double().numpy()


def distance(images: torch.Tensor, real: torch.Tensor) -> float:
    """Frechet distance of the features of two sets, each feature over its deviation in the real ones."""
    theirs = features(real)
    scale = theirs.std(axis=0) + 1e-6
    return frechet_distance(*mean_and_covariance(features(images) / scale), *mean_and_covariance(theirs / scale))


def noise(real: torch.Tensor) -> torch.Tensor:
    """Pixels of all pictures, each anywhere: the right colours and nothing else."""
    flat = real.permute(0, 2, 3, 1).reshape(-1, 3)
    shuffled = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))]
    return shuffled.reshape(len(real), *real.shape[2:], 3).permute(0, 3, 1, 2)


def shuffled_patches(real: torch.Tensor) -> torch.Tensor:
    """Each picture with its patches in another order."""
    count, _, side, _ = real.shape
    places = F.unfold(real.float(), PATCH, stride=PATCH)
    order = torch.rand(count, 1, places.shape[2], generator=torch.Generator().manual_seed(2)).argsort(-1)
    return F.fold(places.gather(2, order.expand_as(places)), (side, side), PATCH, stride=PATCH).to(torch.uint8)


def measure(folder: Path, *, size: int, minutes: float, per_class: int) -> dict[str, float]:
    """Run the document's commands in `folder`; distances of samples, noise and shuffled patches, and seconds."""
    cut(folder / "photos", per_class, seed=0)
    cut(folder / "others", per_class, seed=1)
    new, *rest = commands()
    sample = [*rest.pop(), "--num-samples", str(SAMPLES)]
    sizes = ["--size", str(size), "--minutes", str(minutes)]
    seconds = []
    environment = os.environ | {"PYTHONPATH": str(harness.HERE.parent)}
    for command in (new + sizes, *rest, sample):
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, cwd=folder, env=environment)
        seconds.append(time.monotonic() - started)
    real, other = pixels(folder / "photos", size), pixels(folder / "others", size)
    (drawn,) = (folder / "mine").rglob("samples.npz")
    images = torch.from_numpy(Npz(drawn).array("arr_0", (None, None, None, 3), "u")).permute(0, 3, 1, 2)
    sets = {"samples": images, "real": real, "noise": noise(real), "shuffled": shuffled_patches(real)}
    found = {name: round(distance(pictures, other), 3) for name, pictures in sets.items()}
    return found | {"seconds_new": round(seconds[0], 1), "seconds": round(sum(seconds), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=18)
    parser.add_argument("--per-class", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"size": options.size, "minutes": options.minutes, "per_class": options.per_class}
        found = measure(options.keep or Path(folder), **sizes)
    stamp = harness.stamp("cpu", ("../csrc", "../kernels", "../vadit"), "deepspeed")
    harness.append(harness.RESULTS / "own-images.csv", [stamp | sizes | found])
    print(found)
    if found["samples"] > min(found["noise"], found["shuffled"]) / 2:
        sys.exit("samples are no better than noise, or than shuffled patches")


if __name__ == "__main__":
    main()

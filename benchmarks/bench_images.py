"""Images per second of every image loader against torchvision's: python benchmarks/bench_images.py

    python benchmarks/bench_images.py [--num-images 2000] [--batch 64] [--size 256] [--workers 2] [--rounds 3]
        [--batches 12] [--only NAME ...] [--folder DIR] [--no-save]

The pictures are JPEGs of 500 x 375 (ImageNet's usual size), quality 90-95: random parts of the photographs in
scikit-image and scikit-learn. A contender hands out normalised float32 batches in random order: torchvision as
ImageFolder + DataLoader(Resize, CenterCrop, ToTensor, Normalize), ours as their uint8 batches through `to_signed`.

Contenders take turns. A turn opens the loader, waits for its first batch (that time is "first"; the first turn's
includes imports and FFCV's compiler), lets the queues fill for FILL batches and then times `--batches` of them, in a
steady state: as many batches are under way at the start as at the end. Rows go to
benchmarks/results/image-loaders-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import harness
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vadit.config import ImageDataSpec
from vadit.demo.data import PHOTOS, photograph
from vadit.images.backends import open_images, open_loader
from vadit.images.pixels import to_signed
from vadit.images.prepare import prepare_images

WIDTH, HEIGHT = 500, 375
FILL = 5
"""Batches that are not timed: every queue here holds fewer."""
BASELINE = "torchvision"

Stream = Callable[[], contextlib.AbstractContextManager[Iterator[Tensor]]]
"""Opens a loader; the iterator gives float32 batches (B, 3, S, S) for ever."""


@dataclass(frozen=True)
class Row(harness.Stamp):
    """One line of the CSV. Times of first batches in seconds, sizes in bytes."""

    num_images: int
    pixels: str
    batch: int
    size: int
    contender: str
    workers: int
    median_img_per_s: float
    q1_img_per_s: float
    q3_img_per_s: float
    ratio: float
    """To torchvision with as many workers."""
    cold_first_s: float
    """From opening the loader to its first batch, the first time in the process."""
    first_s: float
    """The same, median of the later rounds."""
    disk_bytes: int
    rounds: int


# ------------------------------------------------------------------------------------------------ pictures


def make_pictures(folder: Path, count: int) -> None:
    """`count` JPEGs in a folder per photograph, with all cores; a function of their number alone."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_make_photograph, PHOTOS, [folder] * len(PHOTOS), [count] * len(PHOTOS)))


def _make_photograph(name: str, folder: Path, count: int) -> None:
    photo = Image.fromarray(photograph(name)).convert("RGB")
    (folder / name).mkdir(parents=True)
    for number in range(PHOTOS.index(name), count, len(PHOTOS)):
        draw = random.Random(number)
        width = min(photo.width, photo.height * WIDTH / HEIGHT) * draw.uniform(0.6, 1.0)
        height = width * HEIGHT / WIDTH
        left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        picture = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        picture.save(folder / name / f"{number:05d}.jpg", quality=draw.randint(90, 95))


# ------------------------------------------------------------------------------------------------ contenders


def torchvision_stream(folder: Path, options: argparse.Namespace, workers: int) -> Stream:
    """What most training scripts do."""

    @contextlib.contextmanager
    def start() -> Iterator[Iterator[Tensor]]:
        from torchvision import datasets, transforms

        steps = [transforms.Resize(options.size), transforms.CenterCrop(options.size), transforms.ToTensor()]
        steps.append(transforms.Normalize([0.5] * 3, [0.5] * 3))
        dataset = datasets.ImageFolder(str(folder), transforms.Compose(steps))
        loader = DataLoader(dataset, options.batch, shuffle=True, num_workers=workers, drop_last=True)

        def batches() -> Iterator[Tensor]:
            while True:
                for images, _ in loader:
                    yield images

        stream = batches()
        yield stream
        stream.close()  # ends the workers

    return start


def our_stream(path: Path, options: argparse.Namespace, loader: str, workers: int) -> Stream:
    """One of vadit's loaders."""

    @contextlib.contextmanager
    def start() -> Iterator[Iterator[Tensor]]:
        spec = ImageDataSpec(path=str(path), loader=loader, num_workers=workers)  # type: ignore[arg-type]
        opened, _ = open_loader(spec, open_images(spec, options.size), options.batch)
        stream = opened.stream()
        yield (to_signed(batch.images) for batch in stream)
        stream.close()  # ends the threads

    return start


def contenders(pictures: Path, options: argparse.Namespace) -> dict[tuple[str, int], tuple[Stream, Path]]:
    """By name and workers: the stream, and what it reads."""
    workers = options.workers
    found = {
        (BASELINE, 0): (torchvision_stream(pictures, options, 0), pictures),
        (BASELINE, workers): (torchvision_stream(pictures, options, workers), pictures),
        ("torch", workers): (our_stream(pictures, options, "torch", workers), pictures),
    }
    if missing("nvidia.dali"):
        print("without dali: nvidia.dali is not installed (pip install 'vadit[dali]')")
    else:
        found["dali", workers] = (our_stream(pictures, options, "dali", workers), pictures)
    for encode in ("jpeg", "raw"):
        name = f"ffcv-{encode}"
        if missing("ffcv"):
            print(f"without {name}: ffcv is not installed (pip install 'vadit[ffcv]')")
            continue
        beton = pictures.with_name(f"{encode}-{options.size}.beton")
        if not beton.exists():
            started = time.perf_counter()
            prepare_images(ImageDataSpec(path=str(pictures)), beton, size=options.size, encode=encode, verify="none")
            print(f"{beton.name}: made in {time.perf_counter() - started:.1f} s")
        found[name, workers] = (our_stream(beton, options, "ffcv", workers), beton)
        if encode == "raw":
            found["torch-raw", workers] = (our_stream(beton, options, "torch", workers), beton)
    return {key: value for key, value in found.items() if not options.only or key[0] in options.only}


def missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


# ------------------------------------------------------------------------------------------------ timing


def turn(stream: Stream, options: argparse.Namespace) -> tuple[float, float]:
    """(images per second, seconds to the first batch)."""
    started = time.perf_counter()
    with stream() as batches:
        shape = next(batches).shape
        first = time.perf_counter() - started
        assert shape == (options.batch, 3, options.size, options.size), f"a batch has the shape {tuple(shape)}"
        for _ in range(FILL):
            next(batches)
        started = time.perf_counter()
        for _ in range(options.batches):
            next(batches)
        return options.batch * options.batches / (time.perf_counter() - started), first


def disk_bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def versions() -> str:
    parts = [f"torch {torch.__version__}"]
    for name in ("torchvision", "pillow", "nvidia-dali-cuda130", "ffcv"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            parts.append(f"{name} {metadata.version(name)}")
    return ", ".join(parts)


def measure(pictures: Path, options: argparse.Namespace) -> list[Row]:
    """All rounds."""
    found = contenders(pictures, options)
    speeds: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    firsts: dict[tuple[str, int], list[float]] = {key: [] for key in found}
    for number in range(options.rounds):
        for key, (stream, _) in found.items():
            speed, first = turn(stream, options)
            speeds[key].append(speed)
            firsts[key].append(first)
        done = "  ".join(f"{name}/{workers} {speeds[name, workers][-1]:.0f}" for name, workers in found)
        print(f"round {number + 1}: {done}", flush=True)
    medians = {key: statistics.median(values) for key, values in speeds.items()}
    rows = []
    for (name, workers), values in speeds.items():
        q1, median, q3 = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        rows.append(
            Row(
                date=datetime.date.today().isoformat(),
                commit=harness.commit("../vadit/images", "../benchmarks/*.py"),
                hardware=f"{harness.hardware('cpu')}, {len(os.sched_getaffinity(0))} cores",
                versions=versions(),
                num_images=options.num_images,
                pixels=f"{WIDTH}x{HEIGHT}",
                batch=options.batch,
                size=options.size,
                contender=name,
                workers=workers,
                median_img_per_s=round(median, 1),
                q1_img_per_s=round(q1, 1),
                q3_img_per_s=round(q3, 1),
                ratio=round(median / medians[BASELINE, workers], 2) if (BASELINE, workers) in medians else float("nan"),
                cold_first_s=round(firsts[name, workers][0], 3),
                first_s=round(statistics.median(firsts[name, workers][1:] or firsts[name, workers]), 3),
                disk_bytes=disk_bytes(found[name, workers][1]),
                rounds=len(values),
            )
        )
    return rows


def show(rows: list[Row]) -> None:
    print(f"{'contender':12} workers    img/s  ratio  first batch: cold, warm [s]  MB on disk")
    for row in rows:
        print(
            f"{row.contender:12} {row.workers:7} {row.median_img_per_s:8.0f} {row.ratio:6.2f}"
            f" {row.cold_first_s:19.2f} {row.first_s:6.2f} {row.disk_bytes / 1e6:13.0f}"
        )


def save(rows: list[Row]) -> None:
    """Append to the file of this hardware."""
    harness.append(harness.RESULTS / f"image-loaders-{harness.hardware('cpu')}.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=12, help="batches timed in a turn")
    parser.add_argument("--only", nargs="*", help="names of contenders; all if left out")
    parser.add_argument("--folder", type=Path, help="keeps pictures and betons for the next run")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        pictures = folder / f"pictures-{options.num_images}"
        if not pictures.exists():
            make_pictures(pictures, options.num_images)
        rows = measure(pictures, options)
    show(rows)
    if not options.no_save:
        save(rows)


if __name__ == "__main__":
    main()

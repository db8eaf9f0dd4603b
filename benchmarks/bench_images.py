"""Images per second of every image loader against torchvision's: python benchmarks/bench_images.py

The pictures are JPEGs of 500 x 375 (ImageNet's usual size), quality 90-95: random parts of the photographs in
scikit-image and scikit-learn. They are read as three sets of files, and speeds are compared within a set:

- "500x375": the pictures themselves, which are scaled in every epoch;
- "scaled": the same scaled once by `vadit prepare` to JPEGs of the side that is wanted; in a folder, and as the very
  same bytes in a .beton, which FFCV reads;
- "raw": their pixels in a .beton, which torchvision cannot read.

A contender hands out normalised float32 batches in random order: torchvision as ImageFolder + DataLoader(Resize,
CenterCrop, ToTensor, Normalize), ours as uint8 batches through `to_signed`. Contenders take turns: open the loader,
wait for its first batch ("first"; the first turn's includes imports and FFCV's compiler), let the queues fill for FILL
batches, and time `--batches` of them in a steady state. Rows go to benchmarks/results/image-loaders-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

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
from vadit.images.sources.beton import BetonSource

WIDTH, HEIGHT = 500, 375
FILL = 5  # Batches that are not timed: every queue here holds fewer.
BASELINE = "torchvision"

Key = tuple[str, str, int]  # Set of files, contender, workers.
Stream = Callable[[], contextlib.AbstractContextManager[Iterator[Tensor]]]
"""Opens a loader; the iterator gives float32 batches (B, 3, S, S) for ever."""


Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------ files


def make_photographs(name: str, folder: Path, count: int) -> None:
    """The pictures that show one photograph, of `count` in all; a function of their number alone."""
    photo = photograph(name)
    (folder / name).mkdir(parents=True)
    for number in range(list(PHOTOS).index(name), count, len(PHOTOS)):
        draw = random.Random(number)
        width = min(photo.width, photo.height * WIDTH / HEIGHT) * draw.uniform(0.6, 1.0)
        height = width * HEIGHT / WIDTH
        left, top = draw.uniform(0, photo.width - width), draw.uniform(0, photo.height - height)
        box = (left, top, left + width, top + height)
        picture = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
        picture.save(folder / name / f"{number:05d}.jpg", quality=draw.randint(90, 95))


def make_sets(folder: Path, options: argparse.Namespace) -> dict[str, tuple[Path, Path | None]]:
    """By name: the folder of a set (of "raw" its .beton) and the .beton of the same files, where there is one."""
    pictures, scaled = folder / f"pictures-{options.num_images}", folder / f"scaled-{options.num_images}-{options.size}"
    if not pictures.exists():
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(make_photographs, PHOTOS, [pictures] * len(PHOTOS), [options.num_images] * len(PHOTOS)))
    raw, jpeg = (scaled.with_suffix(f".{kind}.beton") for kind in ("raw", "jpeg"))
    for encode, path in (("raw", raw), ("jpeg", jpeg)):
        spec = ImageDataSpec(path=str(pictures))
        prepare_images(spec, path, size=options.size, encode=encode, verify=False)  # type: ignore[arg-type]
    if not scaled.exists():
        source = BetonSource(jpeg)
        for index, label in enumerate(source.labels.tolist()):
            path = scaled / source.classes[label] / f"{index:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(index))
    return {f"{WIDTH}x{HEIGHT}": (pictures, None), "scaled": (scaled, jpeg), "raw": (raw, raw)}


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


def contenders(folder: Path, options: argparse.Namespace) -> dict[Key, tuple[Stream, Path]]:
    """The streams, and what they read."""
    found: dict[Key, tuple[Stream, Path]] = {}
    for name, (files, beton) in make_sets(folder, options).items():
        if files.is_dir():
            for workers in sorted({0, options.workers}):
                found[name, BASELINE, workers] = (torchvision_stream(files, options, workers), files)
        for loader, path in (("torch", files), ("dali", files if files.is_dir() else None), ("ffcv", beton)):
            if path is not None:
                found[name, loader, options.workers] = (our_stream(path, options, loader, options.workers), path)
    for loader, package in (("dali", "nvidia"), ("ffcv", "ffcv")):
        if importlib.util.find_spec(package) is None:
            print(f"without {loader}: {package} is not installed (pip install 'vadit[{loader}]')")
            found = {key: value for key, value in found.items() if key[1] != loader}
    return found


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


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """All rounds."""
    found = contenders(folder, options)
    turns: dict[Key, list[tuple[float, float]]] = {key: [] for key in found}
    for number in range(options.rounds):
        for key, (stream, _) in found.items():
            turns[key].append(turn(stream, options))
        print(f"round {number + 1} of {options.rounds} is done", flush=True)
    medians = {key: statistics.median(speed for speed, _ in values) for key, values in turns.items()}
    packages = ("torchvision", "pillow", "nvidia-dali-cuda130", "ffcv")
    stamp, rows = harness.stamp("cpu", ("../vadit/images", "../benchmarks/*.py"), *packages), []
    stamp["hardware"] += f", {len(os.sched_getaffinity(0))} cores"
    for (files, name, workers), values in turns.items():
        speeds, waits = zip(*values, strict=True)
        q1, median, q3 = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
        path = found[files, name, workers][1]
        stored = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        first = statistics.median(waits[1:] or waits)
        rows.append(stamp | {
            "num_images": options.num_images, "pixels": files, "batch": options.batch, "size": options.size,
            "contender": name, "workers": workers, "median_img_per_s": round(median, 1),
            "q1_img_per_s": round(q1, 1), "q3_img_per_s": round(q3, 1),
            # to torchvision with as many workers on the same set
            "ratio": round(median / medians.get((files, BASELINE, workers), float("nan")), 2),
            # from opening the loader to its first batch: the first time in the process, and the median later
            "cold_first_s": round(waits[0], 3), "first_s": round(first, 3),
            "disk_bytes": sum(file.stat().st_size for file in stored), "rounds": len(values),
        })  # fmt: skip
        print(f"{files:8} {name:12} {workers} {median:8.0f} img/s {rows[-1]['ratio']:6.2f}x {first:6.2f} s")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=256, help="side of the crops in pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=12, help="batches timed in a turn")
    parser.add_argument("--folder", type=Path, help="keeps the files for the next run")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(options.folder or Path(scratch), options)
    if not options.no_save:
        harness.append(harness.RESULTS / f"image-loaders-{harness.hardware('cpu')}.csv", rows)


if __name__ == "__main__":
    main()

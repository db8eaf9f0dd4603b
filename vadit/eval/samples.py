"""Samples against a reference: the whole of ADM's evaluation, from files to named numbers.

Samples are a folder of PNGs or an ADM .npz (`arr_0`, uint8 NHWC); the reference is an .npz with stored statistics
(`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), with images (`arr_0`), with both, or a folder of PNGs.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from vadit.errors import RunError, UsageError
from vadit.eval.inception import Inception
from vadit.eval.metrics import (
    Array,
    FeatureMoments,
    frechet_distance,
    inception_score,
    kid,
    mean_and_covariance,
    precision_recall,
)

_STORED = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")

REFERENCES_FOR_RECALL = 10_000
"""Reference images that precision and recall are taken against (ADM's files hold so many)."""


# ------------------------------------------------------------------------------------------ images on disk


class ImageSource(Protocol):
    """Images of one size on disk, read in order and in batches."""

    path: Path
    size: tuple[int, int]

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """Batches uint8 (B, H, W, 3) of the first `limit` images (default all), in file order."""
        ...


class PngFolder:
    """The PNGs under a folder, by number where their names are numbers, else by name."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = [file for file in self.path.rglob("*") if file.is_file()]
        lossy = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg")]
        if lossy:
            raise UsageError(f"{lossy[0]} is a JPEG, whose losses change every score; store images as PNG or .npz")
        self.files = sorted((file for file in files if file.suffix.lower() == ".png"), key=_file_order)
        if not self.files:
            raise UsageError(f"{self.path} holds no PNG files; name a folder of PNGs or an .npz with arr_0")
        height, width, _ = _read_png(self.files[0]).shape
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[np.ndarray]:
        files = self.files[:limit]
        for start in range(0, len(files), batch_size):
            images = [_read_png(file) for file in files[start : start + batch_size]]
            for file, image in zip(files[start:], images, strict=False):
                if image.shape[:2] != self.size:
                    raise UsageError(
                        f"{file} is {image.shape[1]}x{image.shape[0]} pixels, {self.files[0].name} is "
                        f"{self.size[1]}x{self.size[0]}; all images must have one size"
                    )
            yield np.stack(images)


class NpzImages:
    """`arr_0` of an ADM .npz, streamed: 50,000 images of 256 pixels are 9.8 GB and never in memory at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _npy_stream(self.path) as (_, shape, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise UsageError(f"{self.path}: arr_0 is {dtype} {shape}; needed: uint8 (N, H, W, 3)")
        self._count = shape[0]
        self.size = (shape[1], shape[2])

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[np.ndarray]:
        remaining = self._count if limit is None else min(limit, self._count)
        with _npy_stream(self.path) as (stream, _, _):
            while remaining:
                shape = (min(batch_size, remaining), *self.size, 3)
                try:
                    data = stream.read(math.prod(shape))
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise RunError(f"{self.path} is damaged ({error}); write it again") from None
                if len(data) != math.prod(shape):
                    raise RunError(f"{self.path}: arr_0 ends early, the file is truncated; write it again")
                yield np.frombuffer(data, np.uint8).reshape(shape).copy()
                remaining -= shape[0]


@contextmanager
def _npy_stream(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """The member arr_0.npy of an .npz, opened behind its header: (stream, shape, dtype)."""
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            stream = opened.enter_context(archive.open("arr_0.npy"))
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except KeyError:
            raise UsageError(f"{path} holds no arr_0; name an .npz with images uint8 (N, H, W, 3)") from None
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise RunError(f"{path} cannot be read as .npz ({error}); write it again") from None
        if fortran:
            raise UsageError(f"{path}: arr_0 is in Fortran order; store it in C order (np.ascontiguousarray)")
        yield stream, shape, dtype


def open_images(path: str | Path) -> ImageSource:
    """A folder of PNGs, what `vadit sample` wrote (its images/ lie beside a grid), or an .npz with arr_0."""
    path = Path(path)
    if path.is_dir():
        return PngFolder(path / "images" if (path / "images").is_dir() else path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name a folder of PNGs or an .npz with arr_0")
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise UsageError(f"{path} is a JPEG, whose losses change every score; name a folder of PNGs or an .npz")
    if path.suffix != ".npz":
        raise UsageError(f"{path} is neither a folder nor an .npz file; name a folder of PNGs or an .npz with arr_0")
    return NpzImages(path)


def _read_png(path: Path) -> np.ndarray:
    """A PNG as uint8 (H, W, 3); grey is repeated, which loses nothing."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "L"):
                raise UsageError(
                    f"{path} has pixel mode {image.mode}; needed: 8-bit RGB or grey without alpha or palette"
                )
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise RunError(f"{path} does not decode ({error}); draw this sample again") from None


def _file_order(path: Path) -> tuple[str, int, str]:
    """Folder by folder; 2.png before 10.png, so that the splits of the inception score are those of the indices."""
    return str(path.parent), int(path.stem) if path.stem.isdecimal() else -1, path.name


# ------------------------------------------------------------------------------------------ named numbers


def count_name(count: int) -> str:
    """50000 -> 50k, 1797 -> 1797."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


@dataclass(frozen=True)
class SampleMetrics:
    """ADM's five numbers; None where the reference holds too little for one."""

    num_samples: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None

    def named(self, sampler: str) -> dict[str, float]:
        """The numbers by names that carry count and sampler (`vadit.sample.sampler_name`): fid50k_euler250, ..."""
        values = {
            "fid": self.fid,
            "sfid": self.sfid,
            "is": self.inception_score,
            "precision": self.precision,
            "recall": self.recall,
        }
        ending = f"{count_name(self.num_samples)}_{sampler}"
        return {f"{name}{ending}": value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class FeatureMetrics:
    """The same distances in the features of another extractor than Inception (not comparable with published FID)."""

    num_real: int
    num_fake: int
    frechet: float
    kernel: float
    precision: float
    recall: float
    inception_score: float | None


def feature_metrics(
    features_real: Array, features_fake: Array, *, probabilities_fake: Array | None = None, k: int = 3, seed: int = 0
) -> FeatureMetrics:
    """Frechet and kernel distance, precision and recall of features (N, D) and (M, D) of any extractor.

    `probabilities_fake` (M, K), where the extractor is a classifier, adds the inception score in its classes.
    """
    frechet = frechet_distance(*mean_and_covariance(features_real), *mean_and_covariance(features_fake))
    subset = min(1000, len(features_real), len(features_fake))
    precision, recall = precision_recall(features_real, features_fake, k=k)
    return FeatureMetrics(
        num_real=len(features_real),
        num_fake=len(features_fake),
        frechet=frechet,
        kernel=kid(features_real, features_fake, subset_size=subset, seed=seed).mean,
        precision=precision,
        recall=recall,
        inception_score=None if probabilities_fake is None else inception_score(probabilities_fake),
    )


# ------------------------------------------------------------------------------------------ the evaluation


@dataclass(frozen=True)
class _Features:
    """What one pass over a set of images leaves: pool features (N, 2048) fp32, spatial moments, probabilities."""

    pool: np.ndarray
    spatial: FeatureMoments
    probabilities: np.ndarray


@dataclass(frozen=True)
class _Reference:
    """Moments of the reference, and its pool features for precision and recall where it has images."""

    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None
    features: np.ndarray | None


def evaluate_samples(
    samples: str | Path,
    reference: str | Path,
    *,
    inception_weights: str | Path | None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_samples: int | None = None,
) -> SampleMetrics:
    """ADM's evaluation of the first `num_samples` samples (default all) against a reference."""
    source = open_images(samples)
    count = len(source) if num_samples is None else num_samples
    if count > len(source):
        raise UsageError(
            f"{source.path} holds {len(source)} images, {count} were asked for; draw more or ask for fewer"
        )
    if count < 2:
        raise UsageError(f"{source.path}: the distances need at least 2 images, found {count}; draw more samples")
    extractor = Inception(inception_weights, device)
    wanted = _load_reference(Path(reference), extractor, batch_size)
    found = _extract(source, extractor, batch_size, count)
    precision, recall = (
        (None, None) if wanted.features is None else precision_recall(wanted.features, found.pool, device=device)
    )
    return SampleMetrics(
        num_samples=count,
        fid=frechet_distance(*wanted.pool, *mean_and_covariance(found.pool)),
        sfid=None if wanted.spatial is None else frechet_distance(*wanted.spatial, *found.spatial.result()),
        inception_score=inception_score(found.probabilities),
        precision=precision,
        recall=recall,
    )


def _extract(source: ImageSource, extractor: Inception, batch_size: int, limit: int | None = None) -> _Features:
    pool, probabilities, spatial = [], [], FeatureMoments()
    for images in source.batches(batch_size, limit):
        features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        pool.append(features.pool.cpu().numpy())
        probabilities.append(features.probabilities.cpu().numpy())
        spatial.update(features.spatial)
    return _Features(np.concatenate(pool), spatial, np.concatenate(probabilities))


def _load_reference(path: Path, extractor: Inception, batch_size: int) -> _Reference:
    """Stored statistics go before those of the images: ADM's files hold statistics of the whole data set."""
    stored = _load_statistics(path)
    if stored is not None and "arr_0" not in stored:
        return _Reference(_pair(stored, ""), _pair(stored, "_s") if "mu_s" in stored else None, None)
    source = open_images(path)
    if stored is None and len(source) < 2:
        raise UsageError(f"{path}: a reference needs at least 2 images, found {len(source)}; name a larger one")
    features = _extract(source, extractor, batch_size)
    if stored is None:
        pool, spatial = mean_and_covariance(features.pool), features.spatial.result()
    else:
        pool, spatial = _pair(stored, ""), _pair(stored, "_s") if "mu_s" in stored else features.spatial.result()
    # Spread over the set, not its first part: reference folders are often sorted by class.
    chosen = np.linspace(0, len(features.pool) - 1, min(len(features.pool), REFERENCES_FOR_RECALL)).round().astype(int)
    return _Reference(pool, spatial, features.pool[chosen])


def _load_statistics(path: Path) -> dict[str, np.ndarray | None] | None:
    """mu, sigma, mu_s, sigma_s of an .npz (and the key arr_0, unread, where it has images); None without mu."""
    if path.suffix != ".npz" or not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            if "mu" not in archive:
                return None
            return {name: None if name == "arr_0" else archive[name] for name in archive.files if name in _STORED}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} cannot be read as .npz ({error}); download or write it again") from None


def _pair(stored: dict[str, np.ndarray | None], ending: str) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = stored.get(f"mu{ending}"), stored.get(f"sigma{ending}")
    if mu is None or sigma is None:
        raise UsageError(f"the reference holds mu{ending} without sigma{ending}; both are needed")
    return mu, sigma

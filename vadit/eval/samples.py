"""Samples against a reference: the whole of ADM's evaluation, from files to named numbers.

Samples are a folder of PNGs or an ADM .npz (`arr_0`, uint8 NHWC); the reference is an .npz with stored statistics
(`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), with images (`arr_0`), with both, or a folder of PNGs. A number that
the reference holds too little for is left out, and nothing is told of a set that could not be read to its end.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadit.eval.image_files import ImageSource, open_images
from vadit.eval.inception import Inception
from vadit.eval.metrics import (
    Array,
    FeatureMoments,
    count_name,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    mean_kernel,
    precision_recall,
    squared_mmd,
)
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.runtime.files import whole_file
from vadit.runtime.spread import spread

_STORED = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")

REFERENCES_FOR_RECALL = 10_000
"""Reference images that precision and recall are taken against (ADM's files hold so many)."""
KID_SUBSET = 1000
"""Images of a subset of KID, or all where there are fewer."""

Summary = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, H, W) to one feature vector each, (B, D)."""


# ------------------------------------------------------------------------------------------ named numbers


@dataclass(frozen=True)
class SampleMetrics:
    """ADM's five numbers and two more; None where the reference holds too little for one, or nobody asked."""

    num_samples: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    kid: float | None = None
    """Mean over 100 subsets of 1,000 (of all, where there are fewer), not multiplied by 1,000."""
    fd_dinov2: float | None = None
    """Frechet distance in DINOv2 ViT-L/14 features of the class token (Stein et al. 2023)."""

    def named(self, sampler: str) -> dict[str, float]:
        """The numbers by names that carry count and sampler (`sampler_name`): fid50k_euler249_..."""
        values = {
            "fid": self.fid,
            "sfid": self.sfid,
            "is": self.inception_score,
            "precision": self.precision,
            "recall": self.recall,
            "kid": self.kid,
            "fd_dinov2_": self.fd_dinov2,
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
    subset = min(KID_SUBSET, len(features_real), len(features_fake))
    precision, recall = precision_recall(features_real, features_fake, k=k)
    return FeatureMetrics(
        num_real=len(features_real),
        num_fake=len(features_fake),
        frechet=frechet,
        kernel=kernel_distance(features_real, features_fake, subset_size=subset, seed=seed).mean,
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
    dinov2: Summary | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_samples: int | None = None,
) -> SampleMetrics:
    """ADM's evaluation of the first `num_samples` samples (default all) against a reference."""
    evaluator = SampleEvaluator(
        reference, inception_weights=inception_weights, dinov2=dinov2, device=device, batch_size=batch_size
    )
    return evaluator.evaluate(samples, num_samples=num_samples)


class SampleEvaluator:
    """ADM's evaluation against one reference, whose features are computed once, at the first set of samples.

    `dinov2` (`vadit.models.foundation.ImageSummary`) adds FD-DINOv2 against the reference's images.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        inception_weights: str | Path | None,
        dinov2: Summary | None = None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
    ) -> None:
        self._path, self._weights, self._dinov2 = Path(reference), inception_weights, dinov2
        self._device, self._batch_size = device, batch_size

    @functools.cached_property
    def _extractor(self) -> Inception:
        return Inception(self._weights, self._device)

    @functools.cached_property
    def _reference(self) -> _Reference:
        return _load_reference(self._path, self._extractor, self._batch_size)

    @functools.cached_property
    def _reference_summary(self) -> tuple[np.ndarray, np.ndarray]:
        assert self._dinov2 is not None, "the caller has looked"
        return _summary_moments(open_images(self._path).batches(self._batch_size), self._dinov2)

    def evaluate(self, samples: str | Path, *, num_samples: int | None = None, first: int = 0) -> SampleMetrics:
        """The numbers of `num_samples` samples from place `first` on (default all)."""
        source = open_images(samples)
        count = len(source) - first if num_samples is None else num_samples
        if first + count > len(source):
            raise UsageError(
                f"{source.path} holds {len(source)} images, {first + count} were asked for; draw more or ask for fewer"
            )
        if count < 2:
            raise UsageError(f"{source.path}: the distances need at least 2 images, found {count}; draw more samples")
        if self._dinov2 is not None and not _has_images(self._path):
            raise UsageError(f"{self._path} holds statistics alone; FD-DINOv2 needs the reference's images (arr_0)")
        extractor, wanted = self._extractor, self._reference
        found = _extract(source.batches(self._batch_size, count, first), extractor)
        if len(found.pool) != count:
            raise RunError(f"{len(found.pool)} of {count} images of {source.path} were read; nothing is told of a part")
        fid, kid = _distances(wanted, found.pool)
        precision, recall = (
            (None, None)
            if wanted.features is None
            else precision_recall(wanted.features, found.pool, device=self._device)
        )
        fd_dinov2 = None
        if self._dinov2 is not None:
            drawn = _summary_moments(source.batches(self._batch_size, count, first), self._dinov2)
            fd_dinov2 = frechet_distance(*self._reference_summary, *drawn)
        return SampleMetrics(
            num_samples=count,
            fid=fid,
            sfid=None if wanted.spatial is None else frechet_distance(*wanted.spatial, *found.spatial.result()),
            inception_score=inception_score(found.probabilities),
            precision=precision,
            recall=recall,
            kid=kid,
            fd_dinov2=fd_dinov2,
        )


class SampleScorer:
    """FID and KID of images in memory against one reference, for a look during training.

    At a small n FID is biased upwards and only comparable with itself at that n; its name carries n. KID is here the
    unbiased estimate from all pairs of images, not a mean over subsets: less noise, and a second instead of a minute.
    The reference's features are kept in the folder `cache`, where one is given, and read there the next time.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        inception_weights: str | Path | None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        cache: str | Path | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._extractor = Inception(inception_weights, device)
        file = (
            None
            if cache is None
            else Path(cache) / f"reference-{_key(Path(reference), Path(inception_weights or ''))}.npz"
        )
        kept = None if file is None else _read_kept(file)
        if kept is None:
            kept = _keep(_load_reference(Path(reference), self._extractor, batch_size), file)
        self._reference, self._own_kernel = kept

    def features(self, images: Tensor) -> Tensor:
        """Inception's pool features (B, 2048), on the CPU, of uint8 images (B, 3, H, W)."""
        return torch.cat([self._extractor.pool(part).cpu() for part in images.split(self._batch_size)])

    def score(self, features: Tensor, sampler: str) -> dict[str, float]:
        """Named numbers of features (N, 2048): fid1k_euler49_random and, where the reference has images, kid1k_..."""
        fid = frechet_distance(*self._reference.pool, *mean_and_covariance(features))
        theirs = self._reference.features
        kid = None if theirs is None else squared_mmd(theirs, features, self._own_kernel)
        ending = f"{count_name(len(features))}_{sampler}"
        return {f"fid{ending}": fid} | ({} if kid is None else {f"kid{ending}": kid})


def write_reference(
    out: str | Path,
    batches: Iterable[Tensor],
    *,
    num_images: int,
    inception_weights: str | Path | None,
    device: str | torch.device = "cpu",
    keep: int = REFERENCES_FOR_RECALL,
) -> Path:
    """Make a reference like ADM's of uint8 batches (B, 3, H, W), `num_images` in all: statistics and some images.

    mu, sigma, mu_s, sigma_s are of all images; arr_0 holds `keep` of them, evenly spread, in order.
    """
    extractor = Inception(inception_weights, device)
    places = {index: place for place, index in enumerate(spread(num_images, keep).tolist())}
    pool, spatial, count = FeatureMoments(), FeatureMoments(), 0
    images = np.zeros(0, np.uint8)
    for batch in batches:
        features = extractor(batch)
        pool.update(features.pool)
        spatial.update(features.spatial)
        pixels = batch.permute(0, 2, 3, 1).numpy()
        if count == 0:  # made once: 10,000 images of 256 pixels are 2 GB
            images = np.zeros((len(places), *pixels.shape[1:]), np.uint8)
        for index, image in enumerate(pixels, start=count):
            if index in places:
                images[places[index]] = image
        count += len(batch)
    if count != num_images:
        raise RunError(f"{num_images} images were promised, {count} came; the reference was not written")
    mu, sigma = pool.result()
    mu_s, sigma_s = spatial.result()
    out = Path(out)
    try:
        with whole_file(out) as partial, partial.open("wb") as stream:
            np.savez(stream, arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    except OSError as error:
        raise RunError(f"cannot write {out} ({write_fault(error)}); set --out to a place with room") from None
    return out


# ------------------------------------------------------------------------------------------ parts of it


def _distances(reference: _Reference, pool: np.ndarray) -> tuple[float, float | None]:
    """FID, and KID where the reference has images."""
    fid = frechet_distance(*reference.pool, *mean_and_covariance(pool))
    if reference.features is None:
        return fid, None
    subset = min(KID_SUBSET, len(pool), len(reference.features))
    return fid, kernel_distance(reference.features, pool, subset_size=subset).mean


def _key(reference: Path, weights: Path) -> str:
    """What tells one reference and network from another: names, sizes and times of change."""
    files = sorted(reference.rglob("*.png")) if reference.is_dir() else [reference]
    found = [
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in (*files, weights)
        if file.is_file()
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _keep(reference: _Reference, file: Path | None) -> tuple[_Reference, float | None]:
    """The reference with the kernel's mean over its own pairs, written to `file` where one is named."""
    own = None if reference.features is None else mean_kernel(reference.features)
    arrays: dict[str, Any] = {"mu": reference.pool[0], "sigma": reference.pool[1]}
    if reference.features is not None and own is not None:
        arrays |= {"features": reference.features, "own_kernel": np.array(own)}
    if file is not None:
        try:
            with whole_file(file) as partial, partial.open("wb") as stream:
                np.savez(stream, **arrays)
        except OSError as error:
            raise RunError(f"{file} cannot be written ({write_fault(error)}); make room there") from None
    return reference, own


def _read_kept(file: Path) -> tuple[_Reference, float | None] | None:
    """What `_keep` wrote; None where there is nothing, or nothing whole."""
    try:
        with np.load(file, allow_pickle=False) as kept:
            own, features = kept.get("own_kernel"), kept.get("features")
            return _Reference((kept["mu"], kept["sigma"]), None, features), None if own is None else float(own)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def _summary_moments(batches: Iterable[np.ndarray], summary: Summary) -> tuple[np.ndarray, np.ndarray]:
    moments = FeatureMoments()
    for images in batches:
        moments.update(summary(torch.from_numpy(images).permute(0, 3, 1, 2)))
    return moments.result()


def _extract(batches: Iterable[np.ndarray], extractor: Inception) -> _Features:
    pool, probabilities, spatial = [], [], FeatureMoments()
    for images in batches:
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
    source: ImageSource = open_images(path)
    if stored is None and len(source) < 2:
        raise UsageError(f"{path}: a reference needs at least 2 images, found {len(source)}; name a larger one")
    # Features of a million images would take tens of gigabytes: sums, and the few that are needed one by one.
    pool_moments, spatial_moments = FeatureMoments(), FeatureMoments()
    wanted, rows, count = spread(len(source), REFERENCES_FOR_RECALL), [], 0
    for images in source.batches(batch_size):
        found = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
        pool = found.pool.cpu().numpy()
        if stored is None:
            pool_moments.update(pool)
            spatial_moments.update(found.spatial)
        rows.append(pool[wanted[(wanted >= count) & (wanted < count + len(pool))] - count])
        count += len(pool)
    features = np.concatenate(rows)
    if stored is None:
        return _Reference(pool_moments.result(), spatial_moments.result(), features)
    # Without mu_s there is no sFID: that of the images alone would be of another set than the FID beside it.
    return _Reference(_pair(stored, ""), _pair(stored, "_s") if "mu_s" in stored else None, features)


def _has_images(path: Path) -> bool:
    stored = _load_statistics(path)
    return stored is None or "arr_0" in stored


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

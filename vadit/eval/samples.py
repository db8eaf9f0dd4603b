"""Samples against a reference: the whole of ADM's evaluation, from files to named numbers.

Samples are a folder of PNGs or an ADM .npz (`arr_0`, uint8 NHWC); the reference is an .npz with stored statistics
(`mu`, `sigma`, and `mu_s`, `sigma_s` for sFID), with images (`arr_0`), with both, or a folder of PNGs. A number that
the reference holds too little for is left out, and a set that could not be read to its end gets none.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vadit.config import ImageDataSpec
from vadit.eval import metrics
from vadit.eval.image_files import NpzImages, PngFolder, open_images
from vadit.eval.inception import Inception, provenance
from vadit.eval.metrics import IS_SPLIT, FeatureMoments
from vadit.images.loader import ImageSet, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.models.pretrained import compare_published
from vadit.runtime.console import counted, note_once
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import saved_file
from vadit.runtime.npz_files import Npz
from vadit.runtime.spread import spread
from vadit.runtime.walk import walk

ADM_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
ADM_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"
REFERENCES_FOR_RECALL = 10_000
"""Reference images that precision and recall are taken against (ADM's files hold so many)."""
FEW_IMAGES = 2048  # Inception's features: the covariance of fewer images is singular
KID_SUBSET = 1000  # images of a subset of KID, or all where there are fewer

Summary = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) to one feature vector each, (B, D)


@dataclass(frozen=True)
class _Reference:
    """Moments of the reference, and its pool features for precision and recall where it has images."""

    pool: tuple[np.ndarray, np.ndarray]
    spatial: tuple[np.ndarray, np.ndarray] | None
    features: np.ndarray | None = None
    own_kernel: float | None = None  # KID's kernel's mean over pairs of the features, where it is known


def named(numbers: dict[str, float], count: int, sampler: str) -> dict[str, float]:
    """The numbers by names that carry count and sampler (`sampler_name`): fid50k_euler249_..."""
    joint = {"fd_dinov2": "fd_dinov2_"}  # its own name ends with a digit
    return {f"{joint.get(name, name)}{metrics.count_name(count)}_{sampler}": value for name, value in numbers.items()}


def sample_sets(samples: str, num_samples: int | None, seeds: int | None) -> list[tuple[str, int]]:
    """Path and first image of each set: SAMPLES itself, or with {seed} in it, or cut into sets of num_samples."""
    if seeds is None:
        return [(samples, 0)]
    if "{seed}" in samples:
        return [(samples.replace("{seed}", str(seed)), 0) for seed in range(seeds)]
    if num_samples is None:
        raise UsageError(
            f"--seeds {seeds} needs a name with {{seed}} in it, found {samples}, or --num-samples, "
            "the size of the sets that SAMPLES is cut into"
        )
    return [(samples, seed * num_samples) for seed in range(seeds)]


@dataclass(eq=False)
class SampleEvaluator:
    """ADM's evaluation against one reference, whose features are computed once, at the first set of samples.

    `dinov2` (`vadit.models.foundation.ImageSummary`, DINOv2 ViT-L/14) adds FD-DINOv2 against the reference's images
    (Stein et al. 2023).
    """

    reference: Path
    inception_weights: str | Path | None
    dinov2: Summary | None = None
    device: str | torch.device = "cpu"
    batch_size: int = 64

    @functools.cached_property
    def _loaded(self) -> tuple[Inception, _Reference]:
        extractor = Inception(self.inception_weights, self.device)
        return extractor, _load_reference(self.reference, extractor, self.batch_size)

    @functools.cached_property
    def _reference_summary(self) -> tuple[np.ndarray, np.ndarray]:
        assert self.dinov2 is not None, "the caller has checked"
        return _summary_moments(open_images(self.reference).batches(self.batch_size), self.dinov2)

    def evaluate_sets(
        self, sets: Sequence[tuple[str, int]], num_samples: int | None, sampler: Callable[[str], str]
    ) -> list[dict[str, float]]:
        """The named numbers of each of the `sample_sets`; sampler(path) is how a set was drawn."""
        _compare_sets(self.reference, open_images(sets[0][0]), num_samples)
        found: list[dict[str, float]] = []
        for path, first in sets:
            count, numbers = self.evaluate(path, num_samples=num_samples, first=first)
            found.append(named(numbers, count, sampler(path)))
            if found[-1].keys() != found[0].keys():
                raise UsageError(
                    f"{path} gives {', '.join(found[-1])}, {sets[0][0]} {', '.join(found[0])}; "
                    "seeds can only be averaged over sets of one size and one sampler"
                )
        return found

    def evaluate(
        self, samples: str | Path, *, num_samples: int | None = None, first: int = 0
    ) -> tuple[int, dict[str, float]]:
        """How many samples from place `first` on were taken (`num_samples`, default all), and their numbers.

        fid, sfid, is, precision, recall, kid (mean over 100 subsets of 1,000, or of all) and fd_dinov2, without those
        that the reference holds too little for, or that nobody asked for.
        """
        source = open_images(samples)
        count = len(source) - first if num_samples is None else num_samples
        if first + count > len(source):
            raise UsageError(
                f"{source.path} holds {len(source)} images, {first + count} were asked for; draw more or ask for fewer"
            )
        if count < 2:
            raise UsageError(f"{source.path}: the distances need at least 2 images, found {count}; draw more samples")
        if self.dinov2 is not None and not _load_statistics(self.reference)[1]:
            raise UsageError(f"{self.reference} holds statistics alone; FD-DINOv2 needs the reference's images (arr_0)")
        extractor, reference = self._loaded
        pools, rows, spatial = [], [], FeatureMoments()
        for images in counted("samples", count, source.batches(self.batch_size, count, first)):
            features = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))
            pools.append(features.pool.cpu().numpy())
            rows.append(features.probabilities.cpu().numpy())
            spatial.update(features.spatial)
        pool, probabilities = np.concatenate(pools), np.concatenate(rows)
        if len(pool) != count:
            raise RunError(f"{len(pool)} of {count} images of {source.path} were read; a part of them gets no numbers")
        numbers = {"fid": metrics.frechet_distance(*reference.pool, *metrics.mean_and_covariance(pool))}
        if reference.spatial is not None:
            numbers["sfid"] = metrics.frechet_distance(*reference.spatial, *spatial.result())
        numbers["is"] = metrics.inception_score(probabilities)
        _warn_of_splits(probabilities, numbers["is"], str(source.path))
        if reference.features is not None:
            numbers["precision"], numbers["recall"] = metrics.precision_recall(
                reference.features, pool, device=self.device
            )
            subset = min(KID_SUBSET, count, len(reference.features))
            numbers["kid"] = metrics.kernel_distance(reference.features, pool, subset_size=subset)
        if self.dinov2 is not None:
            drawn = _summary_moments(source.batches(self.batch_size, count, first), self.dinov2)
            numbers["fd_dinov2"] = metrics.frechet_distance(*self._reference_summary, *drawn)
        return count, numbers


class SampleScorer:
    """FID and KID of images in memory against one reference, for evaluation during training.

    At a small n FID is biased upwards and only comparable with itself at that n; its name carries n. KID is here the
    unbiased estimate from all pairs of images, not a mean over subsets: less noise, and a second instead of a minute.
    The reference's features are kept in the folder `cache` and read there the next time.
    """

    def __init__(
        self,
        reference: str | Path,
        *,
        inception_weights: str | Path | None,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        cache: Path,
    ) -> None:
        self._batch_size = batch_size
        self._extractor = Inception(inception_weights, device)
        path = Path(reference)
        self.inputs = {"reference": str(path), "num_references": reference_size(path), **provenance(inception_weights)}
        file = cache / f"reference-{_key(path, Path(inception_weights or ''))}.npz"
        self._reference = _read_kept(file) or _keep(_load_reference(path, self._extractor, batch_size), file)

    def features(self, images: Tensor) -> Tensor:
        """Inception's pool features (B, 2048), on the CPU, of uint8 images (B, 3, H, W)."""
        return torch.cat([self._extractor.pool(part).cpu() for part in images.split(self._batch_size)])

    def score(self, features: Tensor, sampler: str) -> dict[str, float]:
        """Named numbers of features (N, 2048): fid1k_euler49_random and, where the reference has images, kid1k_..."""
        numbers = {"fid": metrics.frechet_distance(*self._reference.pool, *metrics.mean_and_covariance(features))}
        if self._reference.features is not None:
            numbers["kid"] = metrics.squared_mmd(self._reference.features, features, self._reference.own_kernel)
        return named(numbers, len(features), sampler)


def write_reference(
    out: str | Path,
    images: ImageSet,
    *,
    inception_weights: str | Path | None,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = ImageDataSpec.num_workers,
    keep: int = REFERENCES_FOR_RECALL,
) -> None:
    """Make a reference like ADM's of a set of images, decoded by Pillow: statistics of all, and `keep` of them.

    mu, sigma, mu_s, sigma_s are of all num_images images; arr_0 holds some, evenly spread, in order. `alpha` and `exif`
    are those of the images.
    """
    warn_of_few(images.source.name, len(images))
    extractor = Inception(inception_weights, device)
    places = {index: place for place, index in enumerate(spread(len(images), keep).tolist())}
    pool, spatial = FeatureMoments(), FeatureMoments()
    kept = np.zeros((len(places), images.size, images.size, 3), np.uint8)  # 10,000 of 256 pixels are 2 GB
    with pillow_decoder(images, num_workers, device)() as decoder:
        loaded = load_in_order(images, range(len(images)), batch_size, decoder)
        for batch in counted("reference", len(images), loaded, lambda batch: len(batch.ids)):
            pixels = batch.images.contiguous()
            features = extractor(pixels)
            pool.update(features.pool)
            spatial.update(features.spatial)
            for index, image in zip(batch.ids.tolist(), pixels.permute(0, 2, 3, 1).numpy(), strict=True):
                if index in places:
                    kept[places[index]] = image
    if pool.count != len(images):
        raise RunError(f"{pool.count} of {len(images)} images were read; the reference was not written")
    mu, sigma = pool.result()
    mu_s, sigma_s = spatial.result()
    with saved_file(Path(out), "set --out to a place with room") as partial, partial.open("wb") as stream:
        of: dict[str, Any] = {"num_images": len(images), "alpha": images.alpha, "exif": images.exif}
        np.savez(stream, arr_0=kept, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s, **of)


def warn_of_few(what: str | Path, count: int) -> None:
    """A line where Frechet distances in Inception's features are too large for want of images."""
    if count < FEW_IMAGES:
        note_once(f"{what}: {count:,} images are fewer than {FEW_IMAGES:,}: FID is too large, and compares with none")


def _compare_sets(reference: Path, samples: PngFolder | NpzImages, num_samples: int | None) -> None:
    """A line each where samples and reference differ in size, or are few."""
    entries = {} if reference.is_dir() else Npz(reference).entries
    images = open_images(reference) if reference.is_dir() or "arr_0" in entries else None
    if images is not None and images.size != samples.size:
        ours, theirs = ("x".join(map(str, each.size[::-1])) for each in (samples, images))
        note_once(f"{samples.path} holds images of {ours} pixels, {reference} of {theirs}: they differ in that, too")
    warn_of_few(samples.path, num_samples or len(samples))
    warn_of_few(reference, reference_size(reference) or FEW_IMAGES)  # ADM's statistics are of enough


def reference_size(reference: Path) -> int | None:
    """How many images a reference is of; None where it does not say."""
    entries = {} if reference.is_dir() else Npz(reference).entries
    if "num_images" in entries:
        return int(Npz(reference).array("num_images", ()))
    return None if "mu" in entries else len(open_images(reference))


def _key(reference: Path, weights: Path) -> str:
    """What tells one reference and network from another: names, sizes and times of change."""
    files = [reference / file for file in walk(reference, (".png",)).files()] if reference.is_dir() else [reference]
    there = [file.absolute() for file in (*files, weights) if file.is_file()]
    found = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in there]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _keep(reference: _Reference, file: Path) -> _Reference:
    """The reference with its own kernel, written to `file`."""
    arrays: dict[str, Any] = {"mu": reference.pool[0], "sigma": reference.pool[1]}
    if reference.features is not None:
        reference = dataclasses.replace(reference, own_kernel=metrics.mean_kernel(reference.features))
        arrays |= {"features": reference.features, "own_kernel": np.array(reference.own_kernel)}
    with saved_file(file, "make room there") as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)
    return reference


def _read_kept(file: Path) -> _Reference | None:
    """What `_keep` wrote; None where there is nothing, or nothing whole."""
    try:
        kept = Npz(file)
        mu = kept.array("mu", (None,))
        moments = (mu, kept.array("sigma", (len(mu), len(mu))))
        if "features" not in kept.entries:
            return _Reference(moments, None)
        return _Reference(moments, None, kept.array("features", (None, len(mu))), float(kept.array("own_kernel", ())))
    except (UsageError, RunError):
        return None


def _warn_of_splits(probabilities: np.ndarray, score: float, samples: str) -> None:
    """A line each where the splits in file order, ADM's protocol, are not alike: the inception score is then lower."""
    count = len(probabilities)
    if count <= IS_SPLIT:
        return
    if count % IS_SPLIT:
        note_once(f"{samples}: the inception score's last split has {count % IS_SPLIT:,} samples, not {IS_SPLIT:,}")
    shuffled = metrics.inception_score(probabilities[np.random.default_rng(0).permutation(count)])
    if shuffled > 1.05 * score:
        note_once(
            f"{samples}: in file order, as ADM takes it, the inception score is {score:.4g}, shuffled {shuffled:.4g}: "
            "the samples are sorted, by class perhaps, and the score is that of splits of few classes"
        )


def _summary_moments(batches: Iterable[np.ndarray], summary: Summary) -> tuple[np.ndarray, np.ndarray]:
    moments = FeatureMoments()
    for images in batches:
        moments.update(summary(torch.from_numpy(images).permute(0, 3, 1, 2)))
    return moments.result()


def _load_reference(path: Path, extractor: Inception, batch_size: int) -> _Reference:
    """Stored statistics go before those of the images: ADM's files hold statistics of the whole data set."""
    stored, has_images = _load_statistics(path)
    if path.name == ADM_REFERENCE:
        compare_published(path, ADM_SHA256)
    # Features of a million images would take tens of gigabytes: sums, and the few that are needed one by one.
    pool_moments, spatial_moments, features = FeatureMoments(), FeatureMoments(), None
    if has_images:
        source = open_images(path)
        if stored is None and len(source) < 2:
            raise UsageError(f"{path}: a reference needs at least 2 images, found {len(source)}; name a larger one")
        wanted, rows, count = spread(len(source), REFERENCES_FOR_RECALL), [], 0
        for images in counted("reference", len(source), source.batches(batch_size)):
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
    return dataclasses.replace(stored, features=features)


def _load_statistics(path: Path) -> tuple[_Reference | None, bool]:
    """The statistics that an .npz stores, None where it has none; and whether the reference has images."""
    npz = Npz(path) if path.suffix == ".npz" and path.is_file() else None
    if npz is None or "mu" not in npz.entries:
        return None, True
    # Without mu_s there is no sFID: that of the images alone would be of another set than the FID beside it.
    spatial = _stored_moments(npz, "_s") if "mu_s" in npz.entries else None
    return _Reference(_stored_moments(npz, ""), spatial), "arr_0" in npz.entries


def _stored_moments(npz: Npz, ending: str) -> tuple[np.ndarray, np.ndarray]:
    if f"sigma{ending}" not in npz.entries:
        raise UsageError(f"{npz.path} holds mu{ending} without sigma{ending}; both are needed")
    return npz.array(f"mu{ending}", (None,)), npz.array(f"sigma{ending}", (None, None))

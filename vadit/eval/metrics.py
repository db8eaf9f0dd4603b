"""Distances and scores between two sets of features: pure functions, in float64.

Nothing here knows where features come from; `vadit.eval.inception` gives the published protocol's, the demo its own
classifier's. Arguments are NumPy arrays or torch tensors of shape (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp, xlogy
from torch import Tensor

from vadit.errors import UsageError

Array = np.ndarray | Tensor

_BLOCK_ROWS, _BLOCK_COLUMNS = 2048, 8192
"""Part of a matrix of distances that is in memory at once: 134 MB in float64."""


# ------------------------------------------------------------------------------------------ Frechet distance


class FeatureMoments:
    """Mean and covariance of features that arrive in batches, merged after Chan, Golub & LeVeque (1979).

    Sums of squares are kept around the running mean, so a large common offset costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def update(self, features: Array) -> None:
        """Take in a batch (B, D)."""
        batch = _matrix(features, "features")
        if self.count == 0:
            self._mean = np.zeros(batch.shape[1])
            self._scatter = np.zeros((batch.shape[1], batch.shape[1]))
        elif batch.shape[1] != len(self._mean):
            raise UsageError(
                f"features have width {batch.shape[1]}, the earlier ones {len(self._mean)}; use one feature extractor"
            )
        mean = batch.mean(axis=0)
        centred, shift = batch - mean, mean - self._mean
        total = self.count + len(batch)
        self._scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean = self._mean + shift * (len(batch) / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D) (divisor N - 1)."""
        if self.count < 2:
            raise UsageError(f"a covariance needs at least 2 samples, found {self.count}; evaluate more images")
        return self._mean, self._scatter / (self.count - 1)


def mean_and_covariance(features: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2."""
    moments = FeatureMoments()
    moments.update(features)
    return moments.result()


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2).

    The trace of the root is the sum of the square roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, taken with a
    symmetric eigensolver: `scipy.linalg.sqrtm` of the unsymmetric product returns wrong values in several builds.
    """
    mean_a, mean_b = _finite(mean_a, "mean_a"), _finite(mean_b, "mean_b")
    cov_a, cov_b = _finite(cov_a, "cov_a"), _finite(cov_b, "cov_b")
    width = mean_a.size
    square = (width, width)
    if (mean_a.shape, mean_b.shape, cov_a.shape, cov_b.shape) != ((width,), (width,), square, square):
        raise UsageError(
            f"Frechet distance needs means (D,) and covariances (D, D) of one width D, found {mean_a.shape}, "
            f"{cov_a.shape} and {mean_b.shape}, {cov_b.shape}; take both from one feature extractor"
        )
    eigenvalues, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T
    inner = root @ cov_b @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))  # equal inputs can end a rounding error below 0


# ------------------------------------------------------------------------------------------ inception score


def softmax(logits: Array) -> np.ndarray:
    """Probabilities (N, K) of logits (N, K)."""
    values = _matrix(logits, "logits")
    return np.exp(values - logsumexp(values, axis=1, keepdims=True))


def inception_score(probabilities: Array, split_size: int = 5000) -> float:
    """Inception score (Salimans et al. 2016) of class probabilities (N, K) in file order.

    Mean of exp(mean KL(p || mean p)) over consecutive splits of `split_size` (ADM's; the last split may be shorter).
    """
    values = _matrix(probabilities, "probabilities")
    if values.min() < 0 or np.abs(values.sum(axis=1) - 1).max() > 1e-3:
        raise UsageError("inception score needs probabilities whose rows sum to 1; pass softmax(logits)")
    scores = []
    for start in range(0, len(values), split_size):
        part = values[start : start + split_size]
        marginal = part.mean(axis=0, keepdims=True)
        # p log p - p log m with 0 log 0 = 0; where m is 0, so is every p of its column.
        divergence = (xlogy(part, part) - xlogy(part, marginal)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


# ------------------------------------------------------------------------------------------ precision and recall


def precision_recall(
    reference: Array, samples: Array, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    A ball around each point reaches to its k-th neighbour. Precision: share of `samples` inside any ball of
    `reference`; recall: share of `reference` inside any ball of `samples`. Distances are taken in blocks, in the
    features' own precision (at least fp32): 50,000 against 50,000 need less than 1 GiB beside the features.
    """
    a, b = _points(reference, "reference features"), _points(samples, "sample features")
    _check_widths(a, b)
    for name, points in (("reference", a), ("sample", b)):
        if len(points) <= k:
            raise UsageError(f"precision and recall with k {k} need more than {k} {name} images, found {len(points)}")
    # Distances do not change under a shift; without the common mean they lose fewer digits.
    centre = a.mean(dim=0, dtype=torch.float64).to(a)
    dtype = torch.promote_types(a.dtype, b.dtype)

    def blocks(points: Tensor, rows: int) -> Iterator[Tensor]:
        for part in points.split(rows):
            yield (part - centre).to(device=device, dtype=dtype)

    def radii(points: Tensor) -> Tensor:
        """Squared distance of each point to its k-th neighbour: the (k+1)-th smallest, the point itself included."""
        found = []
        for rows in blocks(points, _BLOCK_ROWS):
            nearest = torch.full((len(rows), k + 1), math.inf, device=device, dtype=dtype)
            for columns in blocks(points, _BLOCK_COLUMNS):
                near = _squared_distances(rows, columns)
                near = near.topk(min(k + 1, near.shape[1]), dim=1, largest=False).values
                nearest = torch.cat([nearest, near], dim=1).topk(k + 1, dim=1, largest=False).values
            found.append(nearest.max(dim=1).values)
        return torch.cat(found)

    radii_a, radii_b = radii(a), radii(b)
    inside_a = torch.zeros(len(a), dtype=torch.bool, device=device)
    inside_b = torch.zeros(len(b), dtype=torch.bool, device=device)
    for row, rows in enumerate(blocks(a, _BLOCK_ROWS)):
        here = slice(row * _BLOCK_ROWS, row * _BLOCK_ROWS + len(rows))
        for column, columns in enumerate(blocks(b, _BLOCK_COLUMNS)):
            there = slice(column * _BLOCK_COLUMNS, column * _BLOCK_COLUMNS + len(columns))
            distances = _squared_distances(rows, columns)
            inside_b[there] |= (distances <= radii_a[here, None]).any(dim=0)
            inside_a[here] |= (distances <= radii_b[there]).any(dim=1)
    return float(inside_b.double().mean()), float(inside_a.double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) of rows (N, D) and (M, D)."""
    products = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    return products.add_(a.square().sum(1)[:, None]).clamp_(min=0)


# ------------------------------------------------------------------------------------------ kernel distance


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the kernel distance over subsets."""

    mean: float
    std: float


def kernel_distance(
    reference: Array, samples: Array, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3.

    Mean over random subsets of features (N, D) and (M, D); unbiased, so near 0 (and sometimes below) for equal sources.
    """
    x, y = _points(reference, "reference features"), _points(samples, "sample features")
    _check_widths(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise UsageError(
            f"KID's subset_size {subset_size} must be between 2 and the number of images, {min(len(x), len(y))}; "
            "pass a smaller subset_size or evaluate more images"
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        a = x[generator.choice(len(x), subset_size, replace=False)].double().numpy()
        b = y[generator.choice(len(y), subset_size, replace=False)].double().numpy()
        values.append(_unbiased_mmd(a, b))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of two sets (n, D) of equal size under the cubic kernel."""
    n, width = a.shape
    within = [((points @ points.T) / width + 1) ** 3 for points in (a, b)]
    own = sum(float(gram.sum() - np.trace(gram)) for gram in within) / (n * (n - 1))
    return own - 2 * float((((a @ b.T) / width + 1) ** 3).mean())


# ------------------------------------------------------------------------------------------ names and checks


def count_name(count: int) -> str:
    """50000 -> 50k, 1797 -> 1797."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def _finite(values: Array, name: str) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise UsageError(f"{name} holds NaN or infinity; evaluate at least 2 images and look for NaN in the samples")
    return array


def _matrix(values: Array, name: str) -> np.ndarray:
    array = _finite(values, name)
    if array.ndim != 2 or len(array) == 0:
        raise UsageError(f"{name} must have shape (N, D) with N >= 1, found {array.shape}")
    return array


def _points(values: Array, name: str) -> Tensor:
    """Features (N, D) on the CPU in their own precision, at least fp32: 50,000 x 2048 in fp64 are 0.8 GB."""
    points = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if points.ndim != 2 or len(points) == 0:
        raise UsageError(f"{name} must have shape (N, D) with N >= 1, found {tuple(points.shape)}")
    if not all(bool(part.isfinite().all()) for part in points.split(_BLOCK_COLUMNS)):
        raise UsageError(f"{name} hold NaN or infinity; look for NaN in the samples")
    return points


def _check_widths(reference: Tensor, samples: Tensor) -> None:
    if reference.shape[1] != samples.shape[1]:
        raise UsageError(
            f"reference features have width {reference.shape[1]} and sample features {samples.shape[1]}; "
            "take both from one extractor"
        )

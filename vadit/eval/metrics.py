"""Distances and scores between two sets of features: pure functions, in float64.

Nothing here knows where features come from; `vadit.eval.inception` gives the published protocol's, the demo its own
classifier's. Arguments are NumPy arrays or torch tensors of shape (N, D).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import logsumexp, xlogy
from torch import Tensor

from vadit.errors import UsageError

Array = np.ndarray | Tensor

_ROWS_PER_CHUNK = 2048
"""Rows of a distance matrix that are in memory at once (against 50,000 columns: 0.8 GB in float64)."""


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


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017): |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2).

    The trace of the root is the sum of the square roots of the eigenvalues of S1^1/2 S2 S1^1/2, taken with a symmetric
    eigensolver: `scipy.linalg.sqrtm` of the unsymmetric product returns wrong values in several builds.
    """
    mu1, mu2 = _finite(mu1, "mu1"), _finite(mu2, "mu2")
    sigma1, sigma2 = _finite(sigma1, "sigma1"), _finite(sigma2, "sigma2")
    width = mu1.size
    square = (width, width)
    if (mu1.shape, mu2.shape, sigma1.shape, sigma2.shape) != ((width,), (width,), square, square):
        raise UsageError(
            f"Frechet distance needs means (D,) and covariances (D, D) of one width D, found {mu1.shape}, "
            f"{sigma1.shape} and {mu2.shape}, {sigma2.shape}; take both from one feature extractor"
        )
    eigenvalues, vectors = np.linalg.eigh(sigma1)
    root = (vectors * np.sqrt(np.clip(eigenvalues, 0, None))) @ vectors.T
    inner = root @ sigma2 @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross
    return float(max(distance, 0.0))  # equal inputs can end a rounding error below 0


# ------------------------------------------------------------------------------------------ inception score


def softmax(logits: Array) -> np.ndarray:
    """Probabilities (N, K) of logits (N, K)."""
    values = _matrix(logits, "logits")
    return np.exp(values - logsumexp(values, axis=1, keepdims=True))


def inception_score(probabilities: Array, *, split_size: int = 5000) -> float:
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
    real: Array, fake: Array, *, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    A ball around each point reaches to its k-th neighbour. Precision: share of `fake` inside any ball of `real`;
    recall: share of `real` inside any ball of `fake`.
    """
    real_NE, fake_ME = _matrix(real, "real features"), _matrix(fake, "fake features")
    _check_widths(real_NE, fake_ME)
    for name, points in (("real", real_NE), ("fake", fake_ME)):
        if len(points) <= k:
            raise UsageError(f"precision and recall with k {k} need more than {k} {name} images, found {len(points)}")
    # Distances do not change under a shift; without the common mean they lose fewer digits.
    centre = real_NE.mean(axis=0)
    a = torch.from_numpy(real_NE - centre).to(device)
    b = torch.from_numpy(fake_ME - centre).to(device)
    real_radii, fake_radii = _radii(a, k), _radii(b, k)
    fake_inside = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    real_inside = []
    for rows, radii in zip(a.split(_ROWS_PER_CHUNK), real_radii.split(_ROWS_PER_CHUNK), strict=True):
        distances = _squared_distances(rows, b)
        fake_inside |= (distances <= radii[:, None]).any(dim=0)
        real_inside.append((distances <= fake_radii).any(dim=1))
    return float(fake_inside.double().mean()), float(torch.cat(real_inside).double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point (N, D) to its k-th neighbour: the (k+1)-th smallest, the point itself included."""
    chunks = points.split(_ROWS_PER_CHUNK)
    return torch.cat([_squared_distances(rows, points).kthvalue(k + 1, dim=1).values for rows in chunks])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) of rows (N, D) and (M, D)."""
    products = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    return (products + a.square().sum(1)[:, None]).clamp_(min=0)


# ------------------------------------------------------------------------------------------ kernel distance


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation of the kernel distance over subsets."""

    mean: float
    std: float


def kid(real: Array, fake: Array, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> KernelDistance:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3.

    Mean over random subsets of features (N, D) and (M, D); unbiased, so near 0 (and sometimes below) for equal sources.
    """
    x, y = _matrix(real, "real features"), _matrix(fake, "fake features")
    _check_widths(x, y)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise UsageError(
            f"KID's subset_size {subset_size} must be between 2 and the number of images, {min(len(x), len(y))}; "
            "pass a smaller subset_size or evaluate more images"
        )
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        a = x[generator.choice(len(x), subset_size, replace=False)]
        b = y[generator.choice(len(y), subset_size, replace=False)]
        values.append(_unbiased_mmd(a, b))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD of two sets (n, D) of equal size under the cubic kernel."""
    n, width = a.shape
    within = [((points @ points.T) / width + 1) ** 3 for points in (a, b)]
    own = sum(float(gram.sum() - np.trace(gram)) for gram in within) / (n * (n - 1))
    return own - 2 * float((((a @ b.T) / width + 1) ** 3).mean())


# ------------------------------------------------------------------------------------------ checks


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


def _check_widths(real: np.ndarray, fake: np.ndarray) -> None:
    if real.shape[1] != fake.shape[1]:
        raise UsageError(
            f"real features have width {real.shape[1]} and fake features {fake.shape[1]}; take both from one extractor"
        )

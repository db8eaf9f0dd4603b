"""Distances and scores between two sets of features: pure functions, in float64.

Nothing here knows where features come from; `vadit.eval.inception` gives the published protocol's, the demo its own
classifier's. Arguments are NumPy arrays or torch tensors of shape (N, D).
"""

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from scipy.special import xlogy
from torch import Tensor

from vadit.runtime.errors import UsageError

Array = np.ndarray | Tensor

IS_SPLIT = 5000  # samples of a split of the inception score, in file order (ADM's)
_BLOCK = 1024  # rows of a matrix of distances that are in memory at once: 205 MB in fp32 against 50,000 points


class FeatureMoments:
    """Mean and covariance of features that arrive in batches, merged after Chan, Golub & LeVeque (1979).

    Sums of squares are kept around the running mean, so a large common offset costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = np.zeros(())

    def update(self, features: Array) -> None:
        """Take in a batch (B, D)."""
        batch = _points(features, "features").double().numpy()
        mean = batch.mean(axis=0)
        centred, shift = batch - mean, mean - self._mean
        total = self.count + len(batch)
        between = np.outer(shift, shift) * (self.count * len(batch) / total)
        self._scatter = self._scatter + (centred.T @ centred + between)
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
    for start in range(0, max(len(features), 1), _BLOCK):
        moments.update(features[start : start + _BLOCK])
    return moments.result()


def frechet_distance(mean_a: Array, cov_a: Array, mean_b: Array, cov_b: Array) -> float:
    """Squared Frechet distance of two Gaussians (Heusel et al. 2017): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2).

    With C_a = L L', the trace of the root is the sum of the square roots of the eigenvalues of L' C_b L, taken with a
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
    factor, order = _factor(cov_a)
    inner = factor.T @ cov_b[np.ix_(order, order)] @ factor
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    distance = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))  # equal inputs can end a rounding error below 0


def _factor(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L (D, r) and an order of the D rows with C[order][:, order] = L L', r the rank of C as fp64 sees it.

    Cholesky's factorisation with pivots (Higham 1990): as good as the root from eigenvectors, at a tenth of the time.
    """
    packed, pivots, rank, _ = dpstrf(np.asfortranarray((covariance + covariance.T) / 2), lower=1)
    return np.tril(packed)[:, :rank], pivots - 1


def inception_score(probabilities: Array, split_size: int = IS_SPLIT) -> float:
    """Inception score (Salimans et al. 2016) of class probabilities (N, K) in file order.

    Mean of exp(mean KL(p || mean p)) over consecutive splits of `split_size` (ADM's; the last split may be shorter).
    """
    values = _points(probabilities, "probabilities").double().numpy()
    if values.min() < 0 or np.abs(values.sum(axis=1) - 1).max() > 1e-3:
        raise UsageError("inception score needs probabilities whose rows sum to 1; pass a softmax of logits")
    scores = []
    for start in range(0, len(values), split_size):
        part = values[start : start + split_size]
        marginal = part.mean(axis=0, keepdims=True)
        # p log p - p log m with 0 log 0 = 0; where m is 0, so is every p of its column.
        divergence = (xlogy(part, part) - xlogy(part, marginal)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: Array, samples: Array, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features (N, D) and (M, D).

    A ball around each point reaches to its k-th neighbour. Precision: share of `samples` inside any ball of
    `reference`; recall: share of `reference` inside any ball of `samples`. Distances are taken in blocks, in the
    features' own precision (at least fp32; ADM's code takes fp16): 50,000 against 50,000 need 1.2 GiB beside the
    features.
    """
    a, b = _both(reference, samples)
    for name, points in (("reference", a), ("sample", b)):
        if not 1 <= k < len(points):
            raise UsageError(f"precision and recall with k {k} need more than {k} {name} images, found {len(points)}")
    # Distances do not change under a shift; without the common mean they lose fewer digits.
    dtype = torch.promote_types(a.dtype, b.dtype)
    centre = a.mean(dim=0, dtype=torch.float64).to(dtype)
    a, b = ((points.to(dtype) - centre).to(device) for points in (a, b))
    radii_a, radii_b = _radii(a, k), _radii(b, k)
    inside_a = torch.zeros(len(b), dtype=torch.bool, device=device)
    inside_b = []
    for rows, radii in zip(a.split(_BLOCK), radii_a.split(_BLOCK), strict=True):
        distances = _squared_distances(rows, b)
        inside_a |= (distances <= radii[:, None]).any(dim=0)
        inside_b.append((distances <= radii_b).any(dim=1))
    return float(inside_a.double().mean()), float(torch.cat(inside_b).double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour (N,): the (k+1)-th smallest, the point itself included."""
    radii = []
    for start in range(0, len(points), _BLOCK):
        distances = _squared_distances(points[start : start + _BLOCK], points)
        distances.diagonal(start).zero_()  # exactly, not up to rounding
        radii.append(distances.topk(k + 1, largest=False).values[:, -1].clone())
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distances (N, M) of rows (N, D) and (M, D)."""
    products = torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2)
    return products.add_(a.square().sum(1)[:, None]).clamp_(min=0)


def kernel_distance(
    reference: Array, samples: Array, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel inception distance (Binkowski et al. 2018): the unbiased squared MMD with k(x, y) = (x.y / D + 1)^3.

    Mean over random subsets of features (N, D) and (M, D); unbiased, so near 0 (and sometimes below) for equal sources.
    """
    x, y = _both(reference, samples)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise UsageError(
            f"KID's subset_size {subset_size} must be between 2 and the number of images, {min(len(x), len(y))}; "
            "pass a smaller subset_size or evaluate more images"
        )
    if num_subsets < 1:
        raise UsageError(f"KID's num_subsets is {num_subsets}; it must be at least 1")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(num_subsets):
        a = x[generator.choice(len(x), subset_size, replace=False)]
        b = y[generator.choice(len(y), subset_size, replace=False)]
        values.append(squared_mmd(a, b))
    return float(np.mean(values))


def squared_mmd(reference: Array, samples: Array, within: float | None = None) -> float:
    """The unbiased squared MMD of all features (N, D) and (M, D) under KID's kernel, in fp64 and in blocks.

    `within`: the reference's own term (`mean_kernel`), where it is known already.
    """
    x, y = _both(reference, samples)
    within = mean_kernel(x) if within is None else within
    cross = sum(float(_kernel(a.double(), b.double()).sum()) for a in x.split(_BLOCK) for b in y.split(_BLOCK))
    return within + mean_kernel(y) - 2 * cross / (len(x) * len(y))


def mean_kernel(features: Array) -> float:
    """Mean of KID's kernel over all pairs of different features (N, D), N >= 2."""
    points = _points(features, "features")
    if len(points) < 2:
        raise UsageError(f"the kernel distance needs at least 2 images on each side, found {len(points)}")
    blocks, total = points.split(_BLOCK), 0.0
    for row, a in enumerate(blocks):
        for column, b in enumerate(blocks[row:]):
            gram = _kernel(a.double(), b.double())
            # pairs of different blocks count twice, those within one without the diagonal
            total += 2 * float(gram.sum()) if column else float(gram.sum() - gram.trace())
    return total / (len(points) * (len(points) - 1))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    gram = (a @ b.T).div_(a.shape[1]).add_(1)
    return gram.square().mul_(gram)


def count_name(count: int) -> str:
    """50000 -> 50k, 1797 -> 1797."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


def _finite(values: Array, name: str) -> np.ndarray:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, np.float64)
    if num_bad := int((~np.isfinite(array)).sum()):
        raise UsageError(
            f"{name} holds {num_bad} NaN or infinite values of {array.size}; a covariance of fewer than 2 images gives "
            "them, or samples that are NaN: evaluate more images, or look at the samples"
        )
    return array


def _points(values: Array, name: str) -> Tensor:
    """Features (N, D) on the CPU in their own precision, at least fp32: 50,000 x 2048 in fp64 are 0.8 GB."""
    points = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.asarray(values))
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if points.ndim != 2 or len(points) == 0:
        raise UsageError(f"{name} must have shape (N, D) with N >= 1, found {tuple(points.shape)}")
    if not all(bool(part.isfinite().all()) for part in points.split(_BLOCK)):
        raise UsageError(f"{name} hold NaN or infinity; look for NaN in the samples")
    return points


def _both(reference: Array, samples: Array) -> tuple[Tensor, Tensor]:
    x, y = _points(reference, "reference features"), _points(samples, "sample features")
    if x.shape[1] != y.shape[1]:
        raise UsageError(
            f"reference features have width {x.shape[1]} and sample features {y.shape[1]}; take both from one extractor"
        )
    return x, y

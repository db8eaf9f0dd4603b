"""How evenly a tokenizer spreads its latents: the three numbers of the paper's Table 6.

Protocol: latent vectors (one random position of each of n random images, channels normalised) go to two dimensions by
t-SNE (perplexity 30, 1000 iterations); a Gaussian kernel density (Scott's rule) is evaluated at the points themselves;
of these n densities: coefficient of variation, Gini coefficient, entropy over log2 n; mean over draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import gaussian_kde
from torch import Tensor

from vadit.errors import UsageError

PERPLEXITY = 30.0
ITERATIONS = 1000


@dataclass(frozen=True)
class Uniformity:
    """Lower cv and gini, higher entropy: more uniform."""

    density_cv: float
    gini: float
    entropy: float
    """Normalised to 1 for equal densities."""


def coefficient_of_variation(values: np.ndarray) -> float:
    """Standard deviation over mean of positive values (n,)."""
    return float(values.std() / values.mean())


def gini_coefficient(values: np.ndarray) -> float:
    """Mean absolute difference of all pairs over twice the mean, of values >= 0 (n,): 0 equal, (n-1)/n all in one."""
    n = len(values)
    ranks = np.arange(1, n + 1)
    return float(2 * (ranks * np.sort(values)).sum() / (n * values.sum()) - (n + 1) / n)


def normalized_entropy(values: np.ndarray) -> float:
    """Entropy of values >= 0 (n,), scaled to sum 1, over log2 n: 1 equal, 0 all in one."""
    shares = values / values.sum()
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum() / np.log2(len(values)))


def latent_vectors(
    latents: Tensor, num_vectors: int, *, mean: Tensor | None = None, std: Tensor | None = None, seed: int = 0
) -> np.ndarray:
    """One random position of each of `num_vectors` random images of `latents` (N, C, h, w): float64 (num_vectors, C).

    Channels are normalised by `mean` and `std` (C values each, of the latent data set), by default those of `latents`.
    """
    if latents.ndim != 4:
        raise UsageError(f"latents must have shape (N, C, h, w), found {tuple(latents.shape)}")
    num_images, channels, height, width = latents.shape
    if num_vectors > num_images:
        raise UsageError(
            f"{num_vectors} latent vectors need as many images, found {num_images}; pass num_vectors <= {num_images}"
        )
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.choice(num_images, num_vectors, replace=False))
    positions = torch.from_numpy(generator.integers(height * width, size=num_vectors))
    vectors = latents.flatten(2)[images, :, positions].double().cpu()
    if mean is None:
        mean = latents.double().mean(dim=(0, 2, 3))
    if std is None:
        std = latents.double().std(dim=(0, 2, 3))
    return ((vectors - mean.cpu().double().reshape(1, channels)) / std.cpu().double().reshape(1, channels)).numpy()


def point_densities(points: np.ndarray) -> np.ndarray:
    """Gaussian kernel density (Scott's rule) of points (n, 2) at the points themselves, (n,)."""
    return gaussian_kde(points.T, bw_method="scott")(points.T)


def distribution_uniformity(vectors: np.ndarray, *, seed: int = 0) -> Uniformity:
    """The three numbers of one draw of latent vectors (n, C)."""
    from sklearn.manifold import TSNE  # a second to import

    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise UsageError(
            f"latent vectors must be finite and of shape (n, C), found {vectors.shape} with "
            f"{int((~np.isfinite(vectors)).sum())} values that are NaN or infinite; look at the tokenizer"
        )
    if len(vectors) <= 3 * PERPLEXITY:
        raise UsageError(
            f"t-SNE with perplexity {PERPLEXITY:g} needs more than {3 * PERPLEXITY:g} latent vectors, "
            f"found {len(vectors)}; pass a larger num_vectors"
        )
    if vectors.std(axis=0).max() == 0:
        raise UsageError("all latent vectors are equal; the tokenizer has collapsed")
    embed = TSNE(n_components=2, perplexity=PERPLEXITY, max_iter=ITERATIONS, random_state=seed)
    densities = point_densities(embed.fit_transform(vectors).astype(np.float64))
    return Uniformity(coefficient_of_variation(densities), gini_coefficient(densities), normalized_entropy(densities))


def latent_uniformity(
    latents: Tensor,
    *,
    num_vectors: int = 10_000,
    draws: int = 10,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    seed: int = 0,
) -> Uniformity:
    """Mean over `draws` of the three numbers of `num_vectors` vectors of latents (N, C, h, w).

    The defaults are Table 6's; latents of fewer images need a smaller `num_vectors`.
    """
    if draws < 1:
        raise UsageError(f"draws is {draws}; it must be at least 1")
    results = [
        distribution_uniformity(
            latent_vectors(latents, num_vectors, mean=mean, std=std, seed=seed + draw), seed=seed + draw
        )
        for draw in range(draws)
    ]
    return Uniformity(
        density_cv=float(np.mean([result.density_cv for result in results])),
        gini=float(np.mean([result.gini for result in results])),
        entropy=float(np.mean([result.entropy for result in results])),
    )

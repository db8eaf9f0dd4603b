"""Table 6's numbers: closed forms, the protocol's choice of vectors, and that clusters read as less uniform."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vadit.eval import latents as uniformity
from vadit.runtime.errors import UsageError


def test_equal_densities_are_perfectly_uniform() -> None:
    values = np.full(64, 0.3)
    assert uniformity.coefficient_of_variation(values) == pytest.approx(0, abs=1e-12)
    assert uniformity.gini_coefficient(values) == pytest.approx(0, abs=1e-12)
    assert uniformity.normalized_entropy(values) == pytest.approx(1)


def test_closed_forms_of_unequal_densities() -> None:
    # 1, 3: mean 2, std 1; Gini (|1-3| * 2) / (2 * 4 * 2); entropy of (1/4, 3/4) in bits over log2 2.
    values = np.array([3.0, 1.0])
    assert uniformity.coefficient_of_variation(values) == pytest.approx(0.5)
    assert uniformity.gini_coefficient(values) == pytest.approx(0.25)
    assert uniformity.normalized_entropy(values) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    # 1..n: Gini (n - 1) / (3 n); all in one of n: (n - 1) / n, entropy 0.
    ramp = np.arange(1.0, 101)
    assert uniformity.gini_coefficient(ramp[::-1]) == pytest.approx(99 / 300)
    single = np.eye(8)[0]
    assert uniformity.gini_coefficient(single) == pytest.approx(7 / 8)
    assert uniformity.normalized_entropy(single) == 0


def test_point_densities_are_scotts_gaussian_mixture() -> None:
    points = np.random.default_rng(0).normal(size=(40, 2)) * [1.0, 3.0]
    covariance = np.cov(points.T) * 40 ** (-2 / 6)  # Scott: n^(-1/(d+4)) on the standard deviation, d = 2
    difference = points[:, None] - points[None]
    exponent = np.einsum("ijk,kl,ijl->ij", difference, np.linalg.inv(covariance), difference)
    expected = np.exp(-exponent / 2).mean(axis=1) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    np.testing.assert_allclose(uniformity.point_densities(points), expected, rtol=1e-10)


def test_vectors_are_one_position_of_distinct_images_normalised_by_channel() -> None:
    # Channel 0 names the image, channel 1 the position.
    latents = torch.empty(20, 2, 3, 3)
    latents[:, 0] = torch.arange(20.0).reshape(20, 1, 1)
    latents[:, 1] = torch.arange(9.0).reshape(3, 3)
    plain = uniformity.latent_vectors(latents, 15, mean=torch.zeros(2), std=torch.ones(2), seed=4)
    assert plain.shape == (15, 2)
    assert len(set(plain[:, 0])) == 15
    assert set(plain[:, 1]) <= set(range(9))
    assert len(set(plain[:, 1])) > 3
    again = uniformity.latent_vectors(latents, 15, seed=4)
    own_mean, own_std = latents.mean(dim=(0, 2, 3)).numpy(), latents.std(dim=(0, 2, 3)).numpy()
    np.testing.assert_allclose(again, (plain - own_mean) / own_std, rtol=1e-5)
    assert not np.array_equal(
        plain, uniformity.latent_vectors(latents, 15, mean=torch.zeros(2), std=torch.ones(2), seed=5)
    )
    with pytest.raises(UsageError, match=r"--num-vectors is 21.* set --num-vectors 20 or less"):
        uniformity.latent_vectors(latents, 21)


def test_clustered_latents_are_less_uniform_than_spread_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(200, 2, 2, 2, generator=generator)
    centres = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 90.0]])
    sizes = torch.tensor([10, 60, 130])  # clusters of unequal weight: the density differs between them
    clustered = torch.randn(200, 2, 2, 2, generator=generator) + centres.repeat_interleave(sizes, 0)[:, :, None, None]
    even = uniformity.latent_uniformity(spread, num_vectors=200, draws=2)
    uneven = uniformity.latent_uniformity(clustered, num_vectors=200, draws=1)
    assert even == uniformity.latent_uniformity(spread, num_vectors=200, draws=2)
    assert uneven.density_cv > 1.2 * even.density_cv
    assert uneven.gini > 1.2 * even.gini
    assert uneven.normalized_entropy < even.normalized_entropy <= 1


def test_unusable_vectors_are_refused() -> None:
    with pytest.raises(UsageError, match="1 values that are NaN"):
        vectors = np.random.default_rng(0).normal(size=(100, 3))
        vectors[5, 1] = np.nan
        uniformity.evaluate_latents(vectors)
    with pytest.raises(UsageError, match=r"--num-vectors is 90; .* more than 90 latent vectors"):
        uniformity.evaluate_latents(np.random.default_rng(0).normal(size=(90, 3)))
    with pytest.raises(UsageError, match="collapsed"):
        uniformity.evaluate_latents(np.ones((100, 3)))
    with pytest.raises(UsageError, match="N, C, h, w"):
        uniformity.latent_vectors(torch.zeros(5, 3), 5)

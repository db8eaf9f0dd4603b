"""Frechet distance, inception score, precision and recall, kernel distance: closed forms and hand-made sets."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from vadit.eval import metrics
from vadit.eval.metrics import (
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
from vadit.runtime.errors import UsageError


def random_covariance(width: int, seed: int) -> np.ndarray:
    """A well-conditioned covariance with eigenvalues between 0.5 and 2."""
    generator = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(generator.normal(size=(width, width)))
    return basis @ np.diag(generator.uniform(0.5, 2, width)) @ basis.T


def test_moments_in_uneven_batches_equal_numpy_also_far_from_zero() -> None:
    features = np.random.default_rng(0).normal(size=(503, 7)) * 0.01 + 1e5
    moments = FeatureMoments()
    for start, stop in ((0, 1), (1, 4), (4, 300), (300, 503)):
        moments.update(torch.from_numpy(features[start:stop]))
    mean, covariance = moments.result()
    assert moments.count == 503
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=0, atol=1e-9 * 1e-4)


@pytest.mark.parametrize("seed", range(2))
def test_frechet_distance_equals_a_general_matrix_square_root(seed: int) -> None:
    width = 24
    first, second = random_covariance(width, seed), random_covariance(width, seed + 100)
    generator = np.random.default_rng(seed)
    mu1, mu2 = generator.normal(size=width), generator.normal(size=width)
    # Checked before it is trusted: sqrtm is what some builds get wrong.
    root = scipy.linalg.sqrtm(first @ second)
    np.testing.assert_allclose(root @ root, first @ second, atol=1e-10)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(first + second - 2 * root.real)
    assert frechet_distance(mu1, first, mu2, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mu2, second, mu1, first) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_rank_deficient_covariances() -> None:
    # 5 samples in 20 dimensions; shifted copies: the distance is the shift's square, and 0 without one.
    features = np.random.default_rng(1).normal(size=(5, 20))
    mean, covariance = mean_and_covariance(features)
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(mean, covariance, mean + 0.5, covariance) == pytest.approx(20 * 0.25, abs=1e-6)
    assert frechet_distance(mean, covariance, mean, covariance * 0) == pytest.approx(np.trace(covariance))
    factor, order = metrics._factor(covariance)
    assert factor.shape == (20, 4)
    np.testing.assert_allclose(factor @ factor.T, covariance[np.ix_(order, order)], atol=1e-12)


def test_frechet_distance_refuses_nan_single_samples_and_other_widths() -> None:
    eye = np.eye(2)
    with pytest.raises(UsageError, match="mean_b holds 1 NaN or infinite values of 2;"):
        frechet_distance(np.zeros(2), eye, np.array([0, np.nan]), eye)
    with pytest.raises(UsageError, match="cov_a holds 4 NaN or infinite values of 4;"):
        frechet_distance(np.zeros(2), np.full((2, 2), np.inf), np.zeros(2), eye)
    pytest.raises(UsageError, mean_and_covariance, np.zeros((1, 2))).match("at least 2 samples, found 1")
    assert mean_and_covariance(np.array([[0.0], [2.0]])) == (1.0, 2.0)  # divisor N - 1
    for shape in ((3,), (0, 2)):
        pytest.raises(UsageError, mean_and_covariance, np.zeros(shape)).match(r"must have shape \(N, D\) with N >= 1")
    pytest.raises(UsageError, frechet_distance, np.zeros(2), eye, np.zeros(3), np.eye(3)).match("one width")
    pytest.raises(UsageError, mean_and_covariance, torch.full((3, 2), float("nan"))).match("NaN")


def test_inception_score_by_hand_in_splits_of_the_files_order() -> None:
    one_hot = np.eye(10)[np.arange(200) % 10]
    assert inception_score(one_hot) == pytest.approx(10)
    assert inception_score(np.full((200, 10), 0.1)) == pytest.approx(1)
    # Half the samples sure of class 0, half undecided between 0 and 1: by hand.
    mixed = np.array([[1.0, 0.0], [0.5, 0.5]])
    divergence = (np.log(1 / 0.75) + 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)) / 2
    assert inception_score(mixed) == pytest.approx(np.exp(divergence))
    sorted_by_class = np.eye(4)[np.repeat(np.arange(4), 10)]
    assert inception_score(sorted_by_class, split_size=10) == pytest.approx(1)  # each split holds one class
    assert inception_score(sorted_by_class, split_size=20) == pytest.approx(2)
    assert inception_score(sorted_by_class[:30], split_size=20) == pytest.approx((2 + 1) / 2)  # a short last split
    assert inception_score(np.eye(2)[np.repeat([0, 1], 5000)]) == pytest.approx(1)  # splits of 5,000
    for values in ([[0.9, 0.0], [0.9, 0.0]], [[1.5, -0.5], [0.5, 0.5]]):
        pytest.raises(UsageError, inception_score, np.array(values)).match("softmax")


def test_precision_and_recall_on_a_line() -> None:
    # Real points 0..3: with k=1 every ball has radius 1. Fake: three at 10.x, whose balls reach each other only,
    # one at 3.5 (inside the ball of 3) with its nearest neighbour 6.5 away (so its ball covers all real points).
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    fake = np.array([[3.5], [10.0], [10.1], [10.2]])
    assert precision_recall(real, fake, k=1) == (0.25, 1.0)
    # a point at the very edge of a ball is inside, on both sides: 5 is 2 from 3, the balls of 3 and 5 have radius 2
    assert precision_recall(np.array([[1.0], [3.0]]), np.array([[5.0], [7.0]]), k=1) == (0.5, 0.5)
    far = np.array([[20.0], [20.1], [20.2], [20.3]])
    assert precision_recall(real, far, k=1) == (0.0, 0.0)
    assert precision_recall(real, real.copy(), k=1) == (1.0, 1.0)
    # The 3rd neighbour of 0 is 3 away: 6 lies inside the ball of 3 (radius 3), not inside any with k=2 (radius <= 2).
    real = np.array([[0.0], [1.0], [2.0], [3.0]])
    fake = np.array([[6.0], [100.0], [200.0], [300.0]])
    assert precision_recall(real, fake)[0] == 0.25  # k is 3, as ADM's
    assert precision_recall(real, fake, k=2)[0] == 0.0


def test_precision_and_recall_are_the_same_in_chunks_and_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(5)
    real, fake = generator.normal(size=(150, 4)), generator.normal(size=(130, 4)) * 0.7 + 0.5

    def radius(points: np.ndarray) -> np.ndarray:
        return np.sort(((points[:, None] - points[None]) ** 2).sum(-1), axis=1)[:, 3]

    between = ((real[:, None] - fake[None]) ** 2).sum(-1)
    expected = (
        (between <= radius(real)[:, None]).any(axis=0).mean(),
        (between <= radius(fake)[None]).any(axis=1).mean(),
    )
    monkeypatch.setattr("vadit.eval.metrics._BLOCK", 37)
    assert precision_recall(real + 1000, fake + 1000) == pytest.approx(expected, abs=1e-12)
    half = precision_recall((real + 1000).astype(np.float32), torch.from_numpy(fake + 1000).float())
    assert half == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr("vadit.eval.metrics._BLOCK", 2)  # fewer columns than neighbours
    assert precision_recall(real + 1000, fake + 1000) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected[1] < expected[0] < 1


def test_features_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="more than 3 sample images, found 3"):
        precision_recall(np.zeros((5, 2)), np.zeros((3, 2)))
    with pytest.raises(UsageError, match="more than 3 reference images, found 3"):
        precision_recall(np.zeros((3, 2)), np.zeros((5, 2)))
    for wrong, message in ((np.zeros((5, 3)), "width 2 and sample features 3"), (np.full((5, 2), np.nan), "NaN")):
        pytest.raises(UsageError, precision_recall, np.zeros((5, 2)), wrong).match(message)


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.einsum("id,jd->ij", a, b) / a.shape[1] + 1) ** 3


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    within = [kernel(a, a)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
    return within[0] + within[1] - 2 * kernel(x, y).mean()


def test_squared_mmd_is_the_mean_over_all_pairs_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(23, 6)), generator.normal(size=(17, 6)) + 0.4
    for block in (4096, 5):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert squared_mmd(x, y) == pytest.approx(unbiased(x, y), rel=1e-12)
        assert squared_mmd(x, y, mean_kernel(x)) == pytest.approx(unbiased(x, y), rel=1e-12)
    assert squared_mmd(x[:2], y[:2]) == pytest.approx(unbiased(x[:2], y[:2]), rel=1e-12)
    pytest.raises(UsageError, squared_mmd, x, y[:1]).match("at least 2 images")


def test_kernel_distance_is_the_mean_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(2).normal(size=(250, 3))
    real, fake = features[:120], features[120:] + 0.3
    draw = np.random.default_rng(0)
    expected = [
        unbiased(real[draw.choice(120, 100, replace=False)], fake[draw.choice(130, 100, replace=False)])
        for _ in range(20)
    ]
    found = kernel_distance(real, fake, num_subsets=20, subset_size=100)
    assert found == pytest.approx(np.mean(expected), rel=1e-9)
    assert abs(kernel_distance(real, fake - 0.3, num_subsets=20, subset_size=100)) < 0.3 * found  # about 0: unbiased
    sizes: list[tuple[int, int]] = []
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "squared_mmd", lambda a, b: sizes.append((len(a), len(b))) or float(len(sizes)))
        assert kernel_distance(np.zeros((1001, 2)), np.zeros((1002, 2))) == np.arange(1, 101).mean()
    assert sizes == [(1000, 1000)] * 100
    # Whole sets as the one subset: E k(x,x') = (0 + 1)^3, E k(y,y') = (4 + 1)^3, cross = 1 (x = 0).
    zeros, twos = np.zeros((2, 2)), np.full((2, 2), 2.0)
    assert kernel_distance(zeros, twos, num_subsets=1, subset_size=2) == pytest.approx(1 + 125 - 2)
    for settings, message in (({"subset_size": 3}, "subset_size 3"), ({"subset_size": 1}, "subset_size 1")):
        pytest.raises(UsageError, kernel_distance, zeros, twos, **settings).match(message)
    pytest.raises(UsageError, kernel_distance, zeros, twos, subset_size=2, num_subsets=0).match("num_subsets is 0")


def test_counts_in_names() -> None:
    assert [count_name(count) for count in (999, 1000, 1797, 50_000)] == ["999", "1k", "1797", "50k"]

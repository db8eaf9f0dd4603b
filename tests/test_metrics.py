"""Frechet distance, inception score, precision and recall, kernel distance, and Table 6's uniformity of latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from vadit import cli
from vadit.eval import latents as uniformity
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
from vadit.runtime.errors import RunError, UsageError


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


def test_precision_and_recall_are_the_same_in_chunks_and_by_brute_force(monkeypatch) -> None:
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
    assert [count_name(count) for count in (999, 1000, 1797, 50_000)] == ["999", "1k", "1797", "50k"]


def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.einsum("id,jd->ij", a, b) / a.shape[1] + 1) ** 3


def unbiased(x: np.ndarray, y: np.ndarray) -> float:
    within = [kernel(a, a)[~np.eye(len(a), dtype=bool)].mean() for a in (x, y)]
    return within[0] + within[1] - 2 * kernel(x, y).mean()


def test_squared_mmd_is_the_mean_over_all_pairs_in_any_blocks(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(23, 6)), generator.normal(size=(17, 6)) + 0.4
    for block in (4096, 5):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert squared_mmd(x, y) == pytest.approx(unbiased(x, y), rel=1e-12)
        assert squared_mmd(x, y, mean_kernel(x)) == pytest.approx(unbiased(x, y), rel=1e-12)
    assert squared_mmd(x[:2], y[:2]) == pytest.approx(unbiased(x[:2], y[:2]), rel=1e-12)
    pytest.raises(UsageError, squared_mmd, x, y[:1]).match("at least 2 images")


def test_kernel_distance_is_the_mean_over_subsets(monkeypatch) -> None:
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


def test_closed_forms_of_the_densities() -> None:
    numbers = ("density_cv", "gini", "normalized_entropy")
    equal = uniformity.unevenness(np.full(64, 0.3))
    assert equal == pytest.approx(dict(zip(numbers, (0, 0, 1), strict=True)), abs=1e-12)
    # 1, 3: mean 2, std 1; Gini (|1-3| * 2) / (2 * 4 * 2); entropy of (1/4, 3/4) in bits over log2 2.
    two = uniformity.unevenness(np.array([3.0, 1.0]))
    assert two == pytest.approx(dict(zip(numbers, (0.5, 0.25, 0.25 * 2 + 0.75 * np.log2(4 / 3)), strict=True)))
    # 1..n: Gini (n - 1) / (3 n); all in one of n: (n - 1) / n, entropy 0.
    assert uniformity.unevenness(np.arange(100.0, 0, -1))["gini"] == pytest.approx(99 / 300)
    single = uniformity.unevenness(np.eye(8)[0])
    assert single["gini"] == pytest.approx(7 / 8) and single["normalized_entropy"] == 0


def test_densities_are_scotts_gaussian_mixture_at_the_points() -> None:
    points = np.random.default_rng(0).normal(size=(40, 2)) * [1.0, 3.0]
    covariance = np.cov(points.T) * 40 ** (-2 / 6)  # Scott: n^(-1/(d+4)) on the standard deviation, d = 2
    difference = points[:, None] - points[None]
    exponent = np.einsum("ijk,kl,ijl->ij", difference, np.linalg.inv(covariance), difference)
    expected = np.exp(-exponent / 2).mean(axis=1) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    np.testing.assert_allclose(uniformity.point_densities(points), expected, rtol=1e-10)


class Latents:
    """A set of 40 latents in memory that names image and position, and knows which of them were read."""

    size = 3

    def __init__(self) -> None:
        self.values = torch.empty(40, 2, 3, 3)
        self.values[:, 0] = torch.arange(40.0).reshape(40, 1, 1)
        self.values[:, 1] = torch.arange(9.0).reshape(3, 3)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, ids: Tensor, epoch: int, seed: int) -> tuple[Tensor, ...]:
        self.read += ids.tolist()
        return self.values[ids], torch.zeros(len(ids))


def test_vectors_are_one_position_of_distinct_images_which_alone_are_read(monkeypatch) -> None:
    latents = Latents()
    whole = uniformity.folder_vectors(latents, 24, 5)
    monkeypatch.setattr(uniformity, "READ_AT_ONCE", 7)
    np.testing.assert_array_equal(uniformity.folder_vectors(latents, 24, 5), whole)
    assert latents.read == [*whole[:, 0], *whole[:, 0]] and len(set(whole[:, 0])) == 24
    assert set(whole[:, 1]) <= set(range(9)) and len(set(whole[:, 1])) > 5
    assert not np.array_equal(uniformity.folder_vectors(latents, 24, 6), whole)
    assert len(uniformity.folder_vectors(latents, 40, 0)) == 40
    with pytest.raises(UsageError, match=r"--num-vectors is 41.* set --num-vectors 40 or less"):
        uniformity.folder_vectors(latents, 41, 5)


def test_vectors_of_a_file_are_normalised_by_channel_and_a_dead_one_divides_nothing() -> None:
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 4 + 7
    vectors[:, 1] = 2.5
    found = uniformity.file_vectors(vectors, 50, 0)
    np.testing.assert_array_equal(found[:, 1], 0)
    np.testing.assert_allclose(found[:, [0, 2]].std(axis=0, ddof=1), 1)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-12)
    part = uniformity.file_vectors(vectors, 20, 0)
    assert len({tuple(row) for row in part} & {tuple(row) for row in found}) == 20


def test_vectors_are_clustered_or_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(200, 2, generator=generator)
    centres = torch.tensor([[0.0, 0.0], [40.0, 0.0], [0.0, 90.0]])
    sizes = torch.tensor([10, 60, 130])  # clusters of unequal weight: the density differs between them
    clustered = torch.randn(200, 2, generator=generator) + centres.repeat_interleave(sizes, 0)

    def evaluate(vectors: Tensor) -> dict[str, float]:
        return uniformity.evaluate_latents(lambda count, _seed: vectors[:count].numpy(), 200, [0])[0]

    even, uneven = evaluate(spread), evaluate(clustered)
    assert even == evaluate(spread)
    assert uneven["density_cv"] > 1.2 * even["density_cv"] and uneven["gini"] > 1.2 * even["gini"]
    assert uneven["normalized_entropy"] < even["normalized_entropy"] <= 1
    vectors = np.random.default_rng(0).normal(size=(100, 3))
    with pytest.raises(UsageError, match=r"--num-vectors is 90; .* more than 90 latent vectors"):
        uniformity.embed(vectors[:90])
    pytest.raises(UsageError, uniformity.embed, np.ones((100, 3))).match("collapsed")
    vectors[5, 1] = np.nan
    pytest.raises(UsageError, uniformity.embed, vectors).match("1 values that are NaN")


def test_vectors_are_read_from_any_tensor_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    vectors = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "v.npy", vectors.numpy())
    np.savez(tmp_path / "v.npz", vectors=vectors.numpy(), labels=np.zeros(120))
    torch.save(vectors, tmp_path / "v.pt")
    save_file({"latents": vectors}, tmp_path / "v.safetensors")
    for name in ("v.npy", "v.npz", "v.pt", "v.safetensors"):
        assert torch.equal(uniformity.read_vectors(tmp_path / name), vectors), name
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 cut off")
    pytest.raises(RunError, uniformity.read_vectors, tmp_path / "damaged.pt").match(r"damaged\.pt cannot be read")


def test_seeds_give_a_mean_with_its_spread_and_the_first_one_a_picture(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(uniformity, "embed", lambda vectors, seed: vectors[:, :2] ** seed)  # t-SNE takes seconds
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(130, 3)))
    out, picture = tmp_path / "numbers.json", tmp_path / "points.png"
    arguments = ["evaluate", "latents", "--latents", str(tmp_path / "vectors.npy"), "--out", str(out)]
    assert cli.main([*arguments, "--num-vectors", "100", "--seeds", "2", "--seed", "3", "--picture", str(picture)]) == 0
    assert "are of 100 vectors, the paper's of 10,000" in capsys.readouterr().err
    assert cli.main([*arguments[:4], "--seeds", "1", "--out", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text())["inputs"]["num_vectors"] == 130  # all that there are
    each = uniformity.evaluate_latents(uniformity.open_vectors(tmp_path / "vectors.npy")[0], 100, [3, 4])
    found = json.loads(out.read_text())
    for name in ("density_cv", "gini", "normalized_entropy"):
        values = [one[name] for one in each]
        assert found["metrics"][name] == pytest.approx(np.mean(values))
        assert found["spread"][name] == pytest.approx(np.std(values, ddof=1))
    assert found["inputs"]["seeds"] == [3, 4]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50
    assert cli.main([*arguments, "--seeds", "0"]) == 2
    assert "--seeds is 0" in capsys.readouterr().err

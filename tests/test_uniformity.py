"""Table 6's numbers: closed forms, the protocol's choice of vectors, and that clusters read as less uniform."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vadit import cli
from vadit.eval import latents as uniformity
from vadit.runtime.errors import RunError, UsageError


def test_closed_forms_of_the_densities() -> None:
    equal = np.full(64, 0.3)
    assert uniformity.coefficient_of_variation(equal) == pytest.approx(0, abs=1e-12)
    assert uniformity.gini_coefficient(equal) == pytest.approx(0, abs=1e-12)
    assert uniformity.normalized_entropy(equal) == pytest.approx(1)
    # 1, 3: mean 2, std 1; Gini (|1-3| * 2) / (2 * 4 * 2); entropy of (1/4, 3/4) in bits over log2 2.
    values = np.array([3.0, 1.0])
    assert uniformity.coefficient_of_variation(values) == pytest.approx(0.5)
    assert uniformity.gini_coefficient(values) == pytest.approx(0.25)
    assert uniformity.normalized_entropy(values) == pytest.approx(0.25 * 2 + 0.75 * np.log2(4 / 3))
    # 1..n: Gini (n - 1) / (3 n); all in one of n: (n - 1) / n, entropy 0.
    assert uniformity.gini_coefficient(np.arange(100.0, 0, -1)) == pytest.approx(99 / 300)
    single = np.eye(8)[0]
    assert uniformity.gini_coefficient(single) == pytest.approx(7 / 8)
    assert uniformity.normalized_entropy(single) == 0


def test_densities_are_scotts_gaussian_mixture_at_the_points() -> None:
    points = np.random.default_rng(0).normal(size=(40, 2)) * [1.0, 3.0]
    covariance = np.cov(points.T) * 40 ** (-2 / 6)  # Scott: n^(-1/(d+4)) on the standard deviation, d = 2
    difference = points[:, None] - points[None]
    exponent = np.einsum("ijk,kl,ijl->ij", difference, np.linalg.inv(covariance), difference)
    expected = np.exp(-exponent / 2).mean(axis=1) / (2 * np.pi * np.sqrt(np.linalg.det(covariance)))
    np.testing.assert_allclose(uniformity.point_densities(points), expected, rtol=1e-10)
    assert uniformity.uniformity(points) == pytest.approx(
        {
            "density_cv": uniformity.coefficient_of_variation(expected),
            "gini": uniformity.gini_coefficient(expected),
            "normalized_entropy": uniformity.normalized_entropy(expected),
        }
    )


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


def test_vectors_are_one_position_of_distinct_images_which_alone_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_clustered_latents_are_less_uniform_than_spread_ones() -> None:
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


def test_unusable_vectors_are_refused() -> None:
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


def test_seeds_give_a_mean_with_its_spread_and_the_first_one_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uniformity, "embed", lambda vectors, seed: vectors[:, :2] ** seed)  # t-SNE takes seconds
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(130, 3)))
    out, picture = tmp_path / "numbers.json", tmp_path / "points.png"
    arguments = ["evaluate", "latents", "--latents", str(tmp_path / "vectors.npy"), "--out", str(out)]
    assert cli.main([*arguments, "--num-vectors", "100", "--seeds", "2", "--seed", "3", "--picture", str(picture)]) == 0
    each = uniformity.evaluate_latents(uniformity.open_vectors(tmp_path / "vectors.npy"), 100, [3, 4])
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

"""Parts of the evaluation: incomplete sets, kept references, DINOv2's positions, latents read in part, seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vadit import cli
from vadit.config import FoundationSpec
from vadit.eval import image_files, inception, metrics, samples
from vadit.eval import latents as uniformity
from vadit.eval.inception import InceptionFeatures
from vadit.models.foundation import ImageSummary
from vadit.runtime.errors import RunError, UsageError


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


class SmallExtractor:
    """Stands for Inception: a few values of each image. Counts the images that it has seen."""

    seen = 0

    def __init__(self, _weights: object, _device: object) -> None:
        pass

    def __call__(self, pixels: Tensor) -> InceptionFeatures:
        SmallExtractor.seen += len(pixels)
        values = pixels.float().flatten(1) / 255
        return InceptionFeatures(values[:, :5], values[:, 5:9], values[:, 9:12].softmax(1))

    def pool(self, pixels: Tensor) -> Tensor:
        return self(pixels).pool


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(samples, "Inception", SmallExtractor)
    (tmp_path / "weights.pth").write_bytes(b"not read")
    return tmp_path


# ------------------------------------------------------------------------------------------ numbers


def test_the_factor_of_a_covariance_gives_it_back_with_its_rank() -> None:
    for count, rank in ((200, 30), (8, 7)):
        _, covariance = metrics.mean_and_covariance(np.random.default_rng(1).normal(size=(count, 30)))
        factor, order = metrics._factor(covariance)
        assert factor.shape == (30, rank)
        np.testing.assert_allclose(factor @ factor.T, covariance[np.ix_(order, order)], atol=1e-12)


def test_squared_mmd_is_the_mean_over_all_pairs_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(23, 6)), generator.normal(size=(17, 6)) + 0.4

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (np.einsum("id,jd->ij", a, b) / 6 + 1) ** 3

    def within(a: np.ndarray) -> float:
        return float(kernel(a, a)[~np.eye(len(a), dtype=bool)].mean())

    expected = within(x) + within(y) - 2 * kernel(x, y).mean()
    for block in (4096, 5):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        assert metrics.squared_mmd(x, y) == pytest.approx(expected, rel=1e-12)
        assert metrics.squared_mmd(x, y, metrics.mean_kernel(x)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match="at least 2 images"):
        metrics.squared_mmd(x, y[:1])


# ------------------------------------------------------------------------------------------ sets of images


def test_a_part_of_a_set_is_refused(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "drawn" / "images", pictures(4))
    (tmp_path / "drawn" / "settings.json").write_text("{}")
    assert len(image_files.open_images(tmp_path / "drawn")) == 4
    (folder / "000001.png").unlink()
    with pytest.raises(UsageError, match=r"lacks image 000001\.png"):
        image_files.open_images(tmp_path / "drawn")
    other = write_pngs(tmp_path / "other", pictures(2))
    Image.fromarray(pictures(1)[0]).save(other / "2.webp")
    with pytest.raises(UsageError, match=r"2\.webp is no PNG"):
        image_files.open_images(other)
    disguised = write_pngs(tmp_path / "disguised", pictures(1))
    Image.fromarray(pictures(1)[0]).save(disguised / "000001.png", format="jpeg")
    with pytest.raises(UsageError, match="JPEG by its content"):
        list(image_files.open_images(disguised).batches(2))


def test_sets_can_be_read_from_the_middle(tmp_path: Path) -> None:
    images = pictures(9)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    for path in (tmp_path / "plain.npz", tmp_path / "small.npz", write_pngs(tmp_path / "png", images)):
        source = image_files.open_images(path)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(2, 4, 3))), images[3:7])
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4, first=6))), images[6:])


def test_statistics_without_spatial_ones_give_no_sfid(small: Path) -> None:
    theirs = SmallExtractor(None, None)(torch.from_numpy(pictures(9, 1)).permute(0, 3, 1, 2))
    mu, sigma = metrics.mean_and_covariance(theirs.pool)
    np.savez(small / "mixed.npz", mu=mu, sigma=sigma, arr_0=pictures(9, 1))
    np.savez(small / "drawn.npz", arr_0=pictures(6, 2))
    found = samples.evaluate_samples(small / "drawn.npz", small / "mixed.npz", inception_weights="x")
    assert found.sfid is None and found.precision is not None


def test_seeds_cut_one_set_into_equal_parts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = pictures(12, 3)
    np.savez(small / "real.npz", arr_0=pictures(8, 9))
    np.savez(small / "drawn.npz", arr_0=drawn)
    common = ["--reference", str(small / "real.npz"), "--sampler", "x", "--device", "cpu", "--num-samples", "6"]
    common += ["--inception-weights", str(small / "weights.pth")]
    out = small / "all.json"
    arguments = ["evaluate", "samples", str(small / "drawn.npz"), *common, "--seeds"]
    assert cli.main([*arguments, "2", "--out", str(out)]) == 0
    parts = []
    for part in (drawn[:6], drawn[6:]):
        np.savez(small / "part.npz", arr_0=part)
        parts.append(samples.evaluate_samples(small / "part.npz", small / "real.npz", inception_weights="x").fid)
    found = json.loads(out.read_text())
    assert found["metrics"]["fid6_x"] == pytest.approx(np.mean(parts))
    assert found["spread"]["fid6_x"] == pytest.approx(np.std(parts, ddof=1))
    assert found["inputs"]["inception_published"] is False
    assert "not the published ones" in capsys.readouterr().out
    assert cli.main([*arguments, "3"]) == 2
    message = capsys.readouterr()
    assert "holds 12 images, 18 were asked for" in message.err and "fid" not in message.out


# ------------------------------------------------------------------------------------------ networks


def test_a_scorer_keeps_its_reference_on_disk(small: Path) -> None:
    reference, cache = small / "real.npz", small / "cache"
    np.savez(reference, arr_0=pictures(9, 1))
    drawn = torch.from_numpy(pictures(6, 2)).permute(0, 3, 1, 2)

    def score() -> tuple[dict[str, float], int]:
        before = SmallExtractor.seen
        scorer = samples.SampleScorer(reference, inception_weights=small / "weights.pth", batch_size=4, cache=cache)
        loaded = SmallExtractor.seen - before
        return scorer.score(scorer.features(drawn), "x"), loaded

    first = score()
    assert first[1] == 9 and first[0].keys() == {"fid6_x", "kid6_x"}
    assert score() == (first[0], 0)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert score() == first
    np.savez(reference, arr_0=pictures(9, 4))  # of the same size as before
    assert score()[1] == 9
    theirs = SmallExtractor(None, None)(torch.from_numpy(pictures(9, 1)).permute(0, 3, 1, 2)).pool
    np.savez(reference, **dict(zip(("mu", "sigma"), metrics.mean_and_covariance(theirs), strict=True)))
    assert score()[0].keys() == {"fid6_x"}
    assert score()[0]["fid6_x"] == pytest.approx(first[0]["fid6_x"])


def test_building_inception_leaves_the_random_state_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as port

    def build(*_args: object) -> nn.Module:
        return nn.Linear(8, 8)  # draws its weights, as the real one does

    monkeypatch.setattr(port, "FeatureExtractorInceptionV3", build)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    inception._build(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_position_embeddings_are_resized_as_dinov2_does() -> None:
    sizes: dict[str, int | float | str | bool] = {"img_size": 296, "patch_size": 8, "embed_dim": 4, "depth": 1}
    spec = FoundationSpec(name="vit_tiny_patch16_224", weights="random", model_args={**sizes, "num_heads": 1})
    torch.manual_seed(0)
    old = ImageSummary(spec, side=296)._model.pos_embed[0, 1:].reshape(37, 37, 4).double().numpy()
    torch.manual_seed(0)
    summary = ImageSummary(spec, side=128)
    found = summary._model.pos_embed
    assert found.shape == (1, 1 + 16 * 16, 4)

    def weight(distance: float) -> float:  # cubic convolution with a = -0.75 (Keys 1981), as torch has it
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    across = np.zeros((16, 37))
    for row in range(16):
        place = (row + 0.5) * 37 / 16.1 - 0.5
        for near in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            across[row, min(max(near, 0), 36)] += weight(place - near)
    expected = np.einsum("ia,jb,abc->ijc", across, across, old).reshape(256, 4)
    np.testing.assert_allclose(found[0, 1:].numpy(), expected, atol=1e-5)
    image = torch.from_numpy(pictures(1, 3, 64)).permute(0, 3, 1, 2)
    assert summary(image).shape == (1, 4)  # timm takes the table as it is


# ------------------------------------------------------------------------------------------ latents


class Latents:
    """A set of 40 latents in memory that tells which of them were read."""

    size = 3

    def __init__(self) -> None:
        self.values = torch.randn(40, 2, 3, 3, generator=torch.Generator().manual_seed(0))
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, ids: Tensor, epoch: int, seed: int) -> tuple[Tensor, ...]:
        self.read += ids.tolist()
        return self.values[ids], torch.zeros(len(ids))


def test_latents_of_a_folder_are_read_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uniformity, "READ_AT_ONCE", 7)
    latents = Latents()
    found = uniformity.folder_vectors(latents, 24, 5)
    unchanged = {"mean": torch.zeros(2), "std": torch.ones(2)}
    np.testing.assert_array_equal(found, uniformity.latent_vectors(latents.values, 24, seed=5, **unchanged))
    assert len(latents.read) == len(set(latents.read)) == 24
    with pytest.raises(UsageError, match=r"--num-vectors is 41.* set --num-vectors 40 or less"):
        uniformity.folder_vectors(latents, 41, 5)


def test_a_dead_channel_of_vectors_divides_nothing() -> None:
    vectors = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    vectors[:, 1] = 2.5
    found = uniformity.draw_vectors(vectors, 50, 0)
    np.testing.assert_array_equal(found[:, 1], 0)
    np.testing.assert_allclose(found[:, [0, 2]].std(axis=0, ddof=1), 1)


def test_seeds_of_latents_give_a_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vectors = np.random.default_rng(0).normal(size=(130, 3))
    np.save(tmp_path / "vectors.npy", vectors)
    out = tmp_path / "numbers.json"
    arguments = ["evaluate", "latents", "--latents", str(tmp_path / "vectors.npy"), "--out", str(out)]
    assert cli.main([*arguments, "--num-vectors", "100", "--seeds", "2"]) == 0
    each = [
        uniformity.evaluate_latents(uniformity.draw_vectors(torch.from_numpy(vectors), 100, seed), seed).density_cv
        for seed in (0, 1)
    ]
    found = json.loads(out.read_text())
    assert found["metrics"]["density_cv"] == pytest.approx(np.mean(each))
    assert found["spread"]["density_cv"] == pytest.approx(np.std(each, ddof=1))
    assert found["inputs"]["seeds"] == [0, 1]
    assert cli.main([*arguments, "--seeds", "0"]) == 2
    assert "--seeds is 0" in capsys.readouterr().err


def test_too_few_images_leave_no_numbers(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(small / "real.npz", arr_0=pictures(8, 9))
    np.savez(small / "one.npz", arr_0=pictures(1))
    arguments = ["--reference", str(small / "real.npz"), "--out", str(small / "none.json")]
    arguments += ["--inception-weights", str(small / "weights.pth"), "--device", "cpu"]
    assert cli.main(["evaluate", "samples", str(small / "one.npz"), *arguments]) == 2
    assert "at least 2 images, found 1" in capsys.readouterr().err
    assert not (small / "none.json").exists()
    with pytest.raises(RunError, match="images were promised"):
        samples.write_reference(small / "r.npz", [], num_images=2, inception_weights="x")

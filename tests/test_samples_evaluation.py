"""Samples to named numbers: what is read and refused, Inception's layers, the evaluation as a whole, references."""

import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vadit import cli
from vadit.config import FoundationSpec
from vadit.eval import image_files, inception, samples
from vadit.eval.inception import Inception, InceptionFeatures
from vadit.eval.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
    squared_mmd,
)
from vadit.models.foundation import ImageSummary
from vadit.runtime.errors import RunError, UsageError


def pictures(count: int, seed: int = 0, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


def write_pngs(folder: Path, images: np.ndarray, digits: int = 6) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:0{digits}d}.png")
    return folder


class SmallExtractor:
    """Stands for Inception, whose 2048-wide eigenvalue problems take seconds each: 5, 4 and 3 numbers per image."""

    seen = 0

    def __init__(self, _weights: object, _device: object) -> None:
        pass

    def __call__(self, pixels: Tensor) -> InceptionFeatures:
        SmallExtractor.seen += len(pixels)
        values = pixels.float().flatten(1) / 255
        return InceptionFeatures(values[:, :5], values[:, 5:9], values[:, 9:12].softmax(1))

    def pool(self, pixels: Tensor) -> Tensor:
        return self(pixels).pool


def extract(images: np.ndarray) -> InceptionFeatures:
    return SmallExtractor(None, None)(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(samples, "Inception", SmallExtractor)
    (tmp_path / "weights.pth").write_bytes(b"not read")
    return tmp_path


def evaluate(drawn: Path, reference: Path, num_samples: int | None = None, **options: object) -> dict[str, float]:
    evaluator = samples.SampleEvaluator(reference, inception_weights="x", batch_size=3, **options)  # type: ignore
    return evaluator.evaluate(drawn, num_samples=num_samples)[1]


def test_pngs_and_npz_give_the_same_images_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images = pictures(11)
    folder = write_pngs(tmp_path / "png", images, digits=1)  # 10.png sorts before 2.png by name
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    for path in (folder, tmp_path / "plain.npz", tmp_path / "small.npz"):
        source = image_files.open_images(path)
        assert (len(source), source.size) == (11, (16, 16))
        batches = list(source.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        np.testing.assert_array_equal(np.concatenate(batches), images)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4, limit=5))), images[:5])
        np.testing.assert_array_equal(np.concatenate(list(source.batches(2, 4, 3))), images[3:7])
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4, first=6))), images[6:])


def test_what_vadit_sample_wrote_is_read_whole_or_refused(tmp_path: Path) -> None:
    folder = write_pngs(tmp_path / "images", pictures(4))
    Image.fromarray(pictures(1, side=24)[0]).save(tmp_path / "grid.png")
    (tmp_path / "settings.json").write_text("{}")
    np.testing.assert_array_equal(np.concatenate(list(image_files.open_images(tmp_path).batches(8))), pictures(4))
    (folder / "000001.png").unlink()
    pytest.raises(UsageError, image_files.open_images, tmp_path).match(r"lacks image 000001\.png")


def test_unusable_image_sets_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refuse(path: Path, match: str, kind: type[Exception] = UsageError) -> None:
        with pytest.raises(kind, match=match):
            list(image_files.open_images(path).batches(2))

    mixed = write_pngs(tmp_path / "mixed", pictures(2))
    Image.fromarray(pictures(1, side=12)[0]).save(mixed / "000002.png")
    refuse(mixed, "12x12 pixels, 000000.png is 16x16")
    other = write_pngs(tmp_path / "other", pictures(2))
    Image.fromarray(pictures(1)[0]).save(other / "2.webp")
    refuse(other, r"2\.webp is no PNG")
    disguised = write_pngs(tmp_path / "disguised", pictures(1))
    Image.fromarray(pictures(1)[0]).save(disguised / "000001.png", format="jpeg")
    refuse(disguised, "JPEG by its content")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes((mixed / "000000.png").read_bytes()[:60])
    refuse(tmp_path / "broken", "does not decode", RunError)
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    refuse(tmp_path / "float.npz", "float32")
    np.savez(tmp_path / "cut.npz", arr_0=pictures(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    refuse(tmp_path / "cut.npz", "cannot be read", RunError)
    long = b"\x93NUMPY\2\0" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)  # numpy would read all of it
    with zipfile.ZipFile(tmp_path / "header.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", long)
    refuse(tmp_path / "header.npz", "a header of 1,048,576 bytes", RunError)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        np.save(tmp_path / "whole.npy", pictures(2))
        archive.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-10])
    refuse(tmp_path / "short.npz", "truncated", RunError)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published one's layout, with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_args, **_kw: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda *_args, **_kw: None)
        torch.manual_seed(0)
        network = port.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / inception.WEIGHTS_FILE
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_named_and_leaves_the_random_state_alone(weights: Path, tmp_path: Path, monkeypatch) -> None:
    for path in (None, tmp_path / "nowhere.pth"):
        with pytest.raises(UsageError, match=r"weights-inception-2015-12-05-6726825d\.pth.*--inception-weights"):
            Inception(path)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    pytest.raises(UsageError, Inception, tmp_path / "other.pth").match("is not torch-fidelity's Inception")
    from torch_fidelity import feature_extractor_inceptionv3 as port

    monkeypatch.setattr(port, "FeatureExtractorInceptionV3", lambda *_args: nn.Linear(8, 8))  # draws its weights, too
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    inception._load(weights)
    assert torch.equal(torch.rand(3), expected)


def test_inception_takes_the_three_layers_of_the_protocol(weights: Path, monkeypatch, capsys) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pixels = torch.from_numpy(pictures(2, side=20)).permute(0, 3, 1, 2)
    load, opened = torch.load, []
    monkeypatch.setattr(torch, "load", lambda file, **how: opened.append((file, how)) or load(file, **how))
    found = Inception(weights)(pixels)
    monkeypatch.undo()
    files = [how["weights_only"] for file, how in opened if not isinstance(file, io.BytesIO)]
    assert files == [True], "the file is opened once, and never to run what it holds"
    assert "is not the published file: its SHA-256 is" in capsys.readouterr().err
    assert [tuple(part.shape) for part in found] == [(2, 2048), (2, 2023), (2, 1008)]
    network = FeatureExtractorInceptionV3("port", ["2048", "logits_unbiased"], str(weights))
    inputs: list[Tensor] = []
    network.Mixed_6d.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    pool, _ = network(pixels)
    torch.testing.assert_close(found.pool, pool)
    torch.testing.assert_close(found.probabilities, (pool @ network.fc.weight.T).softmax(1))
    branch = network.Mixed_6d.branch1x1
    spatial = torch.relu(branch.bn(branch.conv(inputs[0])))
    # NHWC order: the 7 channels of position (0, 0) come first, then those of (0, 1)
    torch.testing.assert_close(found.spatial, spatial.permute(0, 2, 3, 1)[..., :7].flatten(1))
    pytest.raises(UsageError, Inception(weights), pixels.float()).match("uint8")


def test_a_summary_is_the_class_token_of_images_scaled_by_pillow() -> None:
    spec = FoundationSpec(
        name="vit_tiny_patch16_224", weights="random", model_args={"embed_dim": 32, "depth": 1, "num_heads": 2}
    )
    torch.manual_seed(0)
    summary = ImageSummary(spec)
    image = pictures(1, 3, 256)[0]
    found = summary(torch.from_numpy(image).permute(2, 0, 1)[None])
    scaled = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    x = torch.from_numpy(scaled.copy()).permute(2, 0, 1)[None].float() / 255
    tokens = summary.model.forward_features((x - 0.5) / 0.5)  # this model's mean and deviation
    torch.testing.assert_close(found, tokens[:, 0].detach(), rtol=1e-4, atol=1e-5)


def test_position_embeddings_are_resized_as_dinov2_does() -> None:
    sizes: dict[str, int | float | str | bool] = {"img_size": 296, "patch_size": 8, "embed_dim": 4, "depth": 1}
    spec = FoundationSpec(name="vit_tiny_patch16_224", weights="random", model_args={**sizes, "num_heads": 1})
    torch.manual_seed(0)
    old = ImageSummary(spec, side=296).model.pos_embed[0, 1:].reshape(37, 37, 4).double().numpy()
    torch.manual_seed(0)
    summary = ImageSummary(spec, side=128)
    found = summary.model.pos_embed
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


def test_evaluation_against_images_and_against_stored_statistics(small: Path) -> None:
    drawn, real = pictures(8, 1), pictures(6, 2) // 2
    folder = write_pngs(small / "drawn", drawn)
    np.savez(small / "real.npz", arr_0=real)
    against_images = evaluate(folder, small / "real.npz", num_samples=7)
    ours, theirs = extract(drawn[:7]), extract(real)
    mu, sigma = mean_and_covariance(theirs.pool)
    mu_s, sigma_s = mean_and_covariance(theirs.spatial)
    precision, recall = precision_recall(theirs.pool, ours.pool)
    expected = {
        "fid": frechet_distance(*mean_and_covariance(ours.pool), mu, sigma),
        "sfid": frechet_distance(*mean_and_covariance(ours.spatial), mu_s, sigma_s),
        "is": inception_score(ours.probabilities),
        "precision": precision,
        "recall": recall,
        "kid": kernel_distance(theirs.pool, ours.pool, subset_size=6),  # as many as there are of both
    }
    assert against_images == pytest.approx(expected, rel=1e-6)

    moments = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s}
    np.savez(small / "statistics.npz", **moments)
    stored = evaluate(folder, small / "statistics.npz", num_samples=7)
    assert stored == pytest.approx({name: expected[name] for name in ("fid", "sfid", "is")}, rel=1e-6)
    # ADM's own files: statistics of the whole data set, and a part of its images for precision and recall.
    np.savez(small / "both.npz", arr_0=real, **moments | {"mu": mu + 1})
    both = evaluate(folder, small / "both.npz", num_samples=7)
    assert both["fid"] == pytest.approx(frechet_distance(*mean_and_covariance(ours.pool), mu + 1, sigma))
    assert both | {"fid": 0} == pytest.approx(against_images | {"fid": 0})
    # without mu_s there is no sFID: that of the images alone would be of another set than the FID beside it
    np.savez(small / "mixed.npz", arr_0=real, mu=mu, sigma=sigma)
    assert evaluate(folder, small / "mixed.npz").keys() == expected.keys() - {"sfid"}


def test_a_reference_of_two_images_will_do_and_of_one_will_not(small: Path) -> None:
    np.savez(small / "drawn.npz", arr_0=pictures(6, 1))
    np.savez(small / "two.npz", arr_0=pictures(2, 2))
    with pytest.raises(UsageError, match="more than 3 reference images, found 2"):
        evaluate(small / "drawn.npz", small / "two.npz")
    np.savez(small / "one.npz", arr_0=pictures(1, 2))
    pytest.raises(UsageError, evaluate, small / "drawn.npz", small / "one.npz").match("at least 2 images, found 1")
    mu, sigma = mean_and_covariance(extract(pictures(9, 1)).pool)
    np.savez(small / "half.npz", mu=mu)
    pytest.raises(UsageError, evaluate, small / "drawn.npz", small / "half.npz").match("mu without sigma")
    np.savez(small / "statistics.npz", mu=mu, sigma=sigma)
    assert evaluate(small / "drawn.npz", small / "statistics.npz", num_samples=2).keys() == {"fid", "is"}
    with pytest.raises(UsageError, match="FD-DINOv2 needs the reference's images"):
        evaluate(small / "drawn.npz", small / "statistics.npz", dinov2=lambda images: images)


def test_fd_dinov2_is_a_frechet_distance_of_both_sets(small: Path) -> None:
    drawn, real = pictures(8, 1), pictures(6, 2) // 2
    np.savez(small / "drawn.npz", arr_0=drawn)
    np.savez(small / "real.npz", arr_0=real)

    def summary(images: Tensor) -> Tensor:
        return images.float().mean(dim=(2, 3))

    found = evaluate(small / "drawn.npz", small / "real.npz", dinov2=summary)
    moments = [mean_and_covariance(x.astype(np.float32).mean(axis=(1, 2))) for x in (real, drawn)]
    assert found["fd_dinov2"] == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-5)


def test_names_carry_count_and_sampler() -> None:
    numbers = {"fid": 2.0, "fd_dinov2": 3.0}
    assert samples.named(numbers, 50_000, "euler249") == {"fid50k_euler249": 2.0, "fd_dinov2_50k_euler249": 3.0}


def test_splits_of_the_inception_score_that_are_not_alike_are_said(capsys) -> None:
    def said(labels: np.ndarray) -> str:
        probabilities = np.eye(10)[labels]
        samples._warn_of_splits(probabilities, inception_score(probabilities), "drawn.npz")
        return capsys.readouterr().err

    in_order, drawn = np.repeat(np.arange(10), 1200), np.random.default_rng(0).integers(0, 10, 12_000)
    assert re.search(
        r"last split has 2,000 samples.*\n.*score is 3\.\d+, shuffled 9\.\d+: the samples are", said(in_order)
    )
    assert said(drawn).count("\n") == 1 and "last split has 2,000" in said(drawn)
    assert not said(drawn[:10_000]) and not said(in_order[:4_000])


def test_seeds_give_means_and_their_spread(small: Path, capsys) -> None:
    np.savez(small / "real.npz", arr_0=pictures(12, 9))
    for seed in range(3):
        np.savez(small / f"drawn-{seed}.npz", arr_0=pictures(8, seed))
    np.savez(small / "all.npz", arr_0=np.concatenate([pictures(8, seed) for seed in range(3)]))
    common = ["--reference", str(small / "real.npz"), "--sampler", "x", "--device", "cpu"]
    common += ["--inception-weights", str(small / "weights.pth")]

    def run(name: str, *arguments: str) -> dict[str, dict[str, float]]:
        out = small / "numbers.json"
        assert cli.main(["evaluate", "samples", str(small / name), *common, *arguments, "--out", str(out)]) == 0
        return json.loads(out.read_text())

    each = [run(f"drawn-{seed}.npz") for seed in range(3)]
    assert "spread" not in each[0] and each[0]["inputs"]["inception_published"] is False
    assert each[0]["inputs"]["num_references"] == 12
    capsys.readouterr()
    names = {f"{name}8_x" for name in ("fid", "sfid", "is", "precision", "recall", "kid")}
    assert set(each[0]["metrics"]) == names
    seen = SmallExtractor.seen
    found = run("drawn-{seed}.npz", "--seeds", "3")
    assert SmallExtractor.seen == seen + 12 + 3 * 8, "the reference was read once for all seeds"
    for name in names:
        values = [one["metrics"][name] for one in each]
        assert found["metrics"][name] == pytest.approx(np.mean(values))
        assert found["spread"][name] == pytest.approx(np.std(values, ddof=1))
    assert "+-" in capsys.readouterr().out
    cut = run("all.npz", "--seeds", "3", "--num-samples", "8")
    assert cut["metrics"] == found["metrics"] and cut["spread"] == found["spread"]
    capsys.readouterr()

    def refuse(name: str, *arguments: str) -> str:
        assert cli.main(["evaluate", "samples", str(small / name), *common, *arguments]) == 2
        said = capsys.readouterr()
        assert "fid" not in said.out
        return said.err

    assert "holds 24 images, 32 were asked for" in refuse("all.npz", "--seeds", "4", "--num-samples", "8")
    assert "{seed}" in refuse("all.npz", "--seeds", "3")
    np.savez(small / "drawn-1.npz", arr_0=pictures(7, 1))
    assert "sets of one size" in refuse("drawn-{seed}.npz", "--seeds", "3")


def test_a_reference_that_was_made_gives_the_numbers_of_its_images(small: Path, capsys) -> None:
    real = pictures(10, 1)
    folder = write_pngs(small / "real", real)
    np.savez(small / "drawn.npz", arr_0=pictures(6, 2))
    arguments = ["evaluate", "make-reference", str(folder), "--image-size", "16", "--keep", "4", "--device", "cpu"]
    arguments += ["--num-workers", "1", "--batch-size", "3", "--inception-weights", str(small / "weights.pth"), "--out"]
    assert cli.main([*arguments, str(small / "made.npz")]) == 0
    with np.load(small / "made.npz") as made:
        np.testing.assert_array_equal(made["arr_0"], real[[0, 3, 6, 9]])
        assert (int(made["num_images"]), str(made["alpha"]), str(made["exif"])) == (10, "drop", "ignore")
    assert f"{folder}: 10 images are fewer than 2,048: FID is too large" in capsys.readouterr().err
    np.savez(small / "large.npz", arr_0=pictures(6, 2, side=20))
    command = ["evaluate", "samples", str(small / "large.npz"), "--reference", str(small / "made.npz")]
    assert cli.main([*command, "--device", "cpu", "--inception-weights", str(small / "weights.pth")]) == 0
    said = capsys.readouterr().err
    assert f"large.npz holds images of 20x20 pixels, {small / 'made.npz'} of 16x16" in said
    assert "large.npz: 6 images are fewer" in said and "made.npz: 10 images are fewer" in said
    assert "samples: 6 of 6" in said and "reference: 4 of 4" in said
    found, expected = (evaluate(small / "drawn.npz", path) for path in (small / "made.npz", folder))
    assert {name: found[name] for name in ("fid", "sfid")} == pytest.approx(
        {name: expected[name] for name in ("fid", "sfid")}, rel=1e-9
    )
    (folder / "000004.png").write_bytes(b"cut")
    assert cli.main([*arguments, str(small / "short.npz")]) == 1
    assert not (small / "short.npz").exists()


def test_a_scorer_gives_the_numbers_of_the_files_and_keeps_its_reference(small: Path) -> None:
    reference, cache = small / "real.npz", small / "cache"
    np.savez(reference, arr_0=pictures(9, 1))
    drawn = pictures(6, 2)

    def score() -> tuple[dict[str, float], int]:
        before = SmallExtractor.seen
        scorer = samples.SampleScorer(reference, inception_weights=small / "weights.pth", batch_size=4, cache=cache)
        loaded = SmallExtractor.seen - before
        return scorer.score(scorer.features(torch.from_numpy(drawn).permute(0, 3, 1, 2)), "x"), loaded

    first, theirs, ours = score(), extract(pictures(9, 1)).pool, extract(drawn).pool
    fid = frechet_distance(*mean_and_covariance(theirs), *mean_and_covariance(ours))
    assert first == (pytest.approx({"fid6_x": fid, "kid6_x": squared_mmd(theirs, ours)}), 9)
    assert score() == (first[0], 0)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert score() == first
    np.savez(reference, arr_0=pictures(9, 4))  # of the same size as before
    assert score()[1] == 9 and score()[1] == 0
    (small / "weights.pth").write_bytes(b"another network")
    assert score()[1] == 9
    np.savez(reference, **dict(zip(("mu", "sigma"), mean_and_covariance(theirs), strict=True)))
    assert [score()[0], score()[0]] == [{"fid6_x": pytest.approx(fid)}] * 2

"""Files to named numbers: what is read and refused, Inception's layers, and the evaluation as a whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vadit.eval import inception as inception_module
from vadit.eval import samples
from vadit.eval.inception import Inception, InceptionFeatures
from vadit.eval.metrics import frechet_distance, inception_score, mean_and_covariance, precision_recall
from vadit.runtime.errors import RunError, UsageError


def images(count: int, size: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 3), dtype=np.uint8)


def write_pngs(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published one's layout, with random weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *_args, **_kw: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda *_args, **_kw: None)
        torch.manual_seed(0)
        network = port.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / inception_module.WEIGHTS_FILE
    torch.save(network.state_dict(), path)
    return path


def test_pngs_and_npz_give_the_same_images_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    pictures = images(11)
    folder = write_pngs(tmp_path / "png", pictures)  # 10.png sorts before 2.png by name
    np.savez(tmp_path / "samples.npz", arr_0=pictures)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pictures)
    for path in (folder, tmp_path / "samples.npz", tmp_path / "small.npz"):
        source = samples.open_images(path)
        assert (len(source), source.size) == (11, (12, 12))
        batches = list(source.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 3]
        np.testing.assert_array_equal(np.concatenate(batches), pictures)
        np.testing.assert_array_equal(np.concatenate(list(source.batches(4, limit=5))), pictures[:5])


def test_a_sample_folder_is_read_without_its_grid(tmp_path: Path) -> None:
    pictures = images(3)
    write_pngs(tmp_path / "images", pictures)
    Image.fromarray(images(1, 24)[0]).save(tmp_path / "grid.png")
    np.testing.assert_array_equal(np.concatenate(list(samples.open_images(tmp_path).batches(8))), pictures)


def test_unusable_image_sets_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def refuse(path: Path, match: str, kind: type[Exception] = UsageError) -> None:
        with pytest.raises(kind, match=match):
            list(samples.open_images(path).batches(2))

    lossy = write_pngs(tmp_path / "lossy", images(1))
    Image.fromarray(images(1)[0]).save(lossy / "b.jpg")
    refuse(lossy, "is a JPEG")
    mixed = write_pngs(tmp_path / "mixed", images(2))
    Image.fromarray(images(1, 16)[0]).save(mixed / "2.png")
    refuse(mixed, "16x16 pixels, 0.png is 12x12")
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep / "a.png")
    refuse(deep, "pixel mode I;16")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes((mixed / "0.png").read_bytes()[:60])
    refuse(broken, "does not decode", RunError)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "no PNG files")
    refuse(tmp_path / "missing", "does not exist")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    refuse(tmp_path / "float.npz", "float32")
    np.savez(tmp_path / "other.npz", images=images(2))
    refuse(tmp_path / "other.npz", "no arr_0")
    np.savez(tmp_path / "cut.npz", arr_0=images(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    refuse(tmp_path / "cut.npz", "cannot be read", RunError)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        np.save(tmp_path / "whole.npy", images(2))
        archive.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-10])
    refuse(tmp_path / "short.npz", "truncated", RunError)


def test_names_carry_count_and_sampler() -> None:
    metrics = samples.SampleMetrics(50_000, 2.11, None, 252.3, 0.81, 0.58)
    assert metrics.named("euler249") == {
        "fid50k_euler249": 2.11,
        "is50k_euler249": 252.3,
        "precision50k_euler249": 0.81,
        "recall50k_euler249": 0.58,
    }
    assert [samples.count_name(count) for count in (1797, 10_000, 500)] == ["1797", "10k", "500"]


def test_feature_metrics_are_the_pure_functions(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(60, 4)), generator.normal(size=(50, 4)) + 0.5
    probabilities = np.full((50, 10), 0.1)
    found = samples.feature_metrics(torch.from_numpy(real), fake, probabilities_fake=probabilities)
    assert (found.num_real, found.num_fake) == (60, 50)
    assert found.frechet == frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake))
    assert (found.precision, found.recall) == precision_recall(real, fake)
    assert found.inception_score == pytest.approx(1)
    assert found.kernel > 0


def test_missing_and_wrong_weights_name_the_file_and_the_setting(tmp_path: Path) -> None:
    for path in (None, tmp_path / "nowhere.pth"):
        with pytest.raises(UsageError, match=r"weights-inception-2015-12-05-6726825d\.pth.*--inception-weights"):
            Inception(path)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="is not torch-fidelity's Inception"):
        Inception(tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:200])
    with pytest.raises(RunError, match="cannot be read as weights"):
        Inception(tmp_path / "cut.pth")


def test_inception_takes_the_three_layers_of_the_protocol(weights: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    pixels = torch.from_numpy(images(2, 20)).permute(0, 3, 1, 2)
    found = Inception(weights)(pixels)
    assert [tuple(part.shape) for part in found] == [(2, 2048), (2, 2023), (2, 1008)]
    network = FeatureExtractorInceptionV3("port", ["2048", "logits_unbiased"], str(weights))
    inputs: list[torch.Tensor] = []
    network.Mixed_6d.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    pool, _ = network(pixels)
    torch.testing.assert_close(found.pool, pool)
    torch.testing.assert_close(found.probabilities, (pool @ network.fc.weight.T).softmax(1))
    branch = network.Mixed_6d.branch1x1
    spatial = torch.relu(branch.bn(branch.conv(inputs[0])))
    assert tuple(spatial.shape) == (2, 192, 17, 17)
    # NHWC order: the 7 channels of position (0, 0) come first, then those of (0, 1).
    torch.testing.assert_close(found.spatial[:, 7:14], spatial[:, :7, 0, 1])
    torch.testing.assert_close(found.spatial.reshape(2, 17, 17, 7)[:, 3, 5], spatial[:, :7, 3, 5])
    with pytest.raises(UsageError, match="uint8"):
        Inception(weights)(pixels.float())


class SmallExtractor:
    """Stands for Inception, whose 2048-wide eigenvalue problems take seconds each: 5, 4 and 3 numbers per image."""

    def __init__(self, weights: Path, _device: str) -> None:
        assert weights == Path("given.pth")

    def __call__(self, pixels: torch.Tensor) -> InceptionFeatures:
        values = pixels.float().flatten(1) / 255
        return InceptionFeatures(values[:, :5], values[:, 5:9], values[:, 9:12].softmax(1))


def test_evaluation_against_images_and_against_stored_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "Inception", SmallExtractor)
    weights = Path("given.pth")
    drawn, real = images(8, 16, seed=1), images(6, 16, seed=2) // 2
    folder = write_pngs(tmp_path / "drawn", drawn)
    np.savez(tmp_path / "real.npz", arr_0=real)
    against_images = samples.evaluate_samples(
        folder, tmp_path / "real.npz", inception_weights=weights, batch_size=3, num_samples=7
    )
    extractor = SmallExtractor(weights, "cpu")
    ours, theirs = (extractor(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (drawn[:7], real))
    moments = {
        "mu": mean_and_covariance(theirs.pool)[0],
        "sigma": mean_and_covariance(theirs.pool)[1],
        "mu_s": mean_and_covariance(theirs.spatial)[0],
        "sigma_s": mean_and_covariance(theirs.spatial)[1],
    }
    expected_fid = frechet_distance(*mean_and_covariance(ours.pool), moments["mu"], moments["sigma"])
    assert against_images.num_samples == 7
    assert against_images.fid == pytest.approx(expected_fid, rel=1e-6)
    assert against_images.inception_score == pytest.approx(inception_score(ours.probabilities), rel=1e-4)
    expected_sfid = frechet_distance(*mean_and_covariance(ours.spatial), moments["mu_s"], moments["sigma_s"])
    assert against_images.sfid == pytest.approx(expected_sfid)
    assert (against_images.precision, against_images.recall) == precision_recall(theirs.pool, ours.pool)
    np.savez(tmp_path / "statistics.npz", **moments)
    stored = samples.evaluate_samples(folder, tmp_path / "statistics.npz", inception_weights=weights, num_samples=7)
    assert (stored.precision, stored.recall) == (None, None)
    assert stored.fid == pytest.approx(against_images.fid, rel=1e-4)
    assert stored.sfid == pytest.approx(against_images.sfid, rel=1e-4)
    # ADM's own files: statistics of the whole data set, and a part of its images for precision and recall.
    np.savez(tmp_path / "both.npz", arr_0=real, **{**moments, "mu": moments["mu"] + 1})
    both = samples.evaluate_samples(folder, tmp_path / "both.npz", inception_weights=weights, num_samples=7)
    assert both.fid != pytest.approx(stored.fid, rel=0.1)
    assert (both.sfid, both.recall) == (pytest.approx(stored.sfid), against_images.recall)
    with pytest.raises(UsageError, match="holds 8 images, 9 were asked for"):
        samples.evaluate_samples(folder, tmp_path / "real.npz", inception_weights=weights, num_samples=9)

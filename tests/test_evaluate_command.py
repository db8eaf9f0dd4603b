"""`vadit evaluate` from files to files: references, seeds, latent vectors, and numbers that processes do not change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import free_port
from PIL import Image
from torch import Tensor

from vadit import cli
from vadit.config import FoundationSpec
from vadit.eval import latents as uniformity
from vadit.eval import samples
from vadit.eval import tokenizer as reconstruction
from vadit.eval.inception import InceptionFeatures
from vadit.eval.metrics import frechet_distance, mean_and_covariance, squared_mmd
from vadit.models.foundation import ImageSummary
from vadit.runtime import distributed
from vadit.runtime.errors import RunError, UsageError


class SmallExtractor:
    """Features that a test can predict: the first values of each image."""

    def __init__(self, weights: object, device: object) -> None:
        pass

    def __call__(self, pixels: Tensor) -> InceptionFeatures:
        values = pixels.float().flatten(1) / 255
        return InceptionFeatures(values[:, :5], values[:, 5:9], values[:, 9:12].softmax(1))

    def pool(self, pixels: Tensor) -> Tensor:
        return self(pixels).pool


def pictures(count: int, seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(samples, "Inception", SmallExtractor)
    (tmp_path / "weights.pth").write_bytes(b"not read")
    return tmp_path


def test_seeds_give_means_and_their_spread(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(small / "real.npz", arr_0=pictures(12, 9))
    for seed in range(3):
        np.savez(small / f"drawn-{seed}.npz", arr_0=pictures(8, seed))
    common = ["--reference", str(small / "real.npz"), "--sampler", "euler49_random", "--device", "cpu"]
    common += ["--inception-weights", str(small / "weights.pth")]
    each = []
    for seed in range(3):
        out = small / f"{seed}.json"
        assert cli.main(["evaluate", "samples", str(small / f"drawn-{seed}.npz"), *common, "--out", str(out)]) == 0
        each.append(json.loads(out.read_text()))
    assert "spread" not in each[0] and each[0]["kind"] == "samples" and each[0]["inputs"]["inception_sha256"]
    names = {f"{name}8_euler49_random" for name in ("fid", "sfid", "is", "precision", "recall", "kid")}
    assert set(each[0]["metrics"]) == names
    out = small / "all.json"
    arguments = ["evaluate", "samples", str(small / "drawn-{seed}.npz"), "--seeds", "3", *common, "--out", str(out)]
    assert cli.main(arguments) == 0
    found = json.loads(out.read_text())
    for name in names:
        values = [one["metrics"][name] for one in each]
        assert found["metrics"][name] == pytest.approx(np.mean(values))
        assert found["spread"][name] == pytest.approx(np.std(values, ddof=1))
    assert "+-" in capsys.readouterr().out
    np.savez(small / "drawn-1.npz", arr_0=pictures(7, 1))
    assert cli.main(arguments) == 2
    assert "sets of one size" in capsys.readouterr().err
    assert cli.main(["evaluate", "samples", "drawn.npz", "--seeds", "3", *common]) == 2
    assert "{seed}" in capsys.readouterr().err


def test_the_reference_is_read_once_for_all_seeds(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    load = samples._load_reference
    monkeypatch.setattr(samples, "_load_reference", lambda path, *rest: (read.append(path), load(path, *rest))[1])
    np.savez(small / "real.npz", arr_0=pictures(12, 9))
    np.savez(small / "drawn.npz", arr_0=pictures(8, 1))
    arguments = ["evaluate", "samples", str(small / "drawn.npz"), "--seeds", "2", "--num-samples", "4"]
    arguments += ["--reference", str(small / "real.npz"), "--inception-weights", str(small / "weights.pth")]
    assert cli.main([*arguments, "--device", "cpu"]) == 0 and len(read) == 1


def test_a_reference_that_was_made_gives_the_numbers_of_its_images(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, drawn = pictures(10, 1), pictures(6, 2)
    folder = small / "real"
    folder.mkdir()
    for index, image in enumerate(real):
        Image.fromarray(image).save(folder / f"{index:02d}.png")
    np.savez(small / "drawn.npz", arr_0=drawn)
    arguments = ["evaluate", "make-reference", str(folder), "--image-size", "16", "--keep", "4", "--device", "cpu"]
    arguments += ["--out", str(small / "made.npz"), "--num-workers", "1", "--batch-size", "3"]
    assert cli.main([*arguments, "--inception-weights", str(small / "weights.pth")]) == 0
    with np.load(small / "made.npz") as made:
        np.testing.assert_array_equal(made["arr_0"], real[[0, 3, 6, 9]])
    against = {
        name: samples.evaluate_samples(small / "drawn.npz", small / name, inception_weights="x")
        for name in ("made.npz", "real")
    }
    assert against["made.npz"].fid == pytest.approx(against["real"].fid, rel=1e-9)
    assert against["made.npz"].sfid == pytest.approx(against["real"].sfid, rel=1e-9)
    with pytest.raises(RunError, match="5 images were promised, 4 came"):
        samples.write_reference(
            small / "short.npz", [torch.zeros(4, 3, 16, 16, dtype=torch.uint8)], num_images=5, inception_weights="x"
        )
    assert not (small / "short.npz").exists()


def test_a_scorer_gives_the_numbers_of_the_files(small: Path) -> None:
    real, drawn = pictures(9, 1), torch.from_numpy(pictures(6, 2)).permute(0, 3, 1, 2)
    np.savez(small / "real.npz", arr_0=real)
    scorer = samples.SampleScorer(small / "real.npz", inception_weights="x", batch_size=4)
    features = scorer.features(drawn)
    extractor = SmallExtractor(None, None)
    theirs = extractor.pool(torch.from_numpy(real).permute(0, 3, 1, 2))
    assert torch.equal(features, extractor.pool(drawn))
    assert scorer.score(features, "euler9_random") == {
        "fid6_euler9_random": pytest.approx(
            frechet_distance(*mean_and_covariance(theirs), *mean_and_covariance(features)), rel=1e-9
        ),
        "kid6_euler9_random": pytest.approx(squared_mmd(theirs, features)),
    }


def test_statistics_without_images_give_no_kid_and_refuse_fd_dinov2(small: Path) -> None:
    theirs = SmallExtractor(None, None)(torch.from_numpy(pictures(9, 1)).permute(0, 3, 1, 2))
    mu, sigma = mean_and_covariance(theirs.pool)
    np.savez(small / "statistics.npz", mu=mu, sigma=sigma)
    np.savez(small / "drawn.npz", arr_0=pictures(6, 2))
    found = samples.evaluate_samples(small / "drawn.npz", small / "statistics.npz", inception_weights="x")
    assert (found.kid, found.sfid, found.precision) == (None, None, None)
    with pytest.raises(UsageError, match="FD-DINOv2 needs the reference's images"):
        samples.evaluate_samples(
            small / "drawn.npz", small / "statistics.npz", inception_weights="x", dinov2=lambda images: images
        )


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
    tokens = summary._model.forward_features((x - 0.5) / 0.5)  # this model's mean and deviation
    torch.testing.assert_close(found, tokens[:, 0].detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ latents


def test_vectors_are_read_from_any_tensor_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    vectors = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "v.npy", vectors.numpy())
    np.savez(tmp_path / "v.npz", vectors=vectors.numpy(), labels=np.zeros(120))
    torch.save(vectors, tmp_path / "v.pt")
    save_file({"latents": vectors}, tmp_path / "v.safetensors")
    for name in ("v.npy", "v.npz", "v.pt", "v.safetensors"):
        assert torch.equal(uniformity.read_vectors(tmp_path / name), vectors), name
    np.save(tmp_path / "flat.npy", np.zeros(7))
    with pytest.raises(UsageError, match=r"one tensor of shape \(N, C\)"):
        uniformity.read_vectors(tmp_path / "flat.npy")
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(RunError, match=r"damaged\.pt cannot be read"):
        uniformity.read_vectors(tmp_path / "damaged.pt")
    out, picture = tmp_path / "numbers.json", tmp_path / "points.png"
    arguments = ["--num-vectors", "100", "--seeds", "1", "--picture", str(picture), "--out", str(out)]
    assert cli.main(["evaluate", "latents", "--latents", str(tmp_path / "v.npy"), *arguments]) == 0
    chosen = uniformity.draw_vectors(vectors, 100, 0)
    expected = uniformity.evaluate_latents(chosen, 0)
    found = json.loads(out.read_text())["metrics"]
    assert found == {
        "density_cv": expected.density_cv,
        "gini": expected.gini,
        "normalized_entropy": expected.normalized_entropy,
    }
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_uniformity_of_points_is_that_of_their_densities() -> None:
    points = np.random.default_rng(0).normal(size=(200, 2)) * [1, 5]
    densities = uniformity.point_densities(points)
    assert uniformity.uniformity(points).density_cv == densities.std() / densities.mean()
    with pytest.raises(UsageError, match="line"):
        uniformity.uniformity(np.stack([np.arange(9.0), np.arange(9.0)], axis=1))
    with pytest.raises(UsageError, match="finite points"):
        uniformity.uniformity(np.full((9, 2), np.nan))


# ------------------------------------------------------------------------------------------ processes

WORKER = """
import os, sys, torch
from vadit.runtime import distributed
torch.distributed.init_process_group("gloo")
rank = distributed.rank()
ids = torch.arange(rank, 5, 2)
rows = torch.stack([ids.float(), -ids.float()], 1) if rank == 0 else torch.stack([ids.float(), -ids.float()], 1)
order, values = distributed.all_rows(ids, rows, torch.device("cpu"))
assert order.tolist() == [0, 2, 4, 1, 3], order
assert torch.equal(values[:, 1], -order.float())
empty = ids[:0] if rank == 1 else ids
order, values = distributed.all_rows(empty, torch.zeros(0) if rank == 1 else rows, torch.device("cpu"))
assert order.tolist() == [0, 2, 4] and values.shape == (3, 2)
torch.distributed.destroy_process_group()
"""


def test_rows_of_two_processes_come_together() -> None:
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "OMP_NUM_THREADS": "1",
    }
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER], env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for worker in workers:
        _, error = worker.communicate(timeout=240)
        assert worker.returncode == 0, error.decode()[-2000:]


class NoisyCodec:
    """Its answer to an image depends, in the last bits, on how many images came with it, as a convolution's does."""

    def encode(self, x: Tensor) -> reconstruction._Posterior:
        class Posterior:
            mean = x * (1 + 1e-3 * len(x))
            std = torch.full_like(x, 0.1)

        return Posterior()

    def decode(self, z: Tensor) -> Tensor:
        return z


def test_numbers_of_a_tokenizer_are_those_of_any_batch_and_any_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (75, 3, 12, 12), generator=generator, dtype=torch.uint8)

    def features(x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3)) * (1 + 1e-3 * len(x))

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3)) * len(x)

    def evaluate_all(batch: int, ids: list[int] | None = None) -> reconstruction.ReconstructionMetrics:
        own = pixels if ids is None else pixels[ids]
        return reconstruction.evaluate_tokenizer(
            NoisyCodec(), own.split(batch), ids=ids, features=features, lpips=lpips
        )

    whole = evaluate_all(75)
    assert whole.num_images == 75 and whole.named().keys() == {"psnr", "ssim", "lpips", "rfid75"}
    assert all(evaluate_all(batch) == whole for batch in (1, 32, 40))
    gathered: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def record(ids: Tensor, rows: Tensor, on: torch.device) -> tuple[Tensor, Tensor]:
        gathered.setdefault(distributed.rank(), []).append((ids, rows))
        if distributed.rank() == 0:
            return ids, rows
        parts = [gathered[rank][len(gathered[1]) - 1] for rank in range(2)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    monkeypatch.setattr(distributed, "all_rows", record)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = None
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        found = evaluate_all(10, reconstruction.share_of_images(75))
    assert found == whole

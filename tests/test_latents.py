"""Latent folders: both layouts, statistics, flip and posterior draws, order and resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder

from vadit import cli
from vadit.config import DiTSpec, LatentDataSpec
from vadit.latents.dataset import LatentDataset, open_latents
from vadit.latents.loader import LatentLoader
from vadit.latents.noise import posterior_noise
from vadit.latents.statistics import compute_statistics, load_statistics
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.runtime.stream import sample_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_the_authors_folder_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    latents, flipped, labels, mean, std = reference_folder(tmp_path, dtype=dtype)
    dataset = LatentDataset(tmp_path, multiplier=0.5)
    assert (len(dataset), dataset.channels, dataset.size, dataset.num_classes) == (13, CHANNELS, SIDE, CLASSES)
    assert torch.equal(dataset.mean, mean) and torch.equal(dataset.std, std)
    ids = torch.randperm(13)
    read, read_labels = dataset.batch(ids, epoch=0, seed=0)
    assert read.dtype == torch.float32 and read_labels.dtype == torch.int64
    assert torch.equal(read_labels, labels[ids])
    took_flip = []
    for value, index in zip(read, ids, strict=True):
        candidates = [((source[index].float() - mean[0]) / std[0] * 0.5) for source in (latents, flipped)]
        matches = [torch.allclose(value, candidate, rtol=1e-6, atol=1e-6) for candidate in candidates]
        assert sum(matches) == 1
        took_flip.append(matches[1])
    assert 0 < sum(took_flip) < 13
    plain = LatentDataset(tmp_path, normalize=False, flip=False)
    stored = torch.where(torch.tensor(took_flip)[:, None, None, None], flipped[ids], latents[ids]).float()
    torch.testing.assert_close(dataset.denormalize(read), stored, rtol=1e-5, atol=1e-5)
    raw, _ = plain.batch(torch.arange(13), epoch=0, seed=0)
    assert torch.equal(raw, latents.float())
    assert torch.equal(plain.mean, torch.zeros_like(mean)) and torch.equal(plain.std, torch.ones_like(std))


def test_flip_and_noise_are_functions_of_seed_id_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the definition, bit by bit: a run that is resumed sees the same samples."""
    monkeypatch.setattr("vadit.latents.dataset.BLOCK", 2)
    plain, flipped = moments_folder(tmp_path / "m")
    dataset = LatentDataset(tmp_path / "m", multiplier=0.5)
    assert (dataset.channels, dataset.num_classes) == (CHANNELS, CLASSES)  # the index names a class without images
    ids, seen = torch.tensor([5, 0, 3]), set()
    for epoch, seed in ((2, 7), (3, 7), (2, 8)):
        latents, _ = dataset.batch(ids, epoch, seed)
        mirrored = rng.uniform(rng.fold(seed, "flip", epoch), ids) < 0.5
        mean, std = torch.where(mirrored[:, None, None, None], flipped[ids], plain[ids]).chunk(2, dim=1)
        noise = posterior_noise(rng.fold(seed, "posterior", epoch), ids, mean[0].numel()).reshape(mean.shape)
        assert torch.equal(latents, (noise * std + mean - dataset.mean) / dataset.std * 0.5)
        seen |= {tuple(mirrored.tolist()), *latents.flatten().tolist()}
    assert len(seen) > 3 * latents.numel()  # of each its own
    assert torch.equal(dataset.batch(ids[1:2], 2, 8)[0][0], latents[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gpu_gets_what_the_cpu_gets(tmp_path: Path, dtype: str) -> None:
    moments_folder(tmp_path / "m", dtype)
    dataset = LatentDataset(tmp_path / "m", multiplier=0.7)
    for cpu, gpu in zip(LatentLoader(dataset, 4), LatentLoader(dataset, 4, device="cuda"), strict=True):
        assert all(torch.equal(one, other.cpu()) for one, other in zip(cpu, gpu, strict=True))


def test_posterior_noise_is_standard_normal_and_independent() -> None:
    rows, size = 400, 1024
    noise = posterior_noise(7, torch.arange(rows), size)
    values = noise.double()
    count = values.numel()
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((values**4).mean() - 3) < 5 * (96 / count) ** 0.5
    # Kolmogorov-Smirnov, critical value at 1e-4: 2.2 / sqrt(n)
    ordered = values.flatten().sort().values
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (torch.special.ndtr(ordered) - steps).abs().max() < 2.2 / count**0.5
    # no row resembles another, no place of the row another, nor is one the other turned around
    for sheet in (values, values.T):
        products = sheet @ sheet.T / sheet.shape[1] ** 0.5
        products.fill_diagonal_(0)
        assert products.abs().max() < 6.5 and abs(products.std() - 1) < 0.05
    other = posterior_noise(8, torch.tensor([123]), size)[0].double()
    assert abs(torch.corrcoef(torch.stack([values[123], other]))[0, 1]) < 5 / size**0.5


def test_posterior_noise_is_a_function_of_seed_id_and_place() -> None:
    ids = torch.tensor([3, 2**40, 0] * 25)
    long = posterior_noise(1, ids, 40)
    for size in (1, 2, 3, 5, 36):
        assert torch.equal(posterior_noise(1, ids, size), long[:, :size])
    assert torch.equal(posterior_noise(1, ids[1:2], 40)[0], long[1])
    # Golden values: other noise would go on with other samples where a run was interrupted.
    golden = torch.tensor([[-0.5187, -0.0854, -0.4347, 1.8460, -1.7927], [1.2355, -0.2345, 0.3959, -1.2695, -0.0141]])
    torch.testing.assert_close(posterior_noise(5, torch.tensor([0, 7]), 5), golden, rtol=0, atol=5e-5)


def test_statistics_are_those_of_all_latents_and_posteriors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, flipped, _ = reference_folder(tmp_path, stats=False)
    monkeypatch.setattr("vadit.latents.statistics.READ_AT_ONCE", 3)
    statistics = compute_statistics(tmp_path)
    everything = torch.cat([latents, flipped]).double()
    mean = everything.mean(dim=(0, 2, 3), keepdim=True)
    std = everything.std(dim=(0, 2, 3), keepdim=True)
    assert statistics.mean.shape == (1, CHANNELS, 1, 1) and statistics.mean.dtype == torch.float32
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std.double(), std, rtol=1e-6, atol=0)
    dataset = LatentDataset(tmp_path)
    assert torch.equal(dataset.mean, statistics.mean) and torch.equal(dataset.std, statistics.std)
    plain, flipped = moments_folder(tmp_path / "m")
    mean, std = torch.cat([plain, flipped]).double().chunk(2, dim=1)
    count = mean.numel() / CHANNELS
    within = (std**2).mean(dim=(0, 2, 3)) * count / (count - 1)
    expected = (mean.var(dim=(0, 2, 3)) + within).sqrt()
    torch.testing.assert_close(LatentDataset(tmp_path / "m").std.double().flatten(), expected, rtol=1e-6, atol=0)


def test_statistics_of_more_samples_than_there_are_are_those_of_all(tmp_path: Path) -> None:
    reference_folder(tmp_path, stats=False)
    for samples in (13, 20):
        assert torch.equal(compute_statistics(tmp_path, samples=samples).std, compute_statistics(tmp_path).std)
    pytest.raises(UsageError, compute_statistics, tmp_path, samples=-1).match(r"--stats-samples is -1")


@pytest.mark.parametrize("samples", [1, 5, 12])
def test_statistics_of_random_samples_are_those_of_so_many_latents(tmp_path: Path, samples: int) -> None:
    latents, flipped, _ = reference_folder(tmp_path, stats=False)
    found = [compute_statistics(tmp_path, samples=samples, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(found[0].mean, found[1].mean) and torch.equal(found[0].std, found[1].std)
    assert not torch.equal(found[0].mean, found[2].mean)
    ids = rng.permute(torch.arange(samples), 13, rng.fold(3, "statistics"))
    mirrored = rng.uniform(rng.fold(3, "statistics flip"), ids) < 0.5
    rows = torch.where(mirrored[:, None, None, None], flipped[ids], latents[ids]).double()
    torch.testing.assert_close(found[0].mean.double()[0, :, 0, 0], rows.mean(dim=(0, 2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0].std.double()[0, :, 0, 0], rows.std(dim=(0, 2, 3)), rtol=1e-6, atol=1e-6)


def test_a_loader_gives_the_samples_of_the_order(tmp_path: Path) -> None:
    """Across the ends of epochs, on any rank, from any position: see test_stream.py."""
    moments_folder(tmp_path / "m")
    dataset = LatentDataset(tmp_path / "m")
    loader = LatentLoader(dataset, 4, seed=0, rank=1, world_size=2)
    loader.load_state_dict({"seed": 5, "images_seen": 3})
    for step, batch in enumerate(islice(loader.stream(), 6)):
        positions = torch.arange(3 + 8 * step + 1, 3 + 8 * (step + 1), 2)
        parts = [dataset.batch(ids, epoch, 5) for epoch, ids in sample_ids(positions, len(dataset), 5)]
        assert all(torch.equal(one, torch.cat(pieces)) for one, *pieces in zip(batch, *parts, strict=True))


def test_open_latents_checks_the_model(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    spec = LatentDataSpec(path=str(tmp_path))
    fitting: dict = {"input_size": SIDE, "in_channels": CHANNELS, "num_classes": CLASSES}
    assert isinstance(open_latents(spec, DiTSpec(**fitting)), LatentDataset)
    for change, setting in (({"input_size": 16}, "input_size"), ({"in_channels": 32}, "in_channels")):
        with pytest.raises(UsageError, match=f"model.{setting} is"):
            open_latents(spec, DiTSpec(**(fitting | change)))
    with pytest.raises(UsageError, match=r"has 5 classes but model.num_classes is 4; set --model.num-classes 5"):
        open_latents(spec, DiTSpec(**(fitting | {"num_classes": 4})))


def test_statistics_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference_folder(tmp_path, stats=False)
    for options, samples in (([], 0), (["--stats-samples", "5", "--seed", "2"], 5)):
        assert cli.main(["encode", "--stats-only", str(tmp_path), *options]) == 0
        found = load_statistics(tmp_path, CHANNELS)
        expected = compute_statistics(tmp_path, samples=samples, seed=2)
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.std, expected.std)
    assert capsys.readouterr().out.count(f"{tmp_path}/latents_stats.pt: 4 channels") == 2

"""How batches of latents are made: posterior noise, memory that is used again, maps, the order worked out ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import moments_folder, reference_folder

from vadit.latents.dataset import LatentDataset, LatentLoader
from vadit.latents.noise import NoiseScratch, row_keys
from vadit.runtime import rng
from vadit.runtime.order import Order
from vadit.runtime.stream import sample_ids


def test_posterior_noise_is_standard_normal_and_independent() -> None:
    rows, size = 400, 1024
    noise = np.empty((rows, size), np.float32)
    scratch = NoiseScratch(rows, size)
    scratch.fill(row_keys(7, torch.arange(rows)), noise)
    values = torch.from_numpy(noise).double()
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
    again = np.empty((1, size), np.float32)
    scratch.fill(row_keys(7, torch.tensor([123])), again)
    assert (again[0] == noise[123]).all()
    scratch.fill(row_keys(8, torch.tensor([123])), again)
    assert abs(np.corrcoef(again[0], noise[123])[0, 1]) < 5 / size**0.5


@pytest.mark.parametrize("size", [1, 2, 3, 5, 36])
def test_posterior_noise_of_odd_sizes_is_the_start_of_a_longer_row(size: int) -> None:
    long, short = np.empty((3, 40), np.float32), np.empty((3, size), np.float32)
    NoiseScratch(3, 40).fill(row_keys(1, torch.arange(3)), long)
    NoiseScratch(4, size).fill(row_keys(1, torch.arange(3)), short)
    assert (short == long[:, :size]).all()


@pytest.mark.parametrize("layout", ["sample-fp32", "sample-bf16", "moments-fp32", "moments-bf16"])
def test_the_way_over_a_device_gives_the_same_bits(tmp_path: Path, layout: str) -> None:
    store, dtype = layout.split("-")
    if store == "moments":
        moments_folder(tmp_path / "m", dtype)
    else:
        reference_folder(tmp_path / "m", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    dataset = LatentDataset(tmp_path / "m", multiplier=0.7)
    ids = torch.tensor([4, 1, 5, 0])
    expected, _ = dataset.batch(ids, 1, 2)
    numbers, offsets, _ = dataset._places(ids, 1, 2)
    keys = row_keys(rng.fold(2, "posterior", 1), ids) if store == "moments" else None
    found, faults = dataset._batch_on_device(numbers, offsets, keys, "cpu")  # what a GPU does, on the CPU
    assert torch.equal(found, expected) and not faults


def test_a_batch_that_is_kept_is_not_written_over(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    dataset = LatentDataset(tmp_path)
    expected = [latents.clone() for latents, _ in LatentLoader(dataset, 4, seed=1)]
    kept = [latents for latents, _ in LatentLoader(dataset, 4, seed=1)]
    views = [latents[1:].flatten() for latents, _ in LatentLoader(dataset, 4, seed=1)]  # the tensor itself is gone
    arrays = [latents.numpy() for latents, _ in LatentLoader(dataset, 4, seed=1)]
    for _ in range(3):
        list(LatentLoader(dataset, 4, seed=9))
    for batch, whole, view, array in zip(expected, kept, views, arrays, strict=True):
        assert torch.equal(whole, batch) and torch.equal(view, batch[1:].flatten()) and (array == batch.numpy()).all()


def test_memory_of_batches_is_used_again(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    dataset = LatentDataset(tmp_path)
    places = {dataset.batch(torch.arange(4), 0, 0)[0].data_ptr() for _ in range(20)}
    assert len(places) == 1


def test_many_files_are_mapped_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = reference_folder(tmp_path)[0]
    monkeypatch.setattr("vadit.latents.rows.MAX_MAPS", 2)
    monkeypatch.setattr("vadit.latents.rows.MAX_MAPPED_BYTES", 500)  # and let go of again and again
    monkeypatch.setattr("vadit.latents.rows.COLD_ROW_S", 0.0)  # as if from a slow disk
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    for seed in range(3):
        ids = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(dataset.batch(ids, 0, 0)[0], latents[ids])
    assert len(dataset._reader._maps) == 2


def test_order_worked_out_ahead_is_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vadit.runtime.order.ORDER_AHEAD", 7)
    order, n = Order(23), 23
    for start, stop, step in ((0, 6, 2), (6, 12, 2), (12, 18, 2), (18, 30, 2), (3, 4, 1), (40, 52, 3), (22, 23, 1)):
        positions = torch.arange(start, stop, step)
        expected = list(sample_ids(positions, n, seed=4))
        found = order.parts(positions, 4)
        assert [part.epoch for part in found] == [epoch for epoch, _ in expected]
        for part, (epoch, ids) in zip(found, expected, strict=True):
            assert torch.equal(part.ids, ids)
            assert torch.equal(part.places, positions[positions // n == epoch] % n)

"""Latent folders: both layouts, statistics, flip and posterior draws, order and resume, damaged files."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vadit.config import DiTSpec, LatentDataSpec
from vadit.data import latent_shards
from vadit.data.latent_shards import LatentSettings, LatentShardWriter, open_shard, save_index
from vadit.data.latents import DebugLatents, LatentDataset, LatentLoader, compute_statistics, open_latents
from vadit.errors import RunError, UsageError

CHANNELS, SIDE, CLASSES = 4, 3, 5
COUNTS = (7, 5, 1)


def reference_folder(folder: Path, *, dtype: torch.dtype = torch.float32, stats: bool = True) -> tuple[Tensor, ...]:
    """A folder as the authors' extraction script leaves it; all its latents, mirrored latents and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for number, count in enumerate(COUNTS):
        shape = (count, CHANNELS, SIDE, SIDE)
        latents = (torch.randn(shape, generator=generator) * 3 + 1000).to(dtype)
        flipped = (torch.randn(shape, generator=generator) - 2).to(dtype)
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        labels[0] = CLASSES - 1
        save_file(
            {"latents": latents, "latents_flip": flipped, "labels": labels},
            folder / f"latents_rank{number % 2:02d}_shard{number // 2:03d}.safetensors",
            metadata={"total_size": str(count), "dtype": str(dtype), "device": "cpu"},
        )
        parts.append((latents, flipped, labels))
    order = [0, 2, 1]  # file names sort rank first
    whole = tuple(torch.cat([parts[number][part] for number in order]) for part in range(3))
    if stats:
        mean, std = torch.rand(1, CHANNELS, 1, 1), torch.rand(1, CHANNELS, 1, 1) + 0.5
        torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
        return (*whole, mean, std)
    return whole


def settings(**changes: object) -> LatentSettings:
    values: dict = {
        "tokenizer": "abc",
        "config": "{}",
        "source": "images",
        "num_images": 6,
        "num_classes": CLASSES,
        "size": 8,
    }
    values |= {"store": "moments", "dtype": "fp32", "flip": True, "seed": 0, "shard_size": 4}
    return LatentSettings(**(values | changes))


def moments_folder(folder: Path, dtype: str = "fp32") -> tuple[Tensor, Tensor]:
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    plain, flipped = (torch.rand((6, 2 * CHANNELS, SIDE, SIDE), generator=generator) + number for number in (0, 10))
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        writer = LatentShardWriter(folder / f"shard-{number:05d}.safetensors", settings(dtype=dtype))
        ids = torch.arange(6)[rows]
        writer.add(plain[rows][:1], flipped[rows][:1], ids[:1] % 3, ids[:1])
        writer.add(plain[rows][1:], flipped[rows][1:], ids[1:] % 3, ids[1:])
        writer.close()
    compute_statistics(folder)
    save_index(folder, settings(dtype=dtype), [str(label) for label in range(CLASSES)])
    return plain, flipped


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
    raw, _ = plain.batch(torch.arange(13), epoch=0, seed=0)
    assert torch.equal(raw, latents.float())
    assert torch.equal(plain.mean, torch.zeros_like(mean)) and torch.equal(plain.std, torch.ones_like(std))


def test_denormalize_inverts_normalisation(tmp_path: Path) -> None:
    latents = reference_folder(tmp_path)[0]
    dataset = LatentDataset(tmp_path, flip=False, multiplier=0.18215)
    read, _ = dataset.batch(torch.arange(13), epoch=0, seed=0)
    torch.testing.assert_close(dataset.denormalize(read), latents, rtol=1e-5, atol=1e-5)


def test_flip_and_noise_are_functions_of_seed_id_and_epoch(tmp_path: Path) -> None:
    moments_folder(tmp_path / "m")
    dataset = LatentDataset(tmp_path / "m")
    ids = torch.tensor([5, 0, 3])
    whole, _ = dataset.batch(ids, epoch=2, seed=7)
    for place, index in enumerate(ids):
        assert torch.equal(dataset.batch(index[None], epoch=2, seed=7)[0][0], whole[place])
    assert not torch.equal(dataset.batch(ids, epoch=3, seed=7)[0], whole)
    assert not torch.equal(dataset.batch(ids, epoch=2, seed=8)[0], whole)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_moments_are_sampled_with_their_mean_and_std(tmp_path: Path, dtype: str) -> None:
    plain, _ = moments_folder(tmp_path / "m", dtype)
    dataset = LatentDataset(tmp_path / "m", normalize=False, flip=False)
    assert (dataset.channels, dataset.num_classes) == (CHANNELS, CLASSES)  # the index names a class without images
    draws = torch.stack([dataset.batch(torch.arange(6), epoch=epoch, seed=0)[0] for epoch in range(600)])
    mean, std = plain.chunk(2, dim=1)
    assert (draws.mean(0) - mean).abs().max() < 0.2
    assert (draws.std(0) - std).abs().max() < 0.15


def test_our_shards_are_plain_safetensors_with_metadata(tmp_path: Path) -> None:
    plain, flipped = moments_folder(tmp_path / "m")
    with safe_open(tmp_path / "m" / "shard-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("moments"), plain[4:])
        assert torch.equal(file.get_tensor("moments_flip"), flipped[4:])
        assert file.get_tensor("labels").tolist() == [1, 2] and file.get_tensor("ids").tolist() == [4, 5]
        assert file.metadata()["tokenizer"] == "abc" and file.metadata()["count"] == "2"
    assert open_shard(tmp_path / "m" / "shard-00001.safetensors").settings == settings()
    assert not list((tmp_path / "m").glob("*.partial"))


def test_statistics_are_those_of_all_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents, flipped, _ = reference_folder(tmp_path, stats=False)
    monkeypatch.setattr("vadit.data.latents.STATISTICS_CHUNK", 3)
    statistics = compute_statistics(tmp_path)
    everything = torch.cat([latents, flipped]).double()
    mean = everything.mean(dim=(0, 2, 3), keepdim=True)
    std = everything.std(dim=(0, 2, 3), keepdim=True)
    assert statistics.mean.shape == (1, CHANNELS, 1, 1) and statistics.mean.dtype == torch.float32
    torch.testing.assert_close(statistics.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std.double(), std, rtol=1e-6, atol=0)
    dataset = LatentDataset(tmp_path)
    assert torch.equal(dataset.mean, statistics.mean) and torch.equal(dataset.std, statistics.std)


def test_statistics_of_moments_count_the_posterior_variance(tmp_path: Path) -> None:
    plain, flipped = moments_folder(tmp_path / "m")
    mean, std = torch.cat([plain, flipped]).double().chunk(2, dim=1)
    count = mean.numel() / CHANNELS
    within = (std**2).mean(dim=(0, 2, 3)) * count / (count - 1)
    expected = (mean.var(dim=(0, 2, 3)) + within).sqrt()
    torch.testing.assert_close(LatentDataset(tmp_path / "m").std.double().flatten(), expected, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    latents = torch.zeros(3, CHANNELS, SIDE, SIDE)
    latents[1, 2, 0, 0] = float("nan")
    save_file({"latents": latents, "labels": torch.zeros(3, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=r"a.safetensors holds values that are not finite"):
        compute_statistics(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_latent_once_per_epoch_and_ranks_share_the_order(tmp_path: Path, world_size: int) -> None:
    latents = reference_folder(tmp_path)[0]
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    loaders = [LatentLoader(dataset, 2, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(2):
        seen = torch.cat([batch for loader in loaders for batch, _ in loader])
        assert torch.equal(seen.flatten(1).sort(dim=0).values, latents.flatten(1).sort(dim=0).values)
    one = LatentLoader(dataset, 2 * world_size, seed=3)
    first, labels = next(iter(one))
    assert first.dtype == torch.float32 and labels.dtype == torch.int64
    loaders = [LatentLoader(dataset, 2, 3, rank, world_size) for rank in range(world_size)]
    for rank, loader in enumerate(loaders):
        part, part_labels = next(iter(loader))
        assert torch.equal(part, first[rank::world_size]) and torch.equal(part_labels, labels[rank::world_size])


@pytest.mark.parametrize("new_world_size", [1, 2, 4])
def test_resume_is_exact_also_across_epochs_and_ranks(tmp_path: Path, new_world_size: int) -> None:
    moments_folder(tmp_path / "m")
    dataset = LatentDataset(tmp_path / "m")
    whole = LatentLoader(dataset, 4, seed=5)
    expected = list(islice(whole.stream(), 6))  # 24 positions: four epochs of six, cut inside batches
    start = LatentLoader(dataset, 2, 5, 1, 2)
    list(islice(start.stream(), 2))
    state = json.loads(json.dumps(start.state_dict()))
    assert state["seed"] == 5 and state["images_seen"] == 8 and state["epoch"] == 1
    streams = []
    for rank in range(new_world_size):
        loader = LatentLoader(dataset, 4 // new_world_size, 0, rank, new_world_size)
        loader.load_state_dict(state)
        streams.append(loader.stream())
    for latents, labels in expected[2:]:
        for rank, stream in enumerate(streams):
            part, part_labels = next(stream)
            assert torch.equal(part, latents[rank::new_world_size])
            assert torch.equal(part_labels, labels[rank::new_world_size])


def test_iteration_after_resume_gives_the_rest_of_the_epoch(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    dataset = LatentDataset(tmp_path)
    epoch = list(LatentLoader(dataset, 4, seed=1))
    assert [len(labels) for _, labels in epoch] == [4, 4, 4, 1]
    loader = LatentLoader(dataset, 4)
    loader.load_state_dict({"seed": 1, "images_seen": 8})
    rest = list(loader)
    assert [len(labels) for _, labels in rest] == [4, 1]
    assert all(
        torch.equal(a, b) for old, new in zip(epoch[2:], rest, strict=True) for a, b in zip(old, new, strict=True)
    )
    assert loader.epoch == 1 and len(list(loader)) == 4


def test_missing_statistics_name_the_remedy(tmp_path: Path) -> None:
    reference_folder(tmp_path, stats=False)
    with pytest.raises(UsageError, match=rf"vadit encode --stats-only {tmp_path}.*--no-data.normalize"):
        LatentDataset(tmp_path)
    assert len(LatentDataset(tmp_path, normalize=False)) == 13


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    (tmp_path / "latents_stats.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"latents_stats.pt cannot be read"):
        LatentDataset(tmp_path)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}, tmp_path / "latents_stats.pt")
    with pytest.raises(RunError, match=r"has 2 channels but the latents have 4"):
        LatentDataset(tmp_path)


def rewrite_header(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].decode().rstrip().replace(old, new)
    assert text != data[8:end].decode().rstrip()
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[end:])


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    for length in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=path.name):
            LatentDataset(tmp_path)
    path.write_bytes(whole + b"\0" * 8)
    with pytest.raises(RunError, match=f"{path.name}: its tensors .* do not fill its"):
        LatentDataset(tmp_path)
    for lie in ('"shape":[2,4', '"shape":[-1,4', '"shape":["1",4'):
        path.write_bytes(whole)
        rewrite_header(path, '"shape":[1,4', lie)
        with pytest.raises(RunError, match=path.name):
            LatentDataset(tmp_path)
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        num_bytes = file.get_tensor("latents").nbytes
    rewrite_header(path, f"[{8 + num_bytes},{8 + 2 * num_bytes}]", f"[8,{8 + num_bytes}]")
    with pytest.raises(RunError, match=f"{path.name}: its tensors .* do not fill its"):  # both name the same bytes
        LatentDataset(tmp_path)
    path.write_bytes(whole)
    rewrite_header(path, '"latents"', '"other"')
    with pytest.raises(RunError, match=r"needed: latents or moments"):
        LatentDataset(tmp_path)
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    with pytest.raises(RunError, match=r"cut short or no safetensors file"):
        LatentDataset(tmp_path)


def test_a_count_that_the_index_or_metadata_contradicts_is_refused(tmp_path: Path) -> None:
    moments_folder(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "index.json").read_text())
    index["shards"][1]["count"] = 3
    (tmp_path / "m" / "index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"shard-00001.safetensors does not agree with index.json"):
        LatentDataset(tmp_path / "m")
    (tmp_path / "m" / "index.json").write_text("{")
    with pytest.raises(RunError, match=r"index.json is damaged"):
        LatentDataset(tmp_path / "m")
    (tmp_path / "m" / "index.json").unlink()
    with pytest.raises(UsageError, match=r"is not finished: run its `vadit encode` command again"):
        LatentDataset(tmp_path / "m")
    rewrite_header(tmp_path / "m" / "shard-00000.safetensors", '"count": "4"', '"count": "5"')
    with pytest.raises(RunError, match=r"header counts 5 images but 4"):
        LatentDataset(tmp_path / "m")


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    latents = torch.zeros(2, CHANNELS, SIDE, SIDE)
    save_file({"latents": latents, "labels": torch.tensor([0, -3])}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"a.safetensors holds label -3; labels must be in \[0, 1\)"):
        LatentDataset(tmp_path, normalize=False, flip=False)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.path is empty"):
        LatentDataset("")
    with pytest.raises(UsageError, match=r"nowhere does not exist"):
        LatentDataset(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no .safetensors shards"):
        LatentDataset(tmp_path)
    save_file(
        {"latents": torch.zeros(2, 4, 3, 3), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UsageError, match=r"no mirrored latents; set --no-data.flip"):
        LatentDataset(tmp_path)
    save_file(
        {"latents": torch.zeros(2, 8, 3, 3), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(RunError, match=r"b.safetensors holds .*8, 3, 3.* but a.safetensors"):
        LatentDataset(tmp_path, normalize=False, flip=False)


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


def test_debug_latents_fit_the_model() -> None:
    dataset = open_latents(LatentDataSpec(path="debug:10"), DiTSpec(input_size=4, in_channels=3, num_classes=2))
    assert isinstance(dataset, DebugLatents) and len(dataset) == 10
    latents, labels = next(LatentLoader(dataset, 4).stream())
    assert latents.shape == (4, 3, 4, 4) and labels.max() < 2 and latents.std() > 0.5


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latent_shards.os, "fsync", full)
    writer = LatentShardWriter(tmp_path / "shard-00000.safetensors", settings())
    rows = torch.zeros(2, 2 * CHANNELS, SIDE, SIDE)
    writer.add(rows, rows, torch.zeros(2), torch.arange(2))
    with pytest.raises(RunError, match=r"shard-00000.safetensors .*No space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []

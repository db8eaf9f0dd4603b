"""Latent folders: both layouts, statistics, flip and posterior draws; damage is named."""

import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder, rewrite_header
from safetensors.torch import load_file, save_file

from vadit import cli
from vadit.config import DiTSpec, LatentDataSpec
from vadit.latents.dataset import LatentDataset, open_latents
from vadit.latents.loader import LatentLoader
from vadit.latents.noise import posterior_noise
from vadit.latents.shards import open_shard
from vadit.latents.statistics import compute_statistics, load_statistics
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
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


def test_flip_and_noise_are_functions_of_seed_id_and_epoch(tmp_path: Path, monkeypatch) -> None:
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


def test_statistics_are_those_of_all_latents_and_posteriors(tmp_path: Path, monkeypatch) -> None:
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
    for more in (13, 20):  # all of them
        assert torch.equal(compute_statistics(tmp_path, samples=more).std, compute_statistics(tmp_path).std)


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
        pytest.raises(UsageError, open_latents, spec, DiTSpec(**(fitting | change))).match(f"model.{setting} is")
    several = (
        r"in_channels is 8 .*, model.num_classes is 4 where .* 5; set --model.in-channels 4 --model.num-classes 5,"
    )
    with pytest.raises(UsageError, match=several):
        open_latents(spec, DiTSpec(**(fitting | {"num_classes": 4, "in_channels": 8})))


def test_statistics_by_the_command(tmp_path: Path, capsys) -> None:
    reference_folder(tmp_path, stats=False)
    for options, samples in (([], 0), (["--stats-samples", "5", "--seed", "2"], 5)):
        assert cli.main(["encode", "--stats-only", str(tmp_path), *options]) == 0
        found = load_statistics(tmp_path, CHANNELS)
        expected = compute_statistics(tmp_path, samples=samples, seed=2)
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.std, expected.std)
    assert capsys.readouterr().out.count(f"{tmp_path}/latents_stats.pt: 4 channels") == 2


SHARDS, ROWS = 5, 10
BAD = "s03.safetensors"


def many_shards(folder: Path) -> torch.Tensor:
    """A folder in the authors' layout; its latents, whose value is their index, the mirrored ones' 0.5 more."""
    latents = torch.arange(SHARDS * ROWS).float()[:, None, None, None].expand(-1, 2, 2, 2).contiguous()
    for number, part in enumerate(latents.split(ROWS)):
        labels = torch.arange(ROWS) % CLASSES
        save_file(
            {"latents": part, "latents_flip": part + 0.5, "labels": labels}, folder / f"s{number:02d}.safetensors"
        )
    return latents


def poison(path: Path, key: str, row: int, value: float) -> None:
    """Overwrite the last number of a row."""
    entry, data = open_shard(path).tensors[key], bytearray(path.read_bytes())
    end = entry.offset + (row + 1) * entry.row_bytes
    item = torch.tensor([value], dtype=entry.dtype).view(torch.uint8).numpy().tobytes()
    data[end - len(item) : end] = item
    path.write_bytes(data)


def replace_tensors(path: Path, **changes: torch.Tensor) -> None:
    save_file(load_file(path) | changes, path)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


SHARD_FAULTS = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "too long": lambda path: path.write_bytes(path.read_bytes() + bytes(8)),
    "empty": lambda path: path.write_bytes(b""),
    "five bytes": lambda path: path.write_bytes(path.read_bytes()[:5]),
    "a header without end": lambda path: path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:]),
    "a header that is no JSON": lambda path: path.write_bytes(path.read_bytes()[:8] + b"}" + path.read_bytes()[9:]),
    "a larger count": lambda path: rewrite_header(path, '"shape":[10,', '"shape":[11,'),
    "a negative count": lambda path: rewrite_header(path, '"shape":[10,', '"shape":[-1,'),
    "two tensors in one place": lambda path: rewrite_header(path, "[400,720]", "[80,400]"),
    "a type that we do not read": lambda path: rewrite_header(path, '"I64"', '"U64"'),
    "no latents": lambda path: rewrite_header(path, '"latents"', '"other"'),
    "latents of another type": lambda path: replace_tensors(
        path, latents=zeros(10, 2, 2, 2).half(), latents_flip=zeros(10, 2, 2, 2).half()
    ),
    "mirrored ones of another type": lambda path: replace_tensors(path, latents_flip=zeros(10, 2, 2, 2).half()),
    "integers for latents": lambda path: rewrite_header(path, '"F32"', '"I32"'),
    "latents without a side": lambda path: replace_tensors(path, latents=zeros(10, 2, 4), latents_flip=zeros(10, 2, 4)),
    "too few labels": lambda path: replace_tensors(path, labels=torch.arange(9)),
    "labels that are no integers": lambda path: replace_tensors(path, labels=zeros(10)),
    "a label below 0": lambda path: replace_tensors(path, labels=torch.tensor([0] * 9 + [-1])),
    "features of other images": lambda path: replace_tensors(path, features=zeros(9, 2, 2, 2).bfloat16()),
    "a broken link": lambda path: (path.unlink(), path.symlink_to(path.with_name("nowhere"))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", SHARD_FAULTS)
def test_a_bad_shard_is_named(tmp_path: Path, kind: str) -> None:
    many_shards(tmp_path)
    SHARD_FAULTS[kind](tmp_path / BAD)
    with pytest.raises((RunError, UsageError), match=BAD) as caught:
        LatentDataset(tmp_path, normalize=False)
    assert ("labels must be in" in str(caught.value)) == (kind == "a label below 0")


def test_a_bad_file_of_a_finished_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    moments_folder(folder)
    index, path = folder / "index.json", folder / "shard-00001.safetensors"
    text, shard = index.read_text(), path.read_bytes()
    for old, new in (
        ('"count": 2', '"count": 3'),
        ('"file": "shard-00001', '"file": "a'),
        ('"sha256": "', '"sha256": "0'),
    ):
        index.write_text(text.replace(old, new))
        with pytest.raises(RunError, match=r"safetensors does not agree with index.json; run the `vadit encode`"):
            LatentDataset(folder)
    for damaged in ("{", "[]", text.replace('"sha256"', '"sha"')):
        index.write_text(damaged)
        with pytest.raises(RunError, match=r"index.json.*; run the `vadit encode` command again to rewrite it"):
            LatentDataset(folder)
    index.write_text(text)
    path.unlink()
    pytest.raises(RunError, LatentDataset, folder).match(r"shard-00001.safetensors does not agree with index.json")
    path.write_bytes(shard)
    rewrite_header(path, r"\"sha256\"", r"\"sha\"")
    with pytest.raises(RunError, match=r"shard-00001.safetensors: its damaged metadata: sha256: Field required"):
        LatentDataset(folder)
    path.write_bytes(shard)
    index.unlink()
    pytest.raises(UsageError, LatentDataset, folder).match(r"is not finished: run its `vadit encode` command again")


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    reference_folder(tmp_path, stats=False)
    path = tmp_path / "latents_stats.pt"
    with pytest.raises(UsageError, match=r"has no latents_stats.pt; run `vadit encode --stats-only .*--no-normalize"):
        LatentDataset(tmp_path)
    for mean, std, message in (
        (None, None, "cannot be read"),
        (zeros(2), zeros(2) + 1, "has 2 channels but the latents have 4"),
        (zeros(4) / 0, zeros(4) + 1, "not finite and positive"),
        (zeros(4), torch.tensor([1.0, 1, 0, 1]), "not finite and positive"),
    ):
        path.write_bytes(b"nothing") if mean is None else torch.save({"mean": mean, "std": std}, path)
        with pytest.raises(RunError, match=rf"latents_stats.pt .*{message}.*vadit encode --stats-only"):
            LatentDataset(tmp_path)


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    pytest.raises(UsageError, LatentDataset, "").match(r"data.path is empty")
    pytest.raises(UsageError, LatentDataset, tmp_path / "nowhere").match(r"nowhere does not exist")
    pytest.raises(UsageError, LatentDataset, tmp_path).match(r"holds no .safetensors shards")
    save_file({"latents": zeros(2, 4, 3, 3), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    pytest.raises(UsageError, LatentDataset, tmp_path / "a.safetensors").match(r"a.safetensors is a file")
    pytest.raises(UsageError, LatentDataset, tmp_path).match(r"no mirrored latents; set --data.no-flip")
    save_file({"latents": zeros(2, 4, 3, 2), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"latents of 3 x 2; the generator needs squares"):
        LatentDataset(tmp_path, normalize=False, flip=False)


@pytest.mark.parametrize("layout", ["latents fp32", "moments bf16", "moments_flip fp32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_not_finite_is_named(tmp_path: Path, layout: str, value: float) -> None:
    key, dtype = layout.split()
    if key == "latents":
        reference_folder(tmp_path / "m")
        path, row, index = tmp_path / "m" / "latents_rank01_shard000.safetensors", 2, 10
    else:
        moments_folder(tmp_path / "m", dtype)
        path, row, index = tmp_path / "m" / "shard-00001.safetensors", 1, 5
    poison(path, key, row, value)
    dataset = LatentDataset(tmp_path / "m", flip=key == "moments_flip")
    mends = "fetch or encode the file" if key == "latents" else "checksum is wrong; run the `vadit encode` command of"
    with pytest.raises(RunError, match=rf"{path.name}: row {row} of {key} \(latent {index}\) .*not finite.*{mends}"):
        for _ in range(20):  # until the mirrored one comes
            list(LatentLoader(dataset, 4))
    good = torch.tensor([number for number in range(len(dataset)) if number != index])
    assert torch.isfinite(dataset.batch(good, 0, 0)[0]).all()
    with pytest.raises(RunError, match=rf"{path.name}: it holds values that are not finite.*{mends}"):
        compute_statistics(tmp_path / "m")


def test_a_checksum_that_is_right_is_told(tmp_path: Path) -> None:
    moments_folder(tmp_path / "m")
    error = open_shard(tmp_path / "m" / "shard-00000.safetensors").damage("it is odd")
    assert "it is odd, and its checksum is right; remove it and run the `vadit encode` command of" in str(error)


def test_the_largest_finite_numbers_are_no_fault(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        latents = torch.full((4, 2, 2, 2), torch.finfo(dtype).max, dtype=dtype)
        latents[1::2] *= -1
        (tmp_path / str(dtype)).mkdir()
        save_file({"latents": latents, "labels": torch.arange(4)}, tmp_path / str(dtype) / "a.safetensors")
        dataset = LatentDataset(tmp_path / str(dtype), normalize=False, flip=False)
        assert torch.equal(dataset.batch(torch.arange(4), 0, 0)[0], latents.float())


def test_a_shard_that_shrinks_or_goes_is_named(tmp_path: Path) -> None:
    """Before its first row is read, and after."""
    latents = many_shards(tmp_path)
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    assert torch.equal(dataset.batch(torch.tensor([39, 21]), 0, 0)[0], latents[[39, 21]])
    (tmp_path / "s02.safetensors").unlink()
    assert torch.equal(dataset.batch(torch.tensor([22]), 0, 0)[0], latents[[22]])  # it is open
    for name, index, first in (("s01", 12, 10), (BAD[:3], 39, 30)):
        path = tmp_path / f"{name}.safetensors"
        os.truncate(path, open_shard(path).tensors["latents"].offset + 40)
        with pytest.raises(RunError, match=rf"{name}.safetensors: it is cut short; fetch or encode"):
            dataset.batch(torch.tensor([3, index]), 0, 0)
        assert torch.equal(dataset.batch(torch.tensor([first]), 0, 0)[0], latents[[first]])
    (tmp_path / "s04.safetensors").unlink()
    with pytest.raises(RunError, match=r"s04.safetensors: it cannot be read: No such file"):
        dataset.batch(torch.tensor([45]), 0, 0)
    with pytest.raises(RunError, match=r"s04.safetensors cannot be read \(No such file"):
        dataset.shards[4].rows(0, 1, flipped=False)
    pytest.raises(RunError, dataset.shards[1].rows, 0, 10, flipped=False).match(r"s01.safetensors is cut short")


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch) -> None:
    latents = many_shards(tmp_path)
    monkeypatch.setattr("vadit.runtime.reading.MAX_OPEN", 2)
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    for seed in range(3):
        ids = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(dataset.batch(ids, 0, 0)[0], latents[ids])
    names = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert len([name for name in names if name.startswith(str(tmp_path))]) == 2

"""Damaged latents: shards, headers, statistics and values are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from latent_files import CLASSES, moments_folder, reference_folder, rewrite_header
from safetensors.torch import load_file, save_file

from vadit.latents.dataset import LatentDataset
from vadit.latents.loader import LatentLoader
from vadit.latents.shards import open_shard
from vadit.latents.statistics import compute_statistics
from vadit.runtime.errors import RunError, UsageError

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


# ------------------------------------------------------------------------------------------------ as they are read


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


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = many_shards(tmp_path)
    monkeypatch.setattr("vadit.runtime.reading.MAX_OPEN", 2)
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    for seed in range(3):
        ids = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(dataset.batch(ids, 0, 0)[0], latents[ids])
    names = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert len([name for name in names if name.startswith(str(tmp_path))]) == 2

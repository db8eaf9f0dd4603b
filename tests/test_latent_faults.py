"""Damaged latents: shards, headers, statistics and values; named, or left out and counted."""

from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_files import CHANNELS, CLASSES, SIDE, moments_folder, reference_folder, rewrite_header, settings
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vadit.config import DiTSpec, LatentDataSpec
from vadit.latents.dataset import DebugLatents, LatentDataset, LatentLoader, compute_statistics, open_latents
from vadit.latents.shards import LatentShardWriter
from vadit.runtime import rng, safetensors_file
from vadit.runtime.errors import RunError, UsageError


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    latents = torch.zeros(3, CHANNELS, SIDE, SIDE)
    latents[1, 2, 0, 0] = float("nan")
    save_file({"latents": latents, "labels": torch.zeros(3, dtype=torch.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(RunError, match=r"a.safetensors holds values that are not finite"):
        compute_statistics(tmp_path)


def test_damaged_statistics_are_named(tmp_path: Path) -> None:
    reference_folder(tmp_path)
    (tmp_path / "latents_stats.pt").write_bytes(b"nothing")
    with pytest.raises(RunError, match=r"latents_stats.pt cannot be read"):
        LatentDataset(tmp_path)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}, tmp_path / "latents_stats.pt")
    with pytest.raises(RunError, match=r"has 2 channels but the latents have 4"):
        LatentDataset(tmp_path)


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
    with pytest.raises(UsageError, match=r"no mirrored latents; set --data.no-flip"):
        LatentDataset(tmp_path)
    save_file(
        {"latents": torch.zeros(2, 8, 3, 3), "labels": torch.zeros(2, dtype=torch.int64)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(RunError, match=r"b.safetensors holds .*8, 3, 3.* but a.safetensors"):
        LatentDataset(tmp_path, normalize=False, flip=False)


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "fsync", full)
    writer = LatentShardWriter(tmp_path / "shard-00000.safetensors", settings())
    rows = torch.zeros(2, 2 * CHANNELS, SIDE, SIDE)
    writer.add(rows, rows, torch.zeros(2), torch.arange(2))
    with pytest.raises(RunError, match=r"shard-00000.safetensors .*No space left"):
        writer.close()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ left out or named


def many_shards(folder: Path, *, shards: int = 20, rows: int = 10) -> Tensor:
    """A folder in the authors' layout; its latents, whose value is their index."""
    folder.mkdir(exist_ok=True)
    latents = torch.arange(shards * rows).float()[:, None, None, None].expand(-1, 2, 2, 2).contiguous()
    for number in range(shards):
        part = latents[number * rows : (number + 1) * rows]
        labels = torch.arange(rows) % CLASSES
        save_file(
            {"latents": part, "latents_flip": part + 0.5, "labels": labels}, folder / f"s{number:02d}.safetensors"
        )
    return latents


def poison(path: Path, row: int, value: float = float("nan"), key: str = "latents", dtype: str = "<f4") -> None:
    """Overwrite one number of a row."""
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:end])[key]
    begin = end + entry["data_offsets"][0]
    row_bytes = (entry["data_offsets"][1] - entry["data_offsets"][0]) // entry["shape"][0]
    item = np.array([value], dtype).tobytes()
    data[begin + row * row_bytes + row_bytes - len(item) : begin + (row + 1) * row_bytes] = item
    path.write_bytes(data)


def damage(path: Path, kind: str) -> None:
    """Make a shard bad."""
    whole = path.read_bytes()
    if kind == "cut short":
        path.write_bytes(whole[:-9])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "header lies about the count":
        rewrite_header(path, '"shape":[10,', '"shape":[11,')
    elif kind == "header is no JSON":
        path.write_bytes(whole[:8] + b"}" + whole[9:])
    elif kind == "another type":
        path.unlink()
        rows = torch.zeros(10, 2, 2, 2, dtype=torch.float16)
        save_file({"latents": rows, "latents_flip": rows.clone(), "labels": torch.zeros(10, dtype=torch.int64)}, path)
    elif kind == "label out of range":
        rows = torch.zeros(10, 2, 2, 2)
        labels = torch.tensor([0] * 9 + [-1])
        save_file({"latents": rows, "latents_flip": rows.clone(), "labels": labels}, path)
    elif kind == "broken link":
        path.unlink()
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "no permission":
        path.chmod(0)
    else:
        raise AssertionError(kind)


SHARD_FAULTS = (
    "cut short",
    "empty",
    "header lies about the count",
    "header is no JSON",
    "another type",
    "label out of range",
    "broken link",
    "a folder",
    "no permission",
)


@pytest.mark.parametrize("kind", SHARD_FAULTS)
def test_a_bad_shard_is_named_or_left_out(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = many_shards(tmp_path)
    bad = tmp_path / "s03.safetensors"
    damage(bad, kind)
    if kind == "no permission":  # root may read everything
        refuse_to_open(monkeypatch, bad)
    with pytest.raises((RunError, UsageError), match=r"s03.safetensors"):
        LatentDataset(tmp_path, normalize=False)
    with caplog.at_level(logging.WARNING):
        dataset = LatentDataset(tmp_path, normalize=False, flip=False, on_error="skip", max_bad_share=0.05)
    assert [record.message for record in caplog.records if "1 shards (10 latents)" in record.message]
    assert "s03.safetensors" in caplog.text
    assert len(dataset) == 190 and dataset.num_left_out == 10
    sound = torch.cat([latents[:30], latents[40:]])
    read = torch.cat([batch for batch, _ in LatentLoader(dataset, 16, seed=1)])
    assert torch.equal(read[:, 0, 0, 0].sort().values, sound[:, 0, 0, 0])
    with pytest.raises(RunError, match=r"10 of 200 latents of .* more than data.max_bad_share 0.04.*s03"):
        LatentDataset(tmp_path, normalize=False, on_error="skip", max_bad_share=0.04)
    full = LatentLoader(DebugLatents(200, DiTSpec(input_size=2, in_channels=2)), 4).state_dict()
    with pytest.raises(UsageError, match=r"counts 200 samples but the data set has 190.*\(10 latents lie in"):
        LatentLoader(dataset, 4).load_state_dict(full)


def refuse_to_open(monkeypatch: pytest.MonkeyPatch, bad: Path) -> None:
    real = Path.open

    def opening(path: Path, *args: object, **options: object) -> object:
        if path == bad:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", opening)


def test_a_folder_without_a_sound_shard_is_refused(tmp_path: Path) -> None:
    many_shards(tmp_path, shards=2)
    for path in tmp_path.glob("*.safetensors"):
        damage(path, "cut short")
    with pytest.raises(RunError, match=r"none of the 2 shards of .* opens.*s00.safetensors"):
        LatentDataset(tmp_path, normalize=False, on_error="skip", max_bad_share=1.0)


@pytest.mark.parametrize("change", ["missing", "count", "unknown"])
def test_shards_that_the_index_contradicts_are_left_out(tmp_path: Path, change: str) -> None:
    moments_folder(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "index.json").read_text())
    if change == "missing":
        (tmp_path / "m" / "shard-00001.safetensors").unlink()
    elif change == "count":
        index["shards"][1]["count"] = 3
    else:
        del index["shards"][1]
    (tmp_path / "m" / "index.json").write_text(json.dumps(index))
    with pytest.raises(RunError, match=r"shard-00001.safetensors does not agree with index.json"):
        LatentDataset(tmp_path / "m")
    dataset = LatentDataset(tmp_path / "m", on_error="skip", max_bad_share=0.5)
    assert len(dataset) == 4 and dataset.num_left_out == (3 if change == "count" else 2)


@pytest.mark.parametrize(("dtype", "store"), [("fp32", "latents"), ("bf16", "moments"), ("fp32", "moments")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_latent_that_is_not_finite_is_named(tmp_path: Path, dtype: str, store: str, value: float) -> None:
    if store == "latents":
        reference_folder(tmp_path / "m")
        path, row, index = tmp_path / "m" / "latents_rank01_shard000.safetensors", 2, 10
    else:
        moments_folder(tmp_path / "m", dtype)
        path, row, index = tmp_path / "m" / "shard-00001.safetensors", 1, 5
    if dtype == "bf16":
        bits = int(np.array([value], "<f4").view("<u4")[0] >> 16)
        poison(path, row, bits, store, "<u2")
    else:
        poison(path, row, value, store)
    dataset = LatentDataset(tmp_path / "m", flip=False)
    with pytest.raises(RunError, match=rf"{path.name}: latent {index} \(row {row}\).*not finite.*on-error skip"):
        list(LatentLoader(dataset, 4))
    good = torch.tensor([number for number in range(len(dataset)) if number != index])
    assert torch.isfinite(dataset.batch(good, 0, 0)[0]).all()


def test_the_largest_finite_numbers_are_no_fault(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        latents = torch.full((4, 2, 2, 2), torch.finfo(dtype).max, dtype=dtype)
        latents[1::2] *= -1
        (tmp_path / str(dtype)).mkdir()
        labels = torch.zeros(4, dtype=torch.int64)
        save_file({"latents": latents, "labels": labels}, tmp_path / str(dtype) / "a.safetensors")
        dataset = LatentDataset(tmp_path / str(dtype), normalize=False, flip=False)
        assert torch.equal(dataset.batch(torch.arange(4), 0, 0)[0], latents.float())


def test_a_latent_that_overflows_when_normalised_is_named(tmp_path: Path) -> None:
    many_shards(tmp_path, shards=2)
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.full((1, 2, 1, 1), 0.5)}, tmp_path / "latents_stats.pt")
    poison(tmp_path / "s01.safetensors", 3, 3e38)
    dataset = LatentDataset(tmp_path, flip=False)
    with pytest.raises(RunError, match=r"s01.safetensors: latent 13 \(row 3\).*too large for float32 once normalised"):
        dataset.batch(torch.tensor([2, 13, 19]), 0, 0)


def test_a_bad_latent_gives_its_place_to_the_next_of_the_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latents = many_shards(tmp_path)
    bad = {7, 23, 24}
    for index in bad:
        poison(tmp_path / f"s{index // 10:02d}.safetensors", index % 10)
    options: dict = {"normalize": False, "flip": False, "on_error": "skip", "max_bad_share": 0.02}
    dataset = LatentDataset(tmp_path, **options)
    with pytest.raises(RunError, match=r"latent 7 "):  # no place to give: batch() names it
        dataset.batch(torch.tensor([7]), 0, 0)
    n, seed = len(dataset), 5
    expected = []
    for epoch in range(2):
        order = rng.permute(torch.arange(n), n, rng.fold(seed, "order", epoch)).tolist()
        for place in range(n):
            step = next(step for step in range(n) if order[(place + step) % n] not in bad)
            expected.append(order[(place + step) % n])
    with caplog.at_level(logging.WARNING):
        stream = LatentLoader(dataset, 10, seed).stream()
        read = torch.cat([batch for batch, _ in islice(stream, 40)])
        stream.close()
    assert torch.equal(read, latents[expected])
    assert set(dataset.bad) == bad
    message = next(record.message for record in caplog.records if "skipped" in record.message)
    assert message.startswith("3 latents are damaged") and "s02.safetensors: latent 23 (row 3)" in message
    # a position reads the same without the memory of what was bad, and on other ranks
    for rank in range(2):
        loader = LatentLoader(LatentDataset(tmp_path, **options), 5, 0, rank, 2)
        loader.load_state_dict({"seed": seed, "images_seen": 100})
        part = torch.cat([batch for batch, _ in islice(loader.stream(), 30)])
        assert torch.equal(part, latents[expected[100:]][rank::2])


def test_one_bad_mirrored_latent_leaves_the_plain_one(tmp_path: Path) -> None:
    many_shards(tmp_path)
    poison(tmp_path / "s00.safetensors", 7, key="latents_flip")
    dataset = LatentDataset(tmp_path, normalize=False, on_error="skip")
    loader, values = LatentLoader(dataset, 20), []
    for _ in range(6):
        values += torch.cat([batch for batch, _ in loader])[:, 0, 0, 0].tolist()
    assert 7.0 in values and 7.5 not in values and list(dataset.bad) == [7]


def test_too_many_bad_latents_end_the_run(tmp_path: Path) -> None:
    many_shards(tmp_path)
    for row in range(3):
        poison(tmp_path / "s05.safetensors", row)
    dataset = LatentDataset(tmp_path, normalize=False, flip=False, on_error="skip", max_bad_share=0.01)
    with pytest.raises(RunError, match=r"3 of 200 latents of .* damaged, more than data.max_bad_share 0.01.*s05"):
        list(LatentLoader(dataset, 16))


def test_statistics_leave_out_what_is_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latents = many_shards(tmp_path)
    poison(tmp_path / "s00.safetensors", 4)
    damage(tmp_path / "s19.safetensors", "cut short")
    with pytest.raises(RunError, match=r"s19.safetensors is cut short"):
        compute_statistics(tmp_path)
    with caplog.at_level(logging.WARNING):
        statistics = compute_statistics(tmp_path, on_error="skip")
    assert "leave out 2 damaged" in caplog.text and "s00.safetensors row 4" in caplog.text
    plain = torch.cat([latents[:4], latents[5:190]])
    everything = torch.cat([plain, latents[:190] + 0.5]).double()
    torch.testing.assert_close(statistics.mean.double().flatten(), everything.mean(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(statistics.std.double().flatten(), everything.std(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    for row in range(10):
        poison(tmp_path / "s01.safetensors", row)
    with pytest.raises(RunError, match=r"11 of 380 latents of .* are not finite, more than max_bad_share 0.01"):
        compute_statistics(tmp_path, on_error="skip")


def test_a_shard_that_shrinks_before_it_is_read_is_named(tmp_path: Path) -> None:
    many_shards(tmp_path, shards=3)
    dataset = LatentDataset(tmp_path, normalize=False, flip=False)
    damage(tmp_path / "s01.safetensors", "cut short")
    with pytest.raises(RunError, match=r"s01.safetensors: latent 12 .*the file was cut short"):
        dataset.batch(torch.tensor([3, 12]), 0, 0)
    (tmp_path / "s02.safetensors").unlink()
    with pytest.raises(RunError, match=r"s02.safetensors: latent 25 .*No such file"):
        dataset.batch(torch.tensor([25]), 0, 0)


def test_the_settings_reach_the_data_set(tmp_path: Path) -> None:
    many_shards(tmp_path)
    damage(tmp_path / "s03.safetensors", "cut short")
    model = DiTSpec(input_size=2, in_channels=2, num_classes=CLASSES)
    spec = LatentDataSpec(path=str(tmp_path), normalize=False, on_error="skip", max_bad_share=0.1)
    assert len(open_latents(spec, model)) == 190
    with pytest.raises(RunError, match=r"s03"):
        open_latents(LatentDataSpec(path=str(tmp_path), normalize=False), model)

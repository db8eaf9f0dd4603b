"""vadit prepare images: pixels, order, bad images, and going on after a kill."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import bad_files, jpeg, odd_files
from PIL import Image
from prepared import SIZE, content, fill, prepare
from tar_files import write_tar

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images
from vadit.images.beton import BetonSource
from vadit.images.folders import FolderSource
from vadit.images.loader import ImageSet, ImageSource
from vadit.images.pillow import decode
from vadit.images.tar import TarSource
from vadit.images.transforms import to_rgb
from vadit.runtime.errors import RunError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 PNGs."""
    return fill(tmp_path_factory.mktemp("images") / "src", 23)


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(to_rgb(image))


def squares(source: ImageSource, crop: Any) -> list[np.ndarray]:
    images = ImageSet(source, SIZE, crop=crop)
    return [decode(images, request) for request in images.requests(range(len(source)), seed=1, epoch=2)]


# ------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize(("name", "encode"), [("a.beton", "raw"), ("shards", "png")])
def test_crops_of_what_is_prepared_are_those_of_the_source(
    name: str, encode: Any, folder: Path, tmp_path: Path
) -> None:
    source = FolderSource(folder)
    summary = prepare(folder, tmp_path / name, encode=encode)
    made = open_images(ImageDataSpec(path=str(tmp_path / name)), SIZE).source
    assert summary.num_images == summary.num_new == len(made) == 23 and summary.bad == {}
    assert made.labels.tolist() == source.labels.tolist() and made.classes == source.classes == ["ant", "owl", "zebra"]
    for index in range(23):
        height, width = pixels(made.read(index)).shape[:2]
        with Image.open(source.paths[index]) as image:
            assert min(height, width) == SIZE and abs(width / height - image.width / image.height) < 0.05
    for crop in ("center", "random"):
        expected, found = squares(source, crop), squares(made, crop)
        assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("name", ["a.beton", "shards"])
def test_jpegs_are_near_and_quality_counts(name: str, folder: Path, tmp_path: Path) -> None:
    exact = np.stack(squares(FolderSource(folder), "center")).astype(float)
    errors = []
    for quality in (95, 30):
        out = tmp_path / str(quality) / name
        prepare(folder, out, encode="jpeg", quality=quality, verify="checksum")
        made = open_images(ImageDataSpec(path=str(out)), SIZE).source
        with Image.open(io.BytesIO(made.read(0))) as image:
            assert image.format == "JPEG" and image.layer[1][1:3] == (1, 1)  # type: ignore[attr-defined]
        errors.append(np.sqrt(((np.stack(squares(made, "center")) - exact) ** 2).mean()))
    assert errors[0] < 3 < errors[1]


def test_size_0_keeps_files_in_shards_and_jpegs_in_a_beton(tmp_path: Path) -> None:
    files = {file.name: file.data for file in odd_files().values()} | {"photo.jpg": jpeg(1)}
    for name, data in files.items():
        path = tmp_path / "src" / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    source = FolderSource(tmp_path / "src")
    summary = prepare(tmp_path / "src", tmp_path / "shards", size=0)
    assert summary.bad == {}
    shards = TarSource(tmp_path / "shards")
    assert [shards.read(index) for index in range(len(shards))] == [files[Path(path).name] for path in source.paths]
    prepare(tmp_path / "src", tmp_path / "jpeg.beton", size=0, encode="jpeg")
    prepare(tmp_path / "src", tmp_path / "raw.beton", size=0)
    one, other = BetonSource(tmp_path / "jpeg.beton"), BetonSource(tmp_path / "raw.beton")
    assert one.is_jpeg.all() and not other.is_jpeg.any()
    for index, path in enumerate(source.paths):
        with Image.open(path) as image:
            if image.format == "JPEG" and image.mode == "RGB":
                assert one.read(index) == source.read(index)
            assert np.array_equal(pixels(other.read(index)), np.asarray(to_rgb(image)))


def test_other_sources(tmp_path: Path) -> None:
    fill(tmp_path / "src", 6)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "src").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    (tmp_path / "labels.txt").write_text("004.png cat\n001.png dog\n003.png cat\n")
    prepare(flat, tmp_path / "a.beton", labels_file=str(tmp_path / "labels.txt"))
    beton = BetonSource(tmp_path / "a.beton")
    assert beton.classes == ["cat", "dog"] and beton.labels.tolist() == [0, 1, 0]
    prepare(tmp_path / "a.beton", tmp_path / "b", encode="png")
    shards = TarSource(tmp_path / "b")
    assert shards.classes == ["cat", "dog"] and shards.labels.tolist() == [0, 1, 0]
    prepare(tmp_path / "b", tmp_path / "c.beton")
    again = BetonSource(tmp_path / "c.beton")
    assert [again.read(index) for index in range(3)] == [beton.read(index) for index in range(3)]
    assert again.classes == ["cat", "dog"] and again.labels.tolist() == [0, 1, 0]


# ------------------------------------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("name", ["a.beton", "shards"])
def test_bytes_do_not_depend_on_the_number_of_processes(name: str, folder: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    prepare(folder, tmp_path / "one" / name)
    prepare(folder, tmp_path / "two" / name, num_workers=2, progress=lambda *at: told.append(at))
    one, two = content(tmp_path / "one" / name), content(tmp_path / "two" / name)
    assert one == two and len(one) == (2 if name == "a.beton" else 7)
    assert told[-1] == ("verify", 23, 23) and ("prepare", 23, 23) in told


KILLED = """
import os, signal, sys
from vadit.config import ImageDataSpec
from vadit.images.prepare.images import prepare_images
def progress(title, done, total):
    if done >= 64:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    spec = ImageDataSpec(path=sys.argv[1], on_error="skip", max_bad_share=0.1)
    prepare_images(spec, sys.argv[2], size=192, shard_size=20, num_workers=int(sys.argv[3]), progress=progress)
"""


@pytest.mark.parametrize(("name", "num_workers"), [("a.beton", 1), ("shards", 2)])
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, num_workers: int, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", 90)
    (source / "ant" / "010.png").write_bytes(b"no image")
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(source), str(tmp_path / name), str(num_workers)]
    # waits for the ends of all that hold its output: no process survives its parent
    done = subprocess.run(command, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    if name == "shards":
        with pytest.raises(UsageError, match="shards is not finished: run its `vadit prepare` command again"):
            TarSource(tmp_path / name)
    else:
        assert not (tmp_path / name).exists()
    settings: dict[str, Any] = {"size": 192, "shard_size": 20, "max_bad_share": 0.1}
    told: list[int] = []
    summary = prepare(source, tmp_path / name, progress=lambda _, done, __: told.append(done), **settings)
    assert 0 < summary.num_new < 60 and summary.num_images == 89 and told[0] > 30
    assert [Path(place).name for place in summary.bad] == ["010.png"]
    prepare(source, tmp_path / "straight" / name, **settings)
    assert content(tmp_path / name) == content(tmp_path / "straight" / name)


@pytest.mark.parametrize("lines", [1, 12, 30, 31])
def test_a_journal_that_was_torn_leads_to_the_same_bytes(lines: int, folder: Path, tmp_path: Path) -> None:
    """A kill may leave only a part of what was written at once."""

    def stop(title: str, done: int, total: int) -> None:
        if done >= 32:
            raise InterruptedError

    source = fill(tmp_path / "src", 36, "jpg")
    (source / "ant" / "004.jpg").write_bytes(b"")
    settings: dict[str, Any] = {"size": 320, "max_bad_share": 0.1}
    with pytest.raises(InterruptedError):
        prepare(source, tmp_path / "a.beton", progress=stop, **settings)
    journal = tmp_path / "a.beton.partial.journal"
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:lines]) + b"".join(kept[lines : lines + 1])[:9])
    prepare(source, tmp_path / "a.beton", **settings)
    prepare(source, tmp_path / "straight" / "a.beton", **settings)
    assert content(tmp_path / "a.beton") == content(tmp_path / "straight" / "a.beton")


@pytest.mark.parametrize("name", ["a.beton", "shards"])
def test_a_second_call_changes_nothing_and_verifies(name: str, folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / name)
    before = content(tmp_path / name)
    summary = prepare(folder, tmp_path / name)
    assert content(tmp_path / name) == before and (summary.num_new, summary.num_images) == (0, 23)
    victim = tmp_path / name / "images-000001.tar" if name == "shards" else tmp_path / name
    data = bytearray(victim.read_bytes())
    sample = open_images(ImageDataSpec(path=str(victim)), SIZE).source
    place = data.index(sample.read(1)[-50:])
    data[place] ^= 1
    victim.write_bytes(data)
    for verify in ("decode", "checksum"):
        with pytest.raises(RunError, match="fails its checksum"):
            prepare(folder, tmp_path / name, verify=verify)
    prepare(folder, tmp_path / name, verify="none")
    victim.unlink()
    assert prepare(folder, tmp_path / name).num_new == (5 if name == "shards" else 23)
    assert content(tmp_path / name) == before


def test_a_damaged_shard_is_made_anew_and_a_missing_one_is_missed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "shards"
    prepare(folder, out)
    before = content(out)
    os.truncate(out / "images-000002.tar", 2000)
    (out / "images-000003.tar").unlink()
    with pytest.raises(RunError, match=r"images-000003.tar is missing; run the `vadit prepare` command again"):
        TarSource(out)
    assert prepare(folder, out).num_new == 10
    assert "images-000002.tar is damaged" in caplog.text and content(out) == before


def test_what_was_written_is_compared_with_the_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification finds what a bug of the writers would do."""
    from vadit.images.tar import TarShardWriter

    original = TarShardWriter.add
    change: Callable[[bytes, int], tuple[bytes, int]]

    def add(writer: TarShardWriter, key: str, extension: str, data: bytes, label: int) -> None:
        original(writer, key, extension, *change(data, label))

    monkeypatch.setattr(TarShardWriter, "add", add)
    changes: list[tuple[Callable[[bytes, int], tuple[bytes, int]], str]] = [
        (lambda data, label: (data, 1), "labels .* are not those of"),
        (lambda data, label: (data[: len(data) // 2], label), "was written but does not decode"),
        (lambda data, label: (jpeg(0, 50, 40), label), "has 50 x 40 pixels, not 32"),
    ]
    for number, (wanted, message) in enumerate(changes):
        change = wanted
        with pytest.raises(RunError, match=message):
            prepare(folder, tmp_path / str(number))


# ------------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize("name", ["a.beton", "shards"])
def test_bad_images_are_listed_and_left_out(name: str, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", 23)
    for file, (_, data) in enumerate(bad_files().values()):
        (source / "owl" / f"bad-{file}.jpg").write_bytes(data)
    os.symlink("nowhere", source / "owl" / "link.jpg")
    bad = len(bad_files()) + 1
    with pytest.raises(
        RunError, match=rf"{bad} of {bad + 23} images are bad, more than max_bad_share 0.01 allows; see"
    ):
        prepare(source, tmp_path / name)
    summary = prepare(source, tmp_path / name, max_bad_share=0.9)
    assert summary.num_images == 23 and len(summary.bad) == bad
    assert summary.num_new == (0 if name == "shards" else 23)  # of a beton, what did not fill a page is made again
    assert summary.bad_file is not None
    lines = [line.split("\t") for line in summary.bad_file.read_text().splitlines()]
    assert [line[0] for line in lines] == sorted(line[0] for line in lines) and len(lines) == bad
    assert all(Path(path).parent.name == "owl" and why for path, why in lines)
    made = open_images(ImageDataSpec(path=str(tmp_path / name)), SIZE).source
    assert made.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    with pytest.raises(RunError, match=r"owl/bad-.*--on-error skip"):
        prepare(source, tmp_path / "other" / name, on_error="raise")
    with pytest.raises(RunError, match=r"owl/bad-.*--on-error skip"):
        prepare(source, tmp_path / name, on_error="raise")


def test_what_a_shard_of_the_source_lacks_is_listed_too(tmp_path: Path) -> None:
    members = [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1))]
    write_tar(tmp_path / "src" / "a.tar", members)
    summary = prepare(tmp_path / "src", tmp_path / "a.beton", max_bad_share=1.0)
    assert summary.num_images == 1 and list(summary.bad) == [f"{tmp_path}/src/a.tar:1.jpg"]
    with pytest.raises(RunError, match="there is no label"):
        prepare(tmp_path / "src", tmp_path / "b.beton", on_error="raise")

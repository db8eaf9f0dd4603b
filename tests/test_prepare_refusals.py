"""vadit prepare: what is refused, a full disk, a process that dies, and the commands."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from full_disk import room_for
from prepared import content, fill, prepare
from tar_files import write_tar

from vadit import cli
from vadit.images.prepare import images as prepare_module
from vadit.runtime.errors import RunError, UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 PNGs."""
    return fill(tmp_path_factory.mktemp("images") / "src", 23)


@pytest.mark.parametrize("name", ["a.beton", "shards"])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_in_the_same_place_are_refused(
    name: str, finished: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        prepare(folder, tmp_path / name)
    else:
        with pytest.raises(RunError, match="cannot be written"), room_for(9_000 if name == "shards" else 9_000_000):
            prepare(folder, tmp_path / name)
    more = fill(tmp_path / "more", 24)
    for source, settings, message in (
        (folder, {"size": 16}, "begun with size 32, this command says 16"),
        (folder, {"encode": "jpeg", "quality": 90}, "quality|encode"),
        (more, {}, "begun with source 23 images, .* this command says 24 images"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare(source, tmp_path / name, **settings)
    if name == "shards":
        with pytest.raises(UsageError, match="shard_size 5, this command says 6"):
            prepare(folder, tmp_path / name, shard_size=6)
    assert prepare(folder, tmp_path / name).num_images == 23
    # a source may move
    os.rename(folder, tmp_path / "moved")
    try:
        assert prepare(tmp_path / "moved", tmp_path / name).num_new == 0
    finally:
        os.rename(tmp_path / "moved", folder)


def test_requests_that_cannot_be_met(folder: Path, tmp_path: Path) -> None:
    for out, settings, message in (
        ("a.beton", {"format": "webdataset"}, "webdataset, which needs a folder"),
        ("a", {"format": "beton"}, r"needs a name that ends in .beton"),
        ("a", {"encode": "raw"}, "--encode is raw, which webdataset cannot hold"),
        ("a.beton", {"encode": "png"}, "--encode is png, which beton cannot hold"),
        ("a", {"size": 0, "encode": "png"}, "--size 0 keeps the files"),
        ("a", {"size": -1}, "--size is -1"),
        ("a", {"quality": 101}, "--quality is 101"),
        ("a", {"shard_size": 0}, "--shard-size is 0"),
        ("a", {"num_workers": 0}, "--num-workers is 0"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare(folder, tmp_path / out, **settings)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(UsageError, match="is a file"):
        prepare(folder, tmp_path / "file")
    with pytest.raises(UsageError, match="is a folder"):
        prepare(folder, tmp_path / "folder.beton")
    write_tar(tmp_path / "foreign" / "x.tar", [("0.jpg", b"0")])
    write_tar(tmp_path / "same" / "images-000000.tar", [("0.jpg", b"0")])
    for name in ("foreign", "same"):
        with pytest.raises(UsageError, match="holds other shards"):
            prepare(folder, tmp_path / name)
    with tarfile.open(tmp_path / "same" / "images-000000.tar") as archive:
        assert archive.getnames() == ["0.jpg"]


@pytest.mark.parametrize("name", ["a.beton", "shards"])
def test_two_at_a_time_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    def progress(title: str, *_: int) -> None:
        if title == "prepare":
            with pytest.raises(UsageError, match="another process writes"):
                prepare(folder, tmp_path / name)

    assert prepare(folder, tmp_path / name, progress=progress).num_new == 23


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("a.beton", 9_000_000), ("a.beton", 8_000), ("shards", 15_000), ("shards", 100)]
)
def test_a_full_disk_is_told_and_the_same_command_goes_on(
    name: str, num_bytes: int, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match=r"cannot be written \(.*\); make room .*it goes on where it was"):
        with room_for(num_bytes):
            prepare(folder, tmp_path / name, size=256)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("a.beton", "classes.json")]
    prepare(folder, tmp_path / name, size=256)
    prepare(folder, tmp_path / "straight" / name, size=256)
    assert content(tmp_path / name) == content(tmp_path / "straight" / name)


def test_a_process_that_dies_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_Encoder", _Killer)
    with pytest.raises(RunError, match=r"a process of vadit prepare was killed.*lower --num-workers"):
        prepare(folder, tmp_path / "a", num_workers=2)
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "a").num_images == 23


class _Killer:
    """Instead of the encoder: ends its process."""

    def __init__(self, job: Any) -> None:
        self.exit = os._exit

    def __reduce__(self) -> Any:
        return os._exit, (1,)

    def __call__(self, part: Any) -> Any:
        raise AssertionError("not reached")


# ------------------------------------------------------------------------------------------------ the command


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = fill(tmp_path / "src", 24)
    (source / "owl" / "000.png").write_bytes(b"")
    arguments = ["prepare", "images", str(source), str(tmp_path / "out"), "--size", "32", "--num-workers", "1"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 24 images are bad, more than max_bad_share 0.01 allows; see ")
    assert cli.main([*arguments, "--max-bad-share", "0.05"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {source}/owl/000.png: " in out and "1 bad images are left out" in out
    assert "3 classes, in this order: 0 ant, 1 owl, 2 zebra" in out
    assert "23 images" in out and "0 made now" in out and "all decoded again" in out
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "owl", "zebra"]
    beton = ["prepare", "images", str(folder), str(tmp_path / "x.beton"), "--format", "beton", "--size", "32"]
    assert cli.main([*beton, "--num-workers", "1", "--on-error", "raise", "--verify", "checksum"]) == 0
    assert "all checksums compared" in capsys.readouterr().out
    assert cli.main([*beton, "--encode", "jpeg"]) == 2
    assert "was begun with encode raw, this command says jpeg" in capsys.readouterr().err
    assert cli.main(["prepare", "--help"]) == 0
    assert "prepare images SOURCE" in capsys.readouterr().out
    assert cli.main(["prepare", "pictures"]) == 2
    assert "needs images first" in capsys.readouterr().err
    assert cli.main(["prepare", "images", str(folder)]) == 2

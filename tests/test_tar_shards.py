"""WebDataset shards: what is read from them, and the index beside them."""

import io
import json
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from full_disk import room_for
from tar_files import blob, bytes_of, samples, with_checksum, write_tar

from vadit.images.sources import tar_index
from vadit.images.sources.tar import TarSource, expand, find_shards
from vadit.images.sources.tar_index import BLOCK
from vadit.runtime.errors import RunError, UsageError


# --- what is read
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_of_a_folder_of_shards(kind: int, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write_tar(tmp_path / f"train-{number:06d}.tar", samples(10 * number, 10), kind)
    source = TarSource(tmp_path)
    assert len(source) == 30 and source.name == str(tmp_path)
    assert bytes_of(source) == [blob(number) for number in range(30)]
    assert source.labels.tolist() == [number % 3 for number in range(30)]
    assert source.classes == ["0", "1", "2"]
    assert source.describe(17) == f"{tmp_path}/train-000001.tar:00017.jpg"
    again = TarSource(tmp_path)
    assert bytes_of(again) == bytes_of(source) and again.labels.tolist() == source.labels.tolist()


def test_long_names_and_large_sizes_of_both_formats(tmp_path: Path) -> None:
    folder = "a-very-long-folder-name/" * 12
    for kind, extra in ((tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "päx"), (tarfile.USTAR_FORMAT, "")):
        name = f"{folder}{extra}" if extra else "f" * 90 + "/" + "n" * 60
        path = write_tar(tmp_path / f"{kind}.tar", [(f"{name}.PNG", blob(1)), (f"{name}.cls", b" 1\n")], kind)
        source = TarSource(path)
        assert source.describe(0) == f"{path}:{name}.PNG"
        assert bytes_of(source) == [blob(1)] and source.labels.tolist() == [1]


def test_size_in_base_256_and_from_a_pax_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", blob(0, 700)), ("0.cls", b"0")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    path.write_bytes(with_checksum(data, 0))
    assert bytes_of(TarSource(path)) == [blob(0, 700)]
    entry = tarfile.TarInfo("0.jpg")
    entry.size, entry.pax_headers = 0, {"size": "700"}  # type: ignore[assignment]
    head = entry.tobuf(tarfile.PAX_FORMAT)
    path.write_bytes(head + blob(0, 700) + bytes(-700 % BLOCK) + bytes(2 * BLOCK))
    assert bytes_of(TarSource(path)) == [blob(0, 700)]


def test_labels_from_json_and_members_in_any_order(tmp_path: Path) -> None:
    members = [
        ("b.jpg", b"B"),
        ("a.webp", b"A"),
        ("c.left.png", b"C"),
        ("a.json", json.dumps({"label": 2, "caption": "x"}).encode()),
        ("b.json", json.dumps({"cls": 1}).encode()),
        ("c.cls", b"0"),
        ("c.json", b"not even read, since there is a .cls"),
        ("d.input.png", b"D"),
        ("d.target.cls", b"3"),
    ]
    source = TarSource(write_tar(tmp_path / "a.tar", members))
    assert bytes_of(source) == [b"B", b"A", b"C", b"D"] and source.labels.tolist() == [1, 2, 0, 3]
    several = [("a.jpg", b"A"), ("a.fine.cls", b"1"), ("a.coarse.cls", b"0")]
    with pytest.raises(RunError, match=r"several labels \(fine.cls and coarse.cls\); call the one that is meant .cls"):
        TarSource(write_tar(tmp_path / "b.tar", several))
    assert TarSource(write_tar(tmp_path / "c.tar", [*several, ("a.cls", b"5")])).labels.tolist() == [5]


def test_harmless_members_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("./", tarfile.DIRTYPE), ("./x.jpg/", tarfile.DIRTYPE), ("readme", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.linkname = "elsewhere"
            archive.addfile(entry)
        for name, data in [
            ("./0.txt", b"a caption"),
            ("./0.jpg", b"J"),
            ("./._0.jpg", b"left by a Mac"),
            ("./LICENSE", b"no extension"),
            ("./0.npy", b"features"),
            ("./1.json", b"{}"),  # an image that could not be fetched
            ("./0.cls", b"4"),
        ]:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    source = TarSource(path)
    assert bytes_of(source) == [b"J"] and source.labels.tolist() == [4] and source.describe(0) == f"{path}:./0.jpg"


def test_shards_without_any_label_are_one_class_and_say_what_they_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("0.json", b'{"class_id": 7}'), ("0.txt", b"3"), ("README", b"")])
    write_tar(tmp_path / "b.tar", [("1.jpg", b"1"), ("1.label", b"3")])
    for _ in range(2):  # the second time from the index
        source = TarSource(tmp_path)
        assert source.classes == ["all"] and source.labels.tolist() == [0, 0]
    (first, second) = caplog.messages
    assert (
        first == second and "no labels were found" in first and "lie .json .label .txt; store labels as .cls" in first
    )
    caplog.clear()
    assert TarSource(write_tar(tmp_path / "c.tar", samples(0, 3))).labels.tolist() == [0, 1, 2] and not caplog.messages


def test_patterns_and_places_without_shards(tmp_path: Path) -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("a{1..2}b{0..1}") == ["a1b0", "a1b1", "a2b0", "a2b1"]
    assert expand("a{x}") == ["a{x}"]
    for number in range(3):
        write_tar(tmp_path / f"t-{number:03d}.tar", samples(number, 1))
    assert bytes_of(TarSource(f"{tmp_path}/t-{{000..002}}.tar")) == [blob(0), blob(1), blob(2)]
    assert find_shards(str(tmp_path / "t-001.tar")) == [tmp_path / "t-001.tar"]
    with pytest.raises(UsageError, match=r"t-003.tar does not exist \(1 of the 4 shards"):
        TarSource(f"{tmp_path}/t-{{000..003}}.tar")
    (tmp_path / "empty").mkdir()
    pytest.raises(UsageError, TarSource, tmp_path / "empty").match(r"holds no .tar files")
    pytest.raises(UsageError, TarSource, tmp_path / "nothing.tar").match("does not exist")
    with pytest.raises(UsageError, match=r"holds no images .*jpg"):
        TarSource(write_tar(tmp_path / "odd.tar", [("0.txt", b"text")]))


def test_many_threads_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_tar(tmp_path / f"t-{number}.tar", samples(40 * number, 40))
    monkeypatch.setattr("vadit.runtime.reading.MAX_OPEN", 2)
    source = TarSource(tmp_path)
    order = list(range(240)) * 4
    random.Random(0).shuffle(order)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [blob(number) for number in order]
        assert set(pool.map(source.describe, order)) == {source.describe(index) for index in range(240)}
    here = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert len([name for name in here if name.startswith(str(tmp_path))]) <= 2


# --- the index
def test_headers_are_read_once_and_again_where_the_shard_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[BinaryIO] = []
    original = tar_index.walk
    monkeypatch.setattr(tar_index, "walk", lambda file: calls.append(file) or original(file))
    path = write_tar(tmp_path / "a.tar", samples(0, 5))
    for _ in range(2):
        TarSource(path)
    assert len(calls) == 1 and [entry.name for entry in sorted(tmp_path.iterdir())] == ["a.tar", "a.tar.index"]
    # same size and names, another order of labels: only the time of change tells
    write_tar(path, [(name, data if name.endswith("jpg") else b"2") for name, data in samples(0, 5)])
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    assert TarSource(path).labels.tolist() == [2] * 5
    write_tar(path, samples(5, 9))
    assert bytes_of(TarSource(path)) == [blob(number) for number in range(5, 14)]
    assert len(calls) == 3


def test_a_folder_that_cannot_be_written_to_goes_without_index(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(0, 4))
    with room_for(100):
        assert len(TarSource(path)) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]

"""WebDataset shards: what is read from them, the index beside them, and shards that are damaged or made otherwise."""

import io
import json
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest
from launched import room_for
from tar_files import Members, blob, bytes_of, samples, with_checksum, write_tar

from vadit.images.sources import tar_index
from vadit.images.sources.tar import TarSource, expand, find_shards
from vadit.images.sources.tar_index import BLOCK
from vadit.runtime.errors import RunError, UsageError


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


def test_shards_without_any_label_are_one_class_and_say_what_they_hold(tmp_path: Path, caplog) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", b"0"), ("0.json", b'{"class_id": 7}'), ("0.txt", b"3"), ("README", b"")])
    write_tar(tmp_path / "b.tar", [("1.jpg", b"1"), ("1.label", b"3"), ("2.heic", b"2"), ("3.HEIC", b"3")])
    for _ in range(2):  # the second time from the index
        source = TarSource(tmp_path)
        assert source.classes == ["all"] and source.labels.tolist() == [0, 0]
        assert source.unread == {"HEIC": 2}
    (first, second) = caplog.messages
    assert first == second and "no labels were found" in first
    assert "lie .heic .json .label .txt; store labels as .cls" in first
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


def test_many_threads_few_descriptors(tmp_path: Path, monkeypatch) -> None:
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


def test_headers_are_read_once_and_again_where_the_shard_is_another(tmp_path: Path, monkeypatch) -> None:
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


def link(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.LNKTYPE, "0.jpg"
    return entry


FAULTS: dict[str, tuple[Members | tarfile.TarInfo, str, str]] = {
    "no label": ([("9.jpg", b"9")], "a.tar:9.jpg", "there is no label"),
    "label is text": ([("9.jpg", b"9"), ("9.cls", b"cat")], "a.tar:9", "the label is 'cat'"),
    "label is empty": ([("9.jpg", b"9"), ("9.cls", b"")], "a.tar:9", "the label is ''"),
    "label is negative": ([("9.jpg", b"9"), ("9.cls", b"-1")], "a.tar:9", "the label is '-1'"),
    "label is huge": ([("9.jpg", b"9"), ("9.cls", b"123456789012")], "a.tar:9", "from 0 to 999999"),
    "label of json is text": ([("9.jpg", b"9"), ("9.json", b'{"label": "cat"}')], "a.tar:9", "the label is 'cat'"),
    "label of json is true": ([("9.jpg", b"9"), ("9.json", b'{"label": true}')], "a.tar:9", "the label is 'True'"),
    "json is damaged": ([("9.jpg", b"9"), ("9.json", b'{"label": 1')], "a.tar:9", "9.json is not valid JSON"),
    "json is a list": ([("9.jpg", b"9"), ("9.json", b"[1]")], "a.tar:9", "9.json: Input should be a valid dictionary"),
    "json is deep": ([("9.jpg", b"9"), ("9.json", b"[" * 200_000)], "a.tar:9", "9.json is nested deeper than 64"),
    "same name again": ([("00000.jpg", b"9")], "a.tar:00000", "00000.jpg is there twice"),
    "same label again": ([("00000.cls", b"1")], "a.tar:00000", "00000.cls is there twice"),
    "two images": ([("9.jpg", b"9"), ("9.png", b"9"), ("9.cls", b"1")], "a.tar:9", "9.jpg and 9.png"),
    "dots in names": ([("9.1.jpg", b"9"), ("9.2.jpg", b"9"), ("9.cls", b"1")], "a.tar:9", "ends at the first dot"),
    "label without image": ([("9.cls", b"1"), ("9.avif", b"?")], "a.tar:9", "a label but no image"),
    "hard link": (link("9.jpg"), "a.tar:9", "9.jpg is a link"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_sample_is_named_or_left_out(name: str, tmp_path: Path) -> None:
    added, place, why = FAULTS[name]
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    with tarfile.open(path, "a") as archive:
        if isinstance(added, tarfile.TarInfo):
            archive.addfile(added)
        else:
            for member, data in added:
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    for _ in range(2):  # the second time from the index
        with pytest.raises(RunError) as caught:
            TarSource(path)
        assert f"{tmp_path}/{place}: " in str(caught.value) and why in str(caught.value)
        source = TarSource(path, on_error="skip")
        kept = [number for number in range(3) if f":{number:05d}" not in place]
        assert bytes_of(source) == [blob(number) for number in kept]
        assert source.labels.tolist() == kept
        assert list(source.bad_files) == [f"{tmp_path}/{place}"] and why in source.bad_files[f"{tmp_path}/{place}"]


def test_a_shard_cut_at_any_byte(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(0, 3)).read_bytes()
    end = whole.rstrip(b"\0")
    last = -(-len(end) // BLOCK) * BLOCK  # where the end marker begins
    with tarfile.open(tmp_path / "whole.tar") as archive:
        starts = [member.offset_data + member.size for member in archive]
    for size in sorted({0, 1, 100, 511, 512, last - 1, last, last + 511, *starts, *range(0, last, 700)}):
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        pytest.raises(RunError, TarSource, path).match(rf"{size}.tar:from byte \d+ on: .*cut short")
        held = [number for number in range(3) if size >= starts[2 * number + 1]]
        if not held:
            pytest.raises(UsageError, TarSource, path, on_error="skip").match("holds no images")
            continue
        source = TarSource(path, on_error="skip")
        assert bytes_of(source) == [blob(number) for number in held] and source.labels.tolist() == held
        assert [place for place in source.bad_files if ":from byte " in place]
    for size in (last + BLOCK, last + 2 * BLOCK, len(whole)):  # the marker is there: nothing is missing
        path = tmp_path / f"{size}.tar"
        path.write_bytes(whole[:size])
        assert len(TarSource(path)) == 3


def test_headers_that_lie(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(0, 3)).read_bytes()
    second = 2 * BLOCK  # of 0.jpg

    def changed(start: int, content: bytes, *, fit: bool) -> TarSource:
        data = bytearray(whole)
        data[second + start : second + start + len(content)] = content
        path = tmp_path / "changed.tar"
        path.write_bytes(with_checksum(data, second) if fit else data)
        return TarSource(path)

    with pytest.raises(RunError, match="from byte 1024 on: there is a damaged header at byte 1024"):
        changed(0, b"x", fit=False)
    with pytest.raises(RunError, match=r"from byte 1024 on: 00000.jpg should end at byte"):
        changed(124, b"77777777777\0", fit=True)
    # no number; below 0 in base 256; too small, so that the next header lies in the image
    for size in (b"0000000008x\0", b"\xff" * 11 + b"\x01", b"00000000001\0"):
        with pytest.raises(RunError, match=r"from byte (1024|2048) on: there is a damaged header|states no size"):
            changed(124, size, fit=True)
    pytest.raises(RunError, changed, 156, b"S", fit=True).match("is no plain file")


def test_other_files_by_the_name_of_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for content, why in (
        (b"\x1f\x8b" + bytes(600), "gunzip"),
        (blob(0, 5000), "there is no .tar header at byte 0"),
        (b"", "the file ends at byte 0"),
    ):
        path.write_bytes(content)
        pytest.raises(RunError, TarSource, path).match(why)
    first, second = (write_tar(tmp_path / f"{name}.tar", samples(0, 2)).read_bytes() for name in "xy")
    path.write_bytes(first + second)
    pytest.raises(RunError, TarSource, path).match("data behind the end marker")


def test_damaged_pax_headers(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar", [("é" * 80 + ".jpg", b"x")], tarfile.PAX_FORMAT).read_bytes()
    for old, new in ((b"path=", b"path "), (b" path", b"xpath"), (b"\n\0", b"\0\0")):
        assert old in whole
        path = tmp_path / "b.tar"
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(RunError, match=r"b.tar:from byte 0 on: the extended header at byte 0 is damaged"):
            TarSource(path)


def test_a_shard_that_changes_while_it_is_in_use(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(0, 3))
    source = TarSource(path)
    write_tar(path, samples(1, 3))
    pytest.raises(RunError, source.read, 0).match(r"a.tar was changed while it was in use")
    source = TarSource(path)
    assert source.read(2) == blob(3)
    os.truncate(path, 600)
    pytest.raises(RunError, source.read, 2).match("cut short while it was in use")
    write_tar(path, samples(0, 3))
    source = TarSource(path)
    path.unlink()
    pytest.raises(RunError, source.read, 0).match(r"a.tar:byte 1024 cannot be read \(No such file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_shard_without_permission(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(0, 3)).chmod(0)
    pytest.raises(RunError, TarSource, tmp_path).match("Permission denied")

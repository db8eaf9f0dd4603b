"""WebDataset shards that are damaged, cut short, or made otherwise than they should be."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from tar_files import Members, blob, bytes_of, samples, with_checksum, write_tar

from vadit.images.sources.tar import TarSource
from vadit.images.sources.tar_index import BLOCK
from vadit.runtime.errors import RunError, UsageError


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

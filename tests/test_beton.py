"""The .beton format: read what FFCV writes, write what it reads, resume; any damage is named."""

import gc
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vadit.images.jpeg import jpeg_size
from vadit.images.sources.beton import (
    ALLOCATION,
    FIELD,
    FOOTER,
    HEADER,
    KINDS,
    MIN_PAGE_SIZE,
    OUR_FIELDS,
    VERSION,
    BetonFile,
    BetonSource,
    EncodedImage,
    Field,
    row_type,
)
from vadit.images.sources.beton_writer import BetonWriter, encode_image
from vadit.runtime.errors import RunError, UsageError

COUNT = 9
FRONT = HEADER.itemsize + 3 * FIELD.itemsize


def picture(number: int, width: int = 20, height: int = 16) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write(path: Path, count: int = COUNT, mode: str = "both", **options: Any) -> Path:
    """`count` pictures of several widths, labels going round three classes; every second one is a JPEG."""
    with BetonWriter(path, max_samples=count + 3, page_size=MIN_PAGE_SIZE, **options) as writer:
        for number in range(count):
            kind: Any = ("raw", "jpg")[number % 2] if mode == "both" else mode
            writer.append(encode_image(picture(number, 20 + number % 4), kind), number % 3)
        writer.finish({"classes": ["cat", "dog", "eel"], "size": 16})
    return path


def decoded(source: BetonSource, index: int) -> np.ndarray:
    with Image.open(io.BytesIO(source.read(index))) as image:
        return np.asarray(image.convert("RGB"))


def without_checksums(beton: Path) -> Path:
    """The same images as FFCV's writer would leave them: without checksums and notes."""
    data = beton.read_bytes()
    entries = np.frombuffer(data, FIELD, 2, HEADER.itemsize)
    old = np.frombuffer(data, row_type(OUR_FIELDS), COUNT, FRONT)
    rows = np.zeros(COUNT, row_type(OUR_FIELDS[:2]))
    rows["image"], rows["label"] = old["image"], old["label"]
    header = np.frombuffer(data, HEADER, 1).copy()
    table = int(header["allocations"][0])
    end = table - FOOTER.itemsize - int(np.frombuffer(data, FOOTER, 1, table - FOOTER.itemsize)["size"][0])
    header["num_fields"], header["allocations"] = 2, end
    front = header.tobytes() + entries.tobytes() + rows.tobytes()
    path = beton.with_name("plain.beton")
    path.write_bytes(front + bytes(MIN_PAGE_SIZE - len(front)) + data[MIN_PAGE_SIZE:end] + data[table:])
    return path


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("beton") / "images.beton")


@pytest.fixture(scope="module")
def plain(beton: Path) -> Path:
    return without_checksums(beton)


def test_images_come_back(beton: Path, plain: Path) -> None:
    source, bare = BetonSource(beton), BetonSource(plain)
    assert len(source) == len(bare) == COUNT and source.file.notes["size"] == 16
    assert source.classes == ["cat", "dog", "eel"] and bare.classes == ["0", "1", "2"]
    assert source.labels.tolist() == bare.labels.tolist() == [number % 3 for number in range(COUNT)]
    assert source.describe(4) == f"{beton}:4"
    for number in range(COUNT):
        original = picture(number, 20 + number % 4)
        assert (source.widths[number], source.heights[number]) == original.size
        assert source.read(number) == bare.read(number)
        if number % 2 == 0:
            assert np.array_equal(decoded(source, number), np.asarray(original))
        else:
            assert source.read(number) == encode_image(original, "jpg").data
    assert not list(beton.parent.glob("*.partial*"))


def test_ffcv_reads_what_we_write(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    path = tmp_path / "images.beton"
    with BetonWriter(path, max_samples=20, page_size=MIN_PAGE_SIZE) as writer:
        for number in range(7):
            writer.append(encode_image(picture(number), "raw"), 100 + number)
        writer.finish()
    num_threads = torch.get_num_threads()
    loader = Loader(str(path), batch_size=4, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False)
    batches = [[part.clone() for part in batch] for batch in loader]
    torch.set_num_threads(num_threads)
    del loader
    gc.collect()  # a second Loader changes one of numba's types, and with it what the first would free
    images, labels, checksums = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(images, torch.stack([torch.tensor(np.asarray(picture(number))) for number in range(7)]))
    assert labels.flatten().tolist() == [100 + number for number in range(7)]
    assert checksums.flatten().tolist() == BetonFile(path).rows["crc32"].tolist()
    reader, ours = Reader(str(path)), BetonFile(path)
    assert reader.field_names == [field.name for field in ours.fields] == ["image", "label", "crc32"]
    assert reader.metadata.tobytes() == ours.rows.tobytes()


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion", "smart"])
def test_we_read_what_ffcv_writes(tmp_path: Path, mode: str) -> None:
    pytest.importorskip("ffcv")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    class Pictures:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.asarray(picture(index, 20 + index)), index % 5

    path = tmp_path / "images.beton"
    field = RGBImageField(write_mode=mode, smart_threshold=20 * 16 * 3 + 100, jpeg_quality=95)
    DatasetWriter(str(path), {"image": field, "label": IntField()}, MIN_PAGE_SIZE, num_workers=2).from_indexed_dataset(
        Pictures(), chunksize=3
    )
    source = BetonSource(path)
    assert len(source) == 8 and source.labels.tolist() == [index % 5 for index in range(8)]
    expected = {"raw": [0] * 8, "jpg": [1] * 8, "smart": [0] * 3 + [1] * 5}.get(mode, source.is_jpeg.tolist())
    assert source.is_jpeg.tolist() == expected
    for index in range(8):
        difference = np.abs(decoded(source, index).astype(int) - np.asarray(picture(index, 20 + index)))
        assert difference.max() == 0 if not source.is_jpeg[index] else difference.mean() < 20


def fill(writer: BetonWriter, stop: int) -> None:
    """Items 0 to stop: big pictures (eight to a page); item 5 is skipped."""
    for number in range(writer.done, stop):
        if number == 5:
            writer.skip("five.png", "no image")
        else:
            writer.append(encode_image(picture(number, 300, 280), "raw"), number)


@pytest.mark.parametrize("torn", [0, 1, 7, 200, "a line", "all but the first", "all", "lost byte"])
def test_a_killed_writer_is_resumed(tmp_path: Path, torn: Any) -> None:
    """A kill may leave only a part of what was written last."""
    whole, path = tmp_path / "whole.beton", tmp_path / "resumed.beton"
    options: Any = {"max_samples": 40, "page_size": MIN_PAGE_SIZE, "settings": {"size": 280}}
    with BetonWriter(whole, **options) as writer:
        fill(writer, 30)
        writer.finish({"size": 280})
    with BetonWriter(path, **options) as writer:
        fill(writer, 23)
    partial, journal = path.with_name("resumed.beton.partial"), path.with_name("resumed.beton.partial.journal")
    assert not path.exists() and partial.exists()
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3  # the settings, two pages
    if torn == "lost byte":  # the last of an image, before the page's filling
        last = 7 * 252_032 + 300 * 280 * 3
        os.truncate(partial, partial.stat().st_size - MIN_PAGE_SIZE + last - 1)
    elif isinstance(torn, int):
        os.truncate(journal, journal.stat().st_size - torn)
    else:
        journal.write_bytes(b"".join(lines[: {"a line": 2, "all but the first": 1, "all": 0}[torn]]))
    with BetonWriter(path, **options) as writer:
        assert writer.done == {0: 17, "all but the first": 0, "all": 0}.get(torn, 9)
        fill(writer, 30)
        writer.finish({"size": 280})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["resumed.beton", "whole.beton"]
    assert path.read_bytes() == whole.read_bytes() and BetonSource(path).labels.tolist() == [*range(5), *range(6, 30)]


def test_the_writer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with BetonWriter(tmp_path / "a.beton", max_samples=1, page_size=MIN_PAGE_SIZE) as writer:
        for image in (encode_image(picture(0, 1000, 1000), "raw"), EncodedImage("jpg", 2, 2, b"")):
            pytest.raises(ValueError, writer.append, image, 0).match("do not fit a page")
        pytest.raises(RunError, writer.finish).match("no samples")
        writer.append(encode_image(picture(0), "raw"), 0)
        pytest.raises(ValueError, writer.append, encode_image(picture(0), "raw"), 0).match("max_samples")


def test_every_changed_byte_of_the_tables_and_every_cut_is_found(beton: Path, tmp_path: Path) -> None:
    data = bytearray(beton.read_bytes())
    table = int(np.frombuffer(data, HEADER, 1)["allocations"][0])
    rows_end = FRONT + COUNT * row_type(OUR_FIELDS).itemsize
    notes = int(np.frombuffer(data, FOOTER, 1, table - FOOTER.itemsize)["size"][0])
    arguments = {
        start + at for start in range(HEADER.itemsize, FRONT, FIELD.itemsize) for at in range(60, FIELD.itemsize)
    }
    spots = [
        *(spot for spot in range(rows_end) if spot not in arguments),
        *range(table - FOOTER.itemsize - notes, len(data)),
    ]
    spots = [spot for spot in spots if not table - 4 <= spot < table]  # the footer's unused bytes
    path = tmp_path / "changed.beton"
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for number, spot in enumerate(spots):
            file.seek(spot)
            file.write(bytes([data[spot] ^ (1 << number % 8)]))
            pytest.raises(RunError, BetonSource, path).match(r"changed\.beton is damaged")
            file.seek(spot)
            file.write(data[spot : spot + 1])
        BetonSource(path)
        for end in (
            *range(0, rows_end, 97),
            *range(MIN_PAGE_SIZE, MIN_PAGE_SIZE + 2000, 97),
            len(data) - 24,
            len(data) - 1,
        ):
            file.seek(0)
            file.write(data)
            file.truncate(end)
            pytest.raises(RunError, BetonSource, path).match(r"changed\.beton is damaged")


def test_every_changed_byte_of_a_payload_is_found(beton: Path, tmp_path: Path) -> None:
    path = shutil.copy(beton, tmp_path / "changed.beton")
    source = BetonSource(path)
    with open(path, "r+b", buffering=0) as file:
        for index in range(COUNT):
            begin, size = int(source.ptrs[index]), int(source.sizes[index])
            for spot in range(begin, begin + size, 37):
                byte = os.pread(file.fileno(), 1, spot)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), spot)
                with pytest.raises(RunError, match=rf"sample {index} of .*changed\.beton fails its checksum"):
                    source.read(index)
                os.pwrite(file.fileno(), byte, spot)
            source.read(index)


def set_header(name: str, value: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        np.frombuffer(data, HEADER, 1)[name][0] = value

    return change


def set_field(name: str, value: Any, number: int = 0) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        np.frombuffer(data, FIELD, 2, HEADER.itemsize)[name][number] = value

    return change


def set_row(column: str, part: str | None, value: Callable[[int], int], index: int = 4) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        rows = np.frombuffer(data, row_type(OUR_FIELDS[:2]), COUNT, HEADER.itemsize + 2 * FIELD.itemsize)[column]
        rows = rows if part is None else rows[part]
        rows[index] = value(int(rows[index]))

    return change


def set_entry(part: str, value: Callable[[int], int], index: int = 4) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        start = int(np.frombuffer(data, HEADER, 1)["allocations"][0])
        entries = np.frombuffer(data, ALLOCATION, COUNT, start)[part]
        entries[index] = value(int(entries[index]))

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_header("version", 3), "version is 3"),
        (set_header("num_fields", 0), "0 fields"),
        (set_header("num_fields", 3), "its fields are"),
        (set_header("page_size", 0), "page size is 0"),
        (set_header("page_size", 3 << 20), "page size"),
        (set_header("num_samples", 0), "0 samples"),
        (set_header("num_samples", 1 << 62), "claims 4611686018427387904"),
        (set_header("num_samples", COUNT - 1), "payloads"),
        (set_header("num_samples", COUNT + 1), "not in its table"),
        (set_header("allocations", 0), "byte 0"),
        (set_header("allocations", (1 << 64) - 8), "byte 18446744073709551608"),
        (set_field("kind", 255), "of types .255"),
        (set_field("kind", 7), "of types .7"),
        (set_field("kind", 4), "not in its table"),
        (set_field("name", b""), "its fields are"),
        (set_field("name", b"image", 1), "its fields are"),
        (set_row("image", "mode", lambda _: 7), "of mode 7"),
        (set_row("image", "mode", lambda _: 1, 5), "pixels in"),
        (set_row("image", "width", lambda width: width + 1), "pixels in"),
        (set_row("image", "height", lambda _: 0, 5), "x 0 pixels"),
        (set_row("image", "ptr", lambda ptr: ptr + 1), "image of sample 4"),
        (set_row("image", "ptr", lambda _: (1 << 64) - 1), "image of sample 4"),
        (set_row("label", None, lambda _: -1), "labels go from -1"),
        (set_row("label", None, lambda _: 1 << 60), "labels go"),
        (set_entry("sample", lambda _: 3), "not in its table"),
        (set_entry("ptr", lambda ptr: ptr - 64), "overlap"),
        (set_entry("ptr", lambda _: 8), "outside"),
        (set_entry("ptr", lambda _: (1 << 64) - 1), "outside"),
        (set_entry("size", lambda size: size + 1000), "overlap"),
        (set_entry("size", lambda size: size - 1), "pixels in"),
        (set_entry("size", lambda _: 0), "outside"),
        (set_entry("size", lambda _: (1 << 64) - 1), "outside"),
        (set_entry("size", lambda _: 1 << 30, COUNT - 1), "outside"),
    ],
)
def test_damaged_tables_without_checksums(
    plain: Path, tmp_path: Path, change: Callable[[bytearray], None], problem: str
) -> None:
    data = bytearray(plain.read_bytes())
    change(data)
    path = tmp_path / "changed.beton"
    path.write_bytes(data)
    pytest.raises(RunError, BetonSource, path).match(rf"changed\.beton is damaged.*{problem}")


def test_a_payload_across_pages_is_refused(plain: Path, tmp_path: Path) -> None:
    data = bytearray(plain.read_bytes())
    table = int(np.frombuffer(data, HEADER, 1)["allocations"][0])
    entries = np.frombuffer(data, ALLOCATION, COUNT, table).copy()
    shift = 2 * MIN_PAGE_SIZE - int(entries["ptr"][-1]) - 5  # the last payload begins five bytes before a page's end
    entries["ptr"][-1] += shift
    set_row("image", "ptr", lambda ptr: ptr + shift, COUNT - 1)(data)
    set_header("allocations", 3 * MIN_PAGE_SIZE)(data)
    path = tmp_path / "changed.beton"
    path.write_bytes(data[:table] + bytes(3 * MIN_PAGE_SIZE - table) + entries.tobytes())
    pytest.raises(RunError, BetonSource, path).match("crosses the end of a page")


def test_a_jpeg_of_another_size_than_the_table_says_is_refused(plain: Path, tmp_path: Path) -> None:
    data = bytearray(plain.read_bytes())
    set_row("image", "width", lambda width: width + 30, 5)(data)
    ptr = int(BetonSource(plain).ptrs[7])
    data[ptr : ptr + 2] = b"no"
    path = tmp_path / "changed.beton"
    path.write_bytes(data)
    source = BetonSource(path)
    with pytest.raises(RunError, match=r"changed\.beton:5: the table says 51 x 16 pixels, but its JPEG has 21 x 16"):
        source.read(5)
    pytest.raises(RunError, source.read, 7).match(r"changed\.beton:7: .* it is no JPEG")
    assert source.read(3) == BetonSource(plain).read(3)


def test_jpeg_size_of_short_and_odd_data() -> None:
    good = bytes(encode_image(picture(0), "jpg").data)
    assert jpeg_size(good) == (20, 16)
    sizes = {jpeg_size(good[:end]) for end in range(len(good))}
    assert sizes == {None, (20, 16)}
    buffer = io.BytesIO()
    picture(0).convert("CMYK").save(buffer, "JPEG")
    assert jpeg_size(buffer.getvalue()) is None  # four components: FFCV would read them as RGB
    assert jpeg_size(b"\xff\xd8" + b"\xff" * 50) is None and jpeg_size(b"\xff\xd8\xff\xe0\0\0" * 9) is None


def test_a_file_without_an_image_and_a_missing_one(tmp_path: Path) -> None:
    names = (Field("label", "int"), Field("other", "int"))
    fields, rows, header = np.zeros(2, FIELD), np.zeros(3, row_type(names)), np.zeros(1, HEADER)
    fields["kind"], fields["name"] = KINDS.index("int"), [b"label", b"other"]
    front = HEADER.itemsize + fields.nbytes + rows.nbytes
    header[0] = (VERSION, 2, MIN_PAGE_SIZE, len(rows), front)
    (tmp_path / "numbers.beton").write_bytes(header.tobytes() + fields.tobytes() + rows.tobytes())
    with pytest.raises(UsageError, match=r"numbers\.beton has the fields label, other, and none"):
        BetonSource(tmp_path / "numbers.beton")
    pytest.raises(UsageError, BetonSource, tmp_path / "missing.beton").match("cannot be read")


def test_a_file_cut_while_it_is_open(beton: Path, tmp_path: Path) -> None:
    path = shutil.copy(beton, tmp_path / "images.beton")
    source = BetonSource(path)
    os.truncate(path, MIN_PAGE_SIZE + 100)
    pytest.raises(RunError, source.read, COUNT - 1).match("cut short while it was in use")
    pytest.raises(RunError, source.file.check_size).match("cut short while it was in use")

"""vadit prepare: pixels, order, bad images, going on after a kill, what is refused, a full disk, and the command."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import SIDES, bad_files, encode, jpeg, odd_files, photo, psnr, turned, write_folder
from launched import LIMIT_S, room_for
from PIL import Image
from tar_files import write_tar

from vadit import cli
from vadit.config import ImageDataSpec
from vadit.images import prepare as preparing
from vadit.images.loader import ImageSet, ImageSource
from vadit.images.pillow import decode
from vadit.images.prepare import PrepareSummary, prepare_images
from vadit.images.sources.beton import BetonSource
from vadit.images.sources.beton_writer import BetonWriter, encode_image
from vadit.images.sources.folders import FolderSource
from vadit.images.transforms import to_rgb
from vadit.runtime.console import ProgressBar
from vadit.runtime.errors import RunError, UsageError

SIZE = 32
SHAPES = ((90, 70), (64, 200), (33, 32), (20, 30), (300, 260))


def fill(root: Path, count: int, kind: str = "png") -> Path:
    """Photographs of several shapes in three classes, one of them named later than the others in the alphabet."""
    for number in range(count):
        path = root / ("owl", "ant", "zebra")[number % 3] / f"{number:03d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = SHAPES[number % len(SHAPES)]
        photo(number, width, height).save(path)
    return root


def prepare(source: Path, out: Path, **settings: Any) -> PrepareSummary:
    spec_names = ("labels_file", "on_error", "max_bad_share", "alpha", "exif")
    spec = {name: settings.pop(name) for name in spec_names if name in settings}
    spec.setdefault("on_error", "skip")
    defaults = {"size": SIZE, "num_workers": 1}
    return prepare_images(ImageDataSpec(path=str(source), **spec), out, **(defaults | settings))


def content(out: Path) -> dict[str, bytes]:
    """Every file that is part of the result."""
    return {path.name: path.read_bytes() for path in [out, *out.parent.glob(f"{out.name}.*")]}


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


def test_crops_of_what_is_prepared_are_those_of_the_source(folder: Path, tmp_path: Path) -> None:
    source = FolderSource(folder)
    summary = prepare(folder, tmp_path / "a.beton")
    made = BetonSource(tmp_path / "a.beton")
    assert summary.num_images == summary.num_new == len(made) == 23 and summary.bad == {}
    assert made.labels.tolist() == source.labels.tolist() and made.classes == source.classes == ["ant", "owl", "zebra"]
    for index in range(23):
        height, width = pixels(made.read(index)).shape[:2]
        with Image.open(source.paths[index]) as image:
            assert min(height, width) == SIZE and abs(width / height - image.width / image.height) < 0.05
    for crop in ("center", "random"):
        expected, found = squares(source, crop), squares(made, crop)
        assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


def test_jpegs_are_near_and_quality_counts(folder: Path, tmp_path: Path) -> None:
    exact = np.stack(squares(FolderSource(folder), "center")).astype(float)
    errors = []
    for quality in (95, 30):
        out = tmp_path / f"{quality}.beton"
        prepare(folder, out, encode="jpeg", quality=quality, verify=False)
        made = BetonSource(out)
        with Image.open(io.BytesIO(made.read(0))) as image:
            assert image.format == "JPEG" and image.layer[1][1:3] == (1, 1)  # type: ignore[attr-defined]
        errors.append(np.sqrt(((np.stack(squares(made, "center")) - exact) ** 2).mean()))
    assert errors[0] < 3 < errors[1]


def test_size_0_keeps_pixels_and_jpegs_as_they_are(tmp_path: Path) -> None:
    files = {file.name: file.data for file in odd_files().values()} | {"photo.jpg": jpeg(1)}
    for name, data in files.items():
        path = tmp_path / "src" / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    source = FolderSource(tmp_path / "src")
    assert prepare(tmp_path / "src", tmp_path / "jpeg.beton", size=0, encode="jpeg").bad == {}
    prepare(tmp_path / "src", tmp_path / "raw.beton", size=0)
    one, other = BetonSource(tmp_path / "jpeg.beton"), BetonSource(tmp_path / "raw.beton")
    assert one.is_jpeg.all() and not other.is_jpeg.any()
    for index, path in enumerate(source.paths):
        with Image.open(path) as image:
            if image.format == "JPEG" and image.mode == "RGB":
                assert one.read(index) == source.read(index)
            assert np.array_equal(pixels(other.read(index)), np.asarray(to_rgb(image)))


def test_alpha_and_exif_are_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upright = np.array(photo(1, 60, 40))
    clear = Image.new("RGBA", (60, 40), (10, 20, 30, 0))
    source = tmp_path / "src"
    files = {f"{value}.jpg": turned(upright, value) for value in SIDES}
    write_folder(source, files | {"9.png": encode(clear, "PNG")})
    prepare(source, out := tmp_path / "a.beton", size=0, encode="jpeg", exif="apply", alpha="white")
    made = BetonSource(out)
    assert made.widths.tolist() == [60] * 9 and pixels(made.read(8)).min() == 255
    assert all(psnr(pixels(made.read(index)), upright) > 24 for index in range(8))
    assert made.read(0) == (source / "1.jpg").read_bytes()  # nothing to turn: no second loss
    prepare(source, tmp_path / "b.beton", size=0, encode="jpeg")
    assert BetonSource(tmp_path / "b.beton").read(5) == (source / "6.jpg").read_bytes()
    with pytest.raises(UsageError, match="made with alpha 'white', this command says 'drop'"):
        prepare(source, out, size=0, encode="jpeg", exif="apply")
    # a file from before there was a choice is of the default
    of = preparing._settings
    monkeypatch.setattr(preparing, "_settings", lambda *args: dict([*of(*args).items()][:-2]))
    prepare(source, tmp_path / "old.beton")
    monkeypatch.undo()
    assert prepare(source, tmp_path / "old.beton").num_new == 0
    with pytest.raises(UsageError, match="made with exif 'ignore', this command says 'apply'"):
        prepare(source, tmp_path / "old.beton", exif="apply")


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
    prepare(tmp_path / "a.beton", tmp_path / "b.beton")
    members = [(f"{number}.{kind}", data) for number in range(3) for kind, data in
               (("ppm", beton.read(number)), ("cls", b"%d" % beton.labels[number]))]  # fmt: skip
    prepare(write_tar(tmp_path / "shards" / "a.tar", members).parent, tmp_path / "c.beton")
    for name, classes in (("b", ["cat", "dog"]), ("c", ["0", "1"])):
        again = BetonSource(tmp_path / f"{name}.beton")
        assert [again.read(index) for index in range(3)] == [beton.read(index) for index in range(3)]
        assert again.classes == classes and again.labels.tolist() == [0, 1, 0]


def test_bytes_do_not_depend_on_the_number_of_processes(folder: Path, tmp_path: Path, monkeypatch) -> None:
    seen: list[int] = []
    prepare(folder, tmp_path / "one" / "a.beton")
    monkeypatch.setattr(ProgressBar, "update", lambda bar, done: seen.append(done))
    prepare(folder, tmp_path / "two" / "a.beton", num_workers=2)
    assert content(tmp_path / "one" / "a.beton") == content(tmp_path / "two" / "a.beton")
    assert seen == [8, 16, 23, 23]  # the last one when all is verified


KILLED = """
import os, signal, sys
from vadit.config import ImageDataSpec
from vadit.images.prepare import ProgressBar, prepare_images
def update(bar, done):
    if done >= 64:
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    ProgressBar.update = update
    spec = ImageDataSpec(path=sys.argv[1], on_error="skip", max_bad_share=0.1)
    prepare_images(spec, sys.argv[2], size=192, num_workers=int(sys.argv[3]))
"""


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_run_goes_on_to_the_same_bytes(num_workers: int, tmp_path: Path, monkeypatch) -> None:
    source, out = fill(tmp_path / "src", 90), tmp_path / "a.beton"
    (source / "ant" / "010.png").write_bytes(b"no image")
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(source), str(out), str(num_workers)]
    # waits for the ends of all that hold its output: no process survives its parent
    done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    settings: dict[str, Any] = {"size": 192, "max_bad_share": 0.1}
    seen: list[int] = []
    monkeypatch.setattr(ProgressBar, "update", lambda bar, done: seen.append(done))
    summary = prepare(source, out, **settings)
    assert 0 < summary.num_new < 60 and summary.num_images == 89 and seen[0] > 30
    assert [Path(place).name for place in summary.bad] == ["010.png"]
    prepare(source, tmp_path / "straight" / "a.beton", **settings)
    assert content(out) == content(tmp_path / "straight" / "a.beton")


def test_a_second_call_changes_nothing_and_verifies(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.beton"
    prepare(folder, out)
    before = content(out)
    summary = prepare(folder, out)
    assert content(out) == before and (summary.num_new, summary.num_images) == (0, 23)
    data = bytearray(out.read_bytes())
    data[data.index(BetonSource(out).read(1)[-50:])] ^= 1
    out.write_bytes(data)
    pytest.raises(RunError, prepare, folder, out).match("fails its checksum")
    prepare(folder, out, verify=False)
    out.unlink()
    assert prepare(folder, out).num_new == 23
    assert content(out) == before


def test_what_was_written_is_looked_through(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Verification finds what a bug of the writer would do."""
    original = BetonWriter.append
    half = encode_image(photo(0, 40, 32), "jpg")
    for number, (stored, message) in enumerate(
        [
            (half._replace(data=half.data[:400]), "does not decode"),
            (encode_image(photo(0, 50, 40), "raw"), "has 50 x 40 pixels, not 32"),
        ]
    ):
        monkeypatch.setattr(BetonWriter, "append", lambda self, _, label, new=stored: original(self, new, label))
        pytest.raises(RunError, prepare, folder, tmp_path / f"{number}.beton").match(message)


def test_bad_images_are_listed_and_left_out(tmp_path: Path) -> None:
    source = fill(tmp_path / "src", 23)
    for file, (_, data) in enumerate(bad_files().values()):
        (source / "owl" / f"bad-{file}.jpg").write_bytes(data)
    os.symlink("nowhere", source / "owl" / "link.jpg")
    bad = len(bad_files()) + 1
    with pytest.raises(
        RunError, match=rf"{bad} of {bad + 23} images are bad, more than max_bad_share 0.01 allows; see"
    ):
        prepare(source, tmp_path / "a.beton")
    summary = prepare(source, tmp_path / "a.beton", max_bad_share=0.9)
    assert summary.num_images == 23 and len(summary.bad) == bad
    assert summary.num_new == 23  # what did not fill a page is made again
    assert summary.bad_file is not None
    lines = [line.split("\t") for line in summary.bad_file.read_text().splitlines()]
    assert [line[0] for line in lines] == sorted(line[0] for line in lines) and len(lines) == bad
    assert all(Path(path).parent.name == "owl" and why for path, why in lines)
    assert BetonSource(tmp_path / "a.beton").labels.tolist() == [0] * 8 + [1] * 8 + [2] * 7
    pytest.raises(RunError, prepare, source, tmp_path / "b.beton", on_error="raise").match(r"owl/bad-.*--on-error skip")
    pytest.raises(RunError, prepare, source, tmp_path / "a.beton", on_error="raise").match(r"owl/bad-.*--on-error skip")


def test_what_a_shard_of_the_source_lacks_is_listed_too(tmp_path: Path) -> None:
    members = [("0.jpg", jpeg(0)), ("0.cls", b"0"), ("1.jpg", jpeg(1))]
    write_tar(tmp_path / "src" / "a.tar", members)
    summary = prepare(tmp_path / "src", tmp_path / "a.beton", max_bad_share=1.0)
    assert summary.num_images == 1 and list(summary.bad) == [f"{tmp_path}/src/a.tar:1.jpg"]
    with pytest.raises(RunError, match="there is no label"):
        prepare(tmp_path / "src", tmp_path / "b.beton", on_error="raise")


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_in_the_same_place_are_refused(finished: bool, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.beton"
    if finished:
        prepare(folder, out)
    else:
        with pytest.raises(RunError, match="cannot be written"), room_for(9_000_000):
            prepare(folder, out)
    more = fill(tmp_path / "more", 24)
    for source, settings, message in (
        (folder, {"size": 16}, "size 32, this command says 16"),
        (folder, {"encode": "jpeg"}, "encode 'raw', this command says 'jpeg'"),
        (more, {}, "source '23 images, .*', this command says '24 images"),
    ):
        with pytest.raises(UsageError, match=rf"a.beton.* holds images made with (settings\.)?{message}"):
            prepare(source, out, **settings)
    assert prepare(folder, out).num_images == 23
    # a source may move
    shutil.copytree(folder, tmp_path / "moved")
    assert prepare(tmp_path / "moved", out).num_new == 0


def test_shards_of_a_pattern_may_move(tmp_path: Path, monkeypatch) -> None:
    for number in range(2):
        data = jpeg(number)
        for place in ("one", "two"):
            write_tar(tmp_path / place / f"x-{number:03d}.tar", [(f"{number}.jpg", data), (f"{number}.cls", b"0")])
    pattern = "x-{000..001}.tar"
    assert prepare(tmp_path / "one" / pattern, tmp_path / "a.beton").num_new == 2
    assert prepare(tmp_path / "two" / pattern, tmp_path / "a.beton").num_new == 0
    monkeypatch.chdir(tmp_path / "two")
    assert prepare(Path(pattern), tmp_path / "a.beton").num_new == 0


def test_requests_that_cannot_be_met(folder: Path, tmp_path: Path) -> None:
    pytest.raises(UsageError, prepare, folder, tmp_path / "a").match("must end in .beton")
    assert list(tmp_path.iterdir()) == []
    with BetonWriter(tmp_path / "foreign.beton", max_samples=1) as writer:
        writer.append(encode_image(photo(0), "raw"), 0)
        writer.finish()
    pytest.raises(UsageError, prepare, folder, tmp_path / "foreign.beton").match("not from vadit prepare")


def test_two_at_a_time_are_refused(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def update(bar: ProgressBar, done: int) -> None:
        pytest.raises(UsageError, prepare, folder, tmp_path / "a.beton").match("in use by this process itself")

    monkeypatch.setattr(ProgressBar, "update", update)
    assert prepare(folder, tmp_path / "a.beton", verify=False).num_new == 23


@pytest.mark.parametrize("num_bytes", [9_000_000, 8_000])
def test_a_full_disk_is_reported_and_the_same_command_goes_on(num_bytes: int, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written \(.*\); make room .*it goes on where it was"):
        with room_for(num_bytes):
            prepare(folder, tmp_path / "a.beton", size=256)
    assert not (tmp_path / "a.beton").exists() and not list(tmp_path.glob("*.json"))
    prepare(folder, tmp_path / "a.beton", size=256)
    prepare(folder, tmp_path / "straight" / "a.beton", size=256)
    assert content(tmp_path / "a.beton") == content(tmp_path / "straight" / "a.beton")


def test_a_worker_that_dies_is_reported(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("vadit.images.prepare.encode_part", lambda *_: os._exit(1))
    with pytest.raises(RunError, match=r"a process of vadit prepare was killed.*lower --num-workers"):
        prepare(folder, tmp_path / "a.beton", num_workers=2)
    monkeypatch.undo()
    assert prepare(folder, tmp_path / "a.beton").num_images == 23


def test_the_command(folder: Path, tmp_path: Path, capsys) -> None:
    source = fill(tmp_path / "src", 24)
    for name in "hijk":
        (source / "owl" / f"000-{name}.png").write_bytes(b"")
    arguments = ["prepare", str(source), str(tmp_path / "a.beton"), "--size", "32", "--num-workers", "1"]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 4 of 28 images are bad, more than max_bad_share 0.01 allows; see ")
    (source / "owl" / "000-k.png").unlink()  # three are never too many
    assert cli.main([*arguments[:2], str(tmp_path / "b.beton"), *arguments[3:]]) == 0
    out = capsys.readouterr().out
    assert f"left out: {source}/owl/000-h.png: " in out and "3 bad images are left out" in out
    assert "3 classes (0 ant: 8 images, 1 owl: 8, 2 zebra: 8)" in out
    assert "24 images" in out and "24 made now" in out and "all decoded again" in out
    assert json.loads((tmp_path / "b.beton.classes.json").read_text()) == ["ant", "owl", "zebra"]
    assert cli.main([*arguments[:2], str(tmp_path / "c.beton"), "--on-error", "raise"]) == 1
    assert "owl/000-h.png" in capsys.readouterr().err
    assert cli.main([*arguments[:2], str(tmp_path / "b.beton"), *arguments[3:], "--encode", "jpeg"]) == 2
    assert "made with encode 'raw', this command says 'jpeg'" in capsys.readouterr().err
    assert cli.main(arguments[:2]) == 2

"""Odd and damaged image files with every loader: shown right, or refused with their name, and the rest in order."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tarfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import EXACT, bad_files, bad_places, jpeg, odd_files, psnr, write_folder
from PIL import Image

from vadit.config import ImageDataSpec
from vadit.images.backends import open_images, open_loader
from vadit.images.folders import FolderSource
from vadit.images.loader import Decoder, ImageBatch, ImageLoader, ImageSet, ImageSource, Request, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.prepare import PrepareSummary, prepare_images
from vadit.images.transforms import center_crop, to_rgb
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError

SIZE = 32
DECODERS = ("torch", "dali")
LOADERS = (*DECODERS, "webdataset")
DALI_PSNR = 35
"""What DALI's pixels are held to, in dB against Pillow's."""

ODD = odd_files()
BAD = bad_files()
PLACES = bad_places(Path("/nowhere"))
GOOD = {f"good-{number:02d}.jpg": jpeg(number) for number in range(8)}


def write(root: Path, files: dict[str, bytes], places: list[str] = ()) -> Path:  # type: ignore[assignment]
    """A flat folder of files, and of names that cannot be read."""
    root.mkdir(parents=True)
    write_folder(root, files)
    for kind in places:
        name, make = bad_places(root.parent)[kind]
        make(root / name)
    return root


def pack(folder: Path, shard: Path) -> Path:
    """A .tar of the folder's files, as `tar` makes it: without checksums."""
    with tarfile.open(shard, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return shard


def open_set(loader: str, folder: Path, **settings: object) -> ImageSet:
    """The images of a flat folder as the loader gets them."""
    source: ImageSource = FolderSource(folder)
    if loader == "webdataset":
        from vadit.images.tar import TarSource

        shard = folder.with_name(folder.name + ".tar")
        source = TarSource(str(shard if shard.exists() else pack(folder, shard)))
    return ImageSet(source, SIZE, **settings)  # type: ignore[arg-type]


def decoder_of(loader: str, images: ImageSet) -> Decoder:
    """What decodes for the loader; skips where its package is missing."""
    if loader != "dali":
        return pillow_decoder(images, 2)
    pytest.importorskip("nvidia.dali")
    from vadit.images.dali import dali_decoder

    return dali_decoder(images, 2, "cpu")


def stem(images: ImageSet, index: int) -> str:
    """File name without its ending, from wherever the image is."""
    return Path(images.source.describe(index).rpartition(":")[2]).name.split(".")[0]


@dataclass
class Seen:
    """What one decoder made of everything, odd, bad and good, in one batch."""

    loader: str
    images: ImageSet
    pixels: dict[str, np.ndarray]
    failures: dict[str, RunError]


@pytest.fixture(scope="module", params=LOADERS)
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    files = GOOD | {odd.name: odd.data for odd in ODD.values()} | dict(BAD.values())
    places = [] if request.param == "webdataset" else list(PLACES)
    root = write(tmp_path_factory.mktemp("everything") / "images", files, places)
    images = open_set(request.param, root)
    with decoder_of(request.param, images)() as decoder:
        decoded = decoder.submit([Request(index) for index in range(len(images))])()
    names = {index: stem(images, index) for index in range(len(images))}
    shown = {names[index]: pixels.cpu().numpy() for index, pixels in enumerate(decoded.pixels)}
    failures = {names[index]: error for index, error in decoded.failures.items()}
    return Seen(request.param, images, {name: shown[name] for name in shown.keys() - failures.keys()}, failures)


def check_pixels(seen: Seen, name: str, shown: np.ndarray, min_psnr: float) -> None:
    expected = np.asarray(center_crop(Image.fromarray(shown), SIZE))
    found = seen.pixels[name.split(".")[0]]
    assert found.shape == (SIZE, SIZE, 3) and found.dtype == np.uint8
    assert psnr(found, expected) >= (min(min_psnr, DALI_PSNR) if seen.loader == "dali" else min_psnr)


@pytest.mark.parametrize("kind", ODD)
def test_odd_files_show_what_is_in_them(seen: Seen, kind: str) -> None:
    check_pixels(seen, ODD[kind].name, ODD[kind].pixels, ODD[kind].min_psnr)


def test_good_files_beside_bad_ones_keep_their_pixels(seen: Seen) -> None:
    for name, data in GOOD.items():
        with Image.open(io.BytesIO(data)) as image:
            shown = np.array(image)
        check_pixels(seen, name, shown, EXACT)


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused_with_their_names(seen: Seen, kind: str) -> None:
    check_refusal(seen, BAD[kind][0])


def test_what_cannot_be_read_is_refused_with_its_name(seen: Seen) -> None:
    for name, _ in PLACES.values():
        if seen.loader != "webdataset":  # a .tar holds bytes, not places
            check_refusal(seen, name)


def check_refusal(seen: Seen, name: str) -> None:
    error = seen.failures[name.split(".")[0]]
    assert isinstance(error, RunError)
    assert name in str(error) and "skip" in str(error), str(error)


def test_nothing_else_is_refused(seen: Seen) -> None:
    bad = {name.split(".")[0] for name, *_ in [*BAD.values(), *PLACES.values()]}
    assert set(seen.failures) <= bad
    assert len(seen.pixels) + len(seen.failures) == len(seen.images)


# ------------------------------------------------------------------------------------------------ raise and skip

SOME_BAD = ("jpeg cut in the middle", "text", "huge jpeg", "png of damaged data")


@pytest.mark.parametrize("kind", SOME_BAD)
@pytest.mark.parametrize("loader", LOADERS)
def test_raise_ends_with_the_name(tmp_path: Path, loader: str, kind: str) -> None:
    name, data = BAD[kind]
    images = open_set(loader, write(tmp_path / "images", GOOD | {name: data}))
    with pytest.raises(RunError, match=name):
        list(ImageLoader(images, 4, decoder=decoder_of(loader, images)))
    with decoder_of(loader, images)() as decoder, pytest.raises(RunError, match=name):
        list(load_in_order(images, range(len(images)), 4, decoder))


def expected_order(images: ImageSet, seed: int, epoch: int) -> list[int]:
    """The epoch's order; the place of a bad image goes to the next good one."""
    n = len(images)
    order = rng.permute(torch.arange(n), n, rng.fold(seed, "order", epoch)).tolist()
    bad = {index for index in range(n) if not stem(images, index).startswith("good")}
    return [next(index for index in (order + order)[place:] if index not in bad) for place in range(n)]


def ids_of(batches: list[ImageBatch]) -> list[int]:
    return [index for batch in batches for index in batch.ids.tolist()]


@pytest.mark.parametrize("loader", LOADERS)
def test_skip_keeps_the_order_of_the_rest(tmp_path: Path, loader: str, caplog: pytest.LogCaptureFixture) -> None:
    places = [] if loader == "webdataset" else list(PLACES)
    root = write(tmp_path / "images", GOOD | dict(BAD.values()), places)
    settings: dict = {"on_error": "skip", "max_bad_share": 0.75}
    images = open_set(loader, root, **settings)
    plain = open_set("torch", root, **settings)
    with pillow_decoder(plain, 1)() as decoder:
        reference = {
            stem(plain, index): batch.images[place]
            for batch in load_in_order(plain, range(len(plain)), 4, decoder)
            for place, index in enumerate(batch.ids.tolist())
        }
    with caplog.at_level(logging.WARNING):
        batches = list(ImageLoader(images, 5, seed=3, decoder=decoder_of(loader, images)))
    order = ids_of(batches)
    assert order == expected_order(images, 3, 0)
    # with the others' pixels in nobody's place
    exact = EXACT if loader != "dali" else DALI_PSNR
    for batch in batches:
        for pixels, index in zip(batch.images, batch.ids.tolist(), strict=True):
            assert psnr(pixels.cpu().numpy(), reference[stem(images, index)].numpy()) >= exact
        assert torch.equal(batch.labels, images.labels[batch.ids])
    names = [name for name, *_ in [*BAD.values(), *(PLACES[kind] for kind in places)]]
    assert len(images.bad_files) == len(names)
    message = next(text for text in caplog.messages if "do not decode" in text)
    assert f"{len(names)} images do not decode" in message
    assert sum(name in message for name in names) == 10
    # The replacement is a function of the position: not of ranks, and not of what is known to be bad by now.
    fresh = open_set(loader, root, **settings)
    for known in (fresh, images):
        ranks = [ids_of(list(ImageLoader(known, 2, 3, rank, 2, decoder=decoder_of(loader, known)))) for rank in (0, 1)]
        assert [ranks[place % 2][place // 2] for place in range(len(order))] == order


@pytest.mark.parametrize("loader", LOADERS)
def test_skip_has_a_limit(tmp_path: Path, loader: str) -> None:
    files = GOOD | dict(BAD[kind] for kind in SOME_BAD)
    root = write(tmp_path / "images", files)
    images = open_set(loader, root, on_error="skip", max_bad_share=4 / 12)
    assert len(ids_of(list(ImageLoader(images, 4, decoder=decoder_of(loader, images))))) == 12
    images = open_set(loader, root, on_error="skip", max_bad_share=3 / 12)
    with pytest.raises(RunError, match=r"4 of 12 images .* more than data.max_bad_share .*cut-middle") as caught:
        list(ImageLoader(images, 4, decoder=decoder_of(loader, images)))
    assert all(BAD[kind][0] in str(caught.value) for kind in SOME_BAD)


@pytest.mark.parametrize("loader", DECODERS)
def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path, loader: str) -> None:
    root = write(tmp_path / "images", GOOD)
    images = open_set(loader, root, on_error="skip", max_bad_share=0.5)
    batches = iter(ImageLoader(images, 2, seed=1, decoder=decoder_of(loader, images)))
    seen = ids_of([next(batches)])
    last = expected_order(images, 1, 0)[-1]
    os.unlink(images.source.describe(last))
    seen += ids_of(list(batches))
    assert last not in seen and len(seen) == len(GOOD)
    assert list(images.bad_files) == [images.source.describe(last)]


# ------------------------------------------------------------------------------------------------ prepared data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrepareSummary, Path]:
    """All of the files through `vadit prepare`, kept as pixels."""
    files = GOOD | {odd.name: odd.data for odd in ODD.values()} | dict(BAD.values())
    base = tmp_path_factory.mktemp("prepared")
    root = write(base / "images", files, list(PLACES))
    spec = ImageDataSpec(path=str(root), on_error="skip", max_bad_share=0.75)
    return prepare_images(spec, base / "out.beton", size=SIZE, num_workers=1), base / "out.beton"


def prepared_rule() -> list[np.ndarray]:
    """Pixels of the good and odd files in the folder's order, by Pillow's rule from the files themselves."""
    data = GOOD | {odd.name: odd.data for odd in ODD.values()}
    found = []
    for name in sorted(data):
        with Image.open(io.BytesIO(data[name])) as image:
            found.append(np.asarray(center_crop(to_rgb(image), SIZE)))
    return found


def test_preparing_names_the_bad_files_and_keeps_the_others_pixels(prepared: tuple[PrepareSummary, Path]) -> None:
    summary, out = prepared
    names = [name for name, *_ in [*BAD.values(), *PLACES.values()]]
    assert sorted(Path(path).name for path in summary.bad) == sorted(names)
    assert summary.num_images == len(GOOD) + len(ODD)
    assert summary.bad_file is not None
    report = summary.bad_file.read_text()
    assert all(f"{path}" in report for path in summary.bad)
    images = open_images(ImageDataSpec(path=str(out)), SIZE)
    with pillow_decoder(images, 2)() as decoder:
        (batch,) = load_in_order(images, range(len(images)), len(images), decoder)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(prepared_rule()))


def test_ffcv_shows_what_was_prepared(prepared: tuple[PrepareSummary, Path]) -> None:
    _, out = prepared
    pytest.importorskip("ffcv")
    spec = ImageDataSpec(path=str(out), loader="ffcv", num_workers=2)
    images = open_images(spec, SIZE)
    loader, choice = open_loader(spec, images, 8, seed=5)
    assert choice.name == "ffcv"
    expected = prepared_rule()
    batches = list(loader)
    assert sorted(ids_of(batches)) == list(range(len(expected)))
    for batch in batches:
        for pixels, index in zip(batch.images.permute(0, 2, 3, 1), batch.ids.tolist(), strict=True):
            assert np.array_equal(pixels.numpy(), expected[index])


def test_preparing_stops_at_a_bad_file(tmp_path: Path) -> None:
    name, data = BAD["jpeg cut in the middle"]
    root = write(tmp_path / "images", GOOD | {name: data})
    with pytest.raises(RunError, match=name):
        prepare_images(ImageDataSpec(path=str(root)), tmp_path / "out.beton", size=SIZE, num_workers=1)
    few = ImageDataSpec(path=str(root), on_error="skip", max_bad_share=0.05)
    with pytest.raises(RunError, match=r"1 of 9 images are bad, more than max_bad_share 0.05"):
        prepare_images(few, tmp_path / "out.beton", size=SIZE, num_workers=1)
    assert not (tmp_path / "out.beton").exists()


# ------------------------------------------------------------------------------------------------ odd folders


def test_a_folder_named_like_an_image_is_no_image(tmp_path: Path) -> None:
    root = write(tmp_path / "images", GOOD)
    (root / "folder.jpg").mkdir()
    assert len(FolderSource(root)) == len(GOOD)
    (tmp_path / "labels.txt").write_text("folder.jpg 0\ngood-00.jpg 1\n")
    images = ImageSet(FolderSource(root, tmp_path / "labels.txt"), SIZE)
    with pillow_decoder(images, 1)() as decoder:
        failures = decoder.submit([Request(0), Request(1)])().failures
    assert list(failures) == [0] and "folder.jpg" in str(failures[0])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("good-00.jpg 99999999999999\n", r"holds the label 99999999999999; the highest is"),
        ("good-00.jpg\n", r"line 1: .* is not NAME LABEL"),
        ("good-00.jpg 0\ngood-00.jpg 1\n", r"names good-00.jpg twice"),
        ("\n\n", r"names no images"),
        (b"\xff\xfe\x00", r"cannot be read"),
    ],
)
def test_bad_labels_files_are_refused(tmp_path: Path, content: str | bytes, problem: str) -> None:
    root = write(tmp_path / "images", GOOD)
    file = tmp_path / "labels.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=rf"labels_file .*labels.txt.*{problem}"):
        FolderSource(root, file)


def test_a_pipe_does_not_hang_the_loader(tmp_path: Path) -> None:
    root = write(tmp_path / "images", GOOD)
    os.mkfifo(root / "pipe.jpg")
    source = FolderSource(root)
    pipe = source.paths.index(str(root / "pipe.jpg"))
    images = ImageSet(source, SIZE)
    failures: dict[int, RunError] = {}

    def read() -> None:
        with pillow_decoder(images, 1)() as decoder:
            failures.update(decoder.submit([Request(pipe)])().failures)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    with contextlib.suppress(OSError):  # lets a reader go that waits for a writer
        os.close(os.open(root / "pipe.jpg", os.O_WRONLY | os.O_NONBLOCK))
    assert "pipe.jpg" in str(failures[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "images", GOOD)
    root.chmod(0)
    with pytest.raises(UsageError, match=r"images cannot be read .*permission"):
        FolderSource(root)
    root.chmod(0o755)

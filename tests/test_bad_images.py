"""Odd and damaged image files with every loader: shown right, or refused with their name, and the rest in order."""

import builtins
import contextlib
import errno
import functools
import io
import logging
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
import torch
from image_files import EXACT, bad_files, bad_places, center_crop, ids_of, jpeg, odd_files, psnr, write_folder
from latent_files import moments_folder
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file
from tar_files import write_tar

from vadit.config import ImageDataSpec
from vadit.eval.image_files import PngFolder
from vadit.images.formats import open_image
from vadit.images.loader import Decoder, ImageLoader, ImageSet, Request, load_in_order
from vadit.images.pillow import pillow_decoder
from vadit.images.pixels import read_png
from vadit.images.prepare import prepare_images
from vadit.images.sources.beton import BetonSource
from vadit.images.sources.folders import FolderSource
from vadit.images.sources.tar import TarSource
from vadit.latents.companions import CachedFeatures
from vadit.latents.dataset import LatentDataset
from vadit.latents.shards import open_finished_folder, open_shard
from vadit.latents.statistics import load_statistics
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.reading import MAX_WHOLE, ReadFault

SIZE = 32
DECODERS = ("torch", "dali")
DALI_PSNR = 35  # What DALI's pixels are held to, in dB against Pillow's.

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


def image_set(folder: Path, **settings: Any) -> ImageSet:
    """The images of a flat folder."""
    return ImageSet(FolderSource(folder), SIZE, **settings)


def decoder_of(loader: str, images: ImageSet) -> Decoder:
    """What decodes for the loader; skips where its package is missing."""
    if loader != "dali":
        return pillow_decoder(images, 2)
    pytest.importorskip("nvidia.dali")
    from vadit.images.dali import DaliDecoder

    return lambda: DaliDecoder(images, 2, "cpu")


def name_of(images: ImageSet, index: int) -> str:
    return Path(images.source.describe(index)).name


@pytest.mark.parametrize("loader", DECODERS)
def test_what_files_show_and_what_is_refused_with_its_name(tmp_path: Path, loader: str) -> None:
    """Odd, bad and good files in one batch."""
    files = GOOD | {odd.name: odd.data for odd in ODD.values()} | dict(BAD.values())
    images = image_set(write(tmp_path / "images", files, list(PLACES)))
    with decoder_of(loader, images)() as decoder:
        decoded = decoder.submit([Request(index) for index in range(len(images))])()
    assert decoded.pixels.shape == (len(images), SIZE, SIZE, 3) and decoded.pixels.dtype == torch.uint8
    place = {name_of(images, index): index for index in range(len(images))}
    bad = [name for name, *_ in [*BAD.values(), *PLACES.values()]]
    assert decoded.failures.keys() == {place[name] for name in bad}
    for name in bad:
        error = decoded.failures[place[name]]
        assert isinstance(error, RunError) and name in str(error) and "skip" in str(error)
    shown = [(odd.name, odd.pixels, odd.min_psnr) for odd in ODD.values()]
    shown += [(name, image_files.decoded(data), EXACT) for name, data in GOOD.items()]
    for name, pixels, min_psnr in shown:
        expected = np.asarray(center_crop(Image.fromarray(pixels), SIZE))
        near = psnr(decoded.pixels[place[name]].numpy(), expected)
        assert near >= (min(min_psnr, DALI_PSNR) if loader == "dali" else min_psnr), name


def test_a_file_of_more_than_a_gibibyte_is_no_picture_and_fills_no_memory(tmp_path: Path) -> None:
    folder = write(tmp_path / "images", GOOD | {"x.png": b""})
    with (folder / "x.png").open("r+b") as file:
        file.truncate(MAX_WHOLE + 1)
    images = image_set(folder)
    pytest.raises(RunError, images.source.read, len(images) - 1).match(
        r"x\.png cannot be read \(more than 1 GiB\); replace"
    )
    pytest.raises(RunError, read_png, folder / "x.png").match("more than 1 GiB")


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"),
        ("EPS", b"\xc5\xd0\xd3\xc6" + bytes(60)),
        *(
            ("PDF", b"%PDF-1.7\n"),
            ("HTML, SVG or XML", b"<html>"),
            ("AVIF", b"\0\0\0\x18ftypavif"),
            ("ICO", b"\0\0\1\0"),
        ),
        *(("a damaged PNG", b"\x89PNG\r\n\x1a\n"), ("empty", b""), ("no known picture", b"version https://git-lfs")),
    ],
)
def test_what_is_no_picture_is_named_and_starts_no_program(
    tmp_path: Path, kind: str, start: bytes, monkeypatch
) -> None:
    started, gs = tmp_path / "started", tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {started}\n")
    gs.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(gs))
    images = image_set(write(tmp_path / "images", GOOD | {"x.jpg": start}))
    path = tmp_path / "images" / "x.jpg"
    with pillow_decoder(images, 1)() as decoder:
        failures = decoder.submit([Request(len(images) - 1)])().failures
    assert f"x.jpg does not decode (it is {kind}; needed: JPEG, PNG" in str(failures[0])
    pytest.raises(RunError, read_png, path).match(rf"x.jpg does not decode \(it is {kind}")
    assert not started.exists()
    if start.startswith(b"%!PS"):  # Pillow alone would
        with contextlib.suppress(OSError), Image.open(path) as image:
            image.load()
        assert started.exists()


def test_the_size_of_a_picture_is_limited_before_it_is_decoded() -> None:
    with pytest.raises(ValueError, match=r"120 x 90 pixels, more than the 10,799 allowed"):
        open_image(jpeg(0), max_pixels=10_799)
    assert open_image(jpeg(0), max_pixels=10_800).size == (120, 90)
    pytest.raises(ValueError, open_image, BAD["huge png"][1]).match(r"3600000000 pixels")


SOME_BAD = ("jpeg cut in the middle", "text", "huge jpeg", "png of damaged data")


@pytest.mark.parametrize("kind", SOME_BAD)
@pytest.mark.parametrize("loader", DECODERS)
def test_raise_ends_with_the_name(tmp_path: Path, loader: str, kind: str) -> None:
    name, data = BAD[kind]
    images = image_set(write(tmp_path / "images", GOOD | {name: data}))
    pytest.raises(RunError, list, ImageLoader(images, 4, decoder=decoder_of(loader, images))).match(name)
    with decoder_of(loader, images)() as decoder, pytest.raises(RunError, match=name):
        list(load_in_order(images, range(len(images)), 4, decoder))


def expected_order(images: ImageSet, seed: int, epoch: int) -> list[int]:
    """The epoch's order; the place of a bad image goes to the next good one."""
    n = len(images)
    order = rng.permute(torch.arange(n), n, rng.fold(seed, "order", epoch)).tolist()
    bad = {index for index in range(n) if not name_of(images, index).startswith("good")}
    return [next(index for index in (order + order)[place:] if index not in bad) for place in range(n)]


@pytest.mark.parametrize("loader", DECODERS)
def test_skip_keeps_the_order_of_the_rest(tmp_path: Path, loader: str, caplog) -> None:
    root = write(tmp_path / "images", GOOD | dict(BAD.values()), list(PLACES))
    settings: dict = {"on_error": "skip", "max_bad_share": 0.75}
    images = image_set(root, **settings)
    plain = image_set(root, **settings)
    with pillow_decoder(plain, 1)() as decoder:
        reference = {
            index: batch.images[place]
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
            assert psnr(pixels.cpu().numpy(), reference[index].numpy()) >= exact
        assert torch.equal(batch.labels, images.source.labels[batch.ids])
    names = [name for name, *_ in [*BAD.values(), *PLACES.values()]]
    assert len(images.bad) == len(names)
    message = next(text for text in caplog.messages if "do not decode" in text)
    assert f"{len(names)} images do not decode" in message
    assert sum(name in message for name in names) == 10
    # The replacement is a function of the position: not of ranks, and not of what is known to be bad by now.
    fresh = image_set(root, **settings)
    for known in (fresh, images):
        ranks = [ids_of(list(ImageLoader(known, 2, 3, rank, 2, decoder=decoder_of(loader, known)))) for rank in (0, 1)]
        assert [ranks[place % 2][place // 2] for place in range(len(order))] == order


@pytest.mark.parametrize("loader", DECODERS)
def test_skip_has_a_limit(tmp_path: Path, loader: str) -> None:
    files = GOOD | dict(BAD[kind] for kind in SOME_BAD)
    root = write(tmp_path / "images", files)
    images = image_set(root, on_error="skip", max_bad_share=4 / 12)
    assert len(ids_of(list(ImageLoader(images, 4, decoder=decoder_of(loader, images))))) == 12
    images = image_set(root, on_error="skip", max_bad_share=3 / 12)
    with pytest.raises(RunError, match=r"4 of 12 images .* more than data.max_bad_share .*cut-middle") as caught:
        list(ImageLoader(images, 4, decoder=decoder_of(loader, images)))
    assert all(BAD[kind][0] in str(caught.value) for kind in SOME_BAD)
    os.unlink(root / BAD[SOME_BAD[0]][0])
    for share, fine in ((0.01, True), (0.0, False)):  # three are tolerated, but not where none is to be
        images = image_set(root, on_error="skip", max_bad_share=share)
        with contextlib.nullcontext() if fine else pytest.raises(RunError, match=r"1 of 11 images"):
            assert len(ids_of(list(ImageLoader(images, 4, decoder=decoder_of(loader, images))))) == 11


@pytest.mark.parametrize("loader", DECODERS)
def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path, loader: str) -> None:
    root = write(tmp_path / "images", GOOD)
    images = image_set(root, on_error="skip", max_bad_share=0.5)
    batches = iter(ImageLoader(images, 2, seed=1, decoder=decoder_of(loader, images)))
    seen = ids_of([next(batches)])
    last = expected_order(images, 1, 0)[-1]
    os.unlink(images.source.describe(last))
    seen += ids_of(list(batches))
    assert last not in seen and len(seen) == len(GOOD)
    assert list(images.bad) == [last]


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
        ("good-00.jpg 99999999999999\n", r"line 1: the label is '99999999999999'; numbers are whole ones from 0 to"),
        ("good-00.jpg 0\ngood-01.jpg -1\n", r"line 2: the label is '-1'"),
        ("good-00.jpg,0.5\n", r"line 1: the label is '0.5'"),
        ("good-00.jpg 9e999\n", r"line 1: the label is '9e999'"),
        ("good-00.jpg 1\n\ngood-01.jpg cat\n", r"line 3: the label 'cat' is a name, and '1' is a number"),
        ("good-00.jpg nan\ngood-01.jpg 3.0\n", r"line 1: the label 'nan' is a name, and '3.0' is a number"),
        ("good-00.jpg\n", r"line 1: .* is not NAME LABEL"),
        ("good-00.jpg,1\ngood-01.jpg,\n", r"line 2: the label is empty"),
        ("good-00.jpg,1\ngood-01.jpg 2\n", r"line 2: 'good-01.jpg 2' is not NAME LABEL"),
        ("good-00.jpg 1 train\n", r"line 1: 'good-00.jpg 1 train' is not .*a header must say which is the label"),
        ("file,label,class\ngood-00.jpg,1,cat\n", r"has the columns file, label, class; call the one of the labels"),
        ('"good-00.jpg,1\ngood-01.jpg,0\n', r"line 1: '\"good-00.jpg,1' is not NAME LABEL"),
        ("foto tier\ngood-00.jpg cat\n", r"line 1: 'foto' is neither an image nor a header"),
        ("good-00.jpg 0\n./good-00.jpg 1\n", r"names good-00.jpg twice \(lines 1 and 2\)"),
        ("good-00.jpg 0\ngone.jpg 1\n", r"names gone.jpg in line 2, which is not in .* \(1 of 2 images"),
        ("\n# nothing\n", r"names no images"),
        (b"\xff\xfe\x00", r"cannot be read"),
    ],
)
def test_bad_labels_files_are_refused(tmp_path: Path, content: str | bytes, problem: str) -> None:
    root = write(tmp_path / "images", GOOD)
    file = tmp_path / "labels.txt"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for on_error in ("raise",) if "gone" in problem else ("raise", "skip"):
        with pytest.raises(UsageError, match=rf"labels_file .*labels.txt.*{problem}"):
            FolderSource(root, file, on_error=on_error)  # type: ignore[arg-type]
    pytest.raises(UsageError, FolderSource, root, tmp_path / "gone.txt").match(r"labels_file .*gone.txt cannot be read")


def test_a_missing_image_and_one_without_label_permute_no_labels(tmp_path: Path, caplog) -> None:
    root, file = write(tmp_path / "images", GOOD), tmp_path / "labels.txt"
    file.write_text("gone.jpg ant\ngood-03.jpg bee\ngood-01.jpg cat\n")
    images = ImageSet(FolderSource(root, file, on_error="skip"), SIZE, on_error="skip", max_bad_share=0.5)
    assert "6 of the 8 images in" in caplog.text and "such as good-00.jpg" in caplog.text
    with pillow_decoder(images, 1)() as decoder:
        (batch,) = load_in_order(images, range(3), 4, decoder)
    assert batch.labels.tolist() == [1, 2] and images.source.classes == ["ant", "bee", "cat"]
    assert list(images.bad) == [0] and "gone.jpg" in str(images.bad[0])
    file.write_text("gone.jpg 0\n")
    with pytest.raises(UsageError, match=r"gone.jpg in line 1, which is not in .* \(1 of 1"):
        FolderSource(root, file, on_error="skip")


def test_what_no_user_put_into_a_folder_is_left_out(tmp_path: Path) -> None:
    """By one rule in training and evaluation, shards and latents."""
    odd = (".ipynb_checkpoints", ".Trash-1000", "@eaDir", ".thumbnails", "__MACOSX", "$RECYCLE.BIN", "lost+found")
    image = image_files.encode(Image.new("RGB", (8, 8)), "PNG")
    good = {f"{name}/x/1.png": image for name in "ab"}
    inside = {f"{folder}/{name}/1.png": image for folder in ("a", "a/x") for name in odd}
    root = write(tmp_path / "images", good | inside | {f"{name}/1.png": image for name in odd} | {"a/._1.png": image})
    assert [os.path.relpath(path, root) for path in FolderSource(root).paths] == sorted(good)
    assert [os.path.relpath(path, root) for path in PngFolder(root).files] == sorted(good)
    members = [(name, data) for name, data in (good | inside).items()] + [("./a/._1.png", image), ("./c/1.png", image)]
    write_tar(tmp_path / "tars" / "x.tar", members)
    (tmp_path / "tars" / "._x.tar").write_bytes(b"resource fork")
    assert len(TarSource(tmp_path / "tars")) == len(good) + 1
    moments_folder(tmp_path / "latents")
    (tmp_path / "latents" / "._shard-00000.safetensors").write_bytes(b"resource fork")
    assert len(LatentDataset(tmp_path / "latents")) == 6


def test_each_real_folder_is_entered_once(tmp_path: Path) -> None:
    image = image_files.encode(Image.new("RGB", (8, 8)), "PNG")
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "deep" / "5.png").write_bytes(image)
    root = write(tmp_path / "images", {"a/1.png": image, "b/2.png": image, "b/c/3.png": image})
    links = {"a/up": "..", "a/self": "../a", "a/other": "../b", "b/c/loop": "../../b", "b/far": tmp_path / "far"}
    for name, target in (links | {"b/again": tmp_path / "far" / "deep", "top": ".", "above": tmp_path}).items():
        (root / name).symlink_to(target)
    (root / "a" / "link.png").symlink_to("../b/2.png")
    found = ["a/1.png", "a/link.png", "b/2.png", "b/again/5.png", "b/c/3.png"]
    source = FolderSource(root)
    assert [os.path.relpath(path, root) for path in source.paths] == found and source.classes == ["a", "b"]
    assert [os.path.relpath(path, root) for path in sorted(PngFolder(root).files)] == found
    (root / "0-link").symlink_to("b")
    pytest.raises(UsageError, FolderSource, root).match(r"class folder 0-link is a link to b, which is read already")
    (root / "0-link").unlink()
    (root / "class").symlink_to(tmp_path / "unmounted")
    for kind in (FolderSource, PngFolder):
        pytest.raises(UsageError, kind, root).match(r"images/class is a link to .*unmounted \(No such file")
    (root / "class").unlink()
    (root / "b" / "4.png").symlink_to("gone.png")  # an image: who reads it names it
    assert len(FolderSource(root)) == 6
    with pytest.raises(RunError, match=r"b/4.png does not decode \(FileNotFoundError"):
        list(PngFolder(root).batches(8))


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
    thread.join(600)
    with contextlib.suppress(OSError):  # lets a reader go that waits for a writer
        os.close(os.open(root / "pipe.jpg", os.O_WRONLY | os.O_NONBLOCK))
    assert "pipe.jpg" in str(failures[0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "images", GOOD)
    root.chmod(0)
    pytest.raises(UsageError, FolderSource, root).match(r"images cannot be read .*permission")
    root.chmod(0o755)


def readers(root: Path) -> dict[str, Callable[[], object]]:
    """What reads each kind of file that holds data, to be compared with itself."""
    write(root / "images", {"x.jpg": jpeg(0), "y.png": image_files.encode(Image.new("RGB", (9, 9)), "PNG")})
    write_tar(root / "tars" / "x.tar", [("1.jpg", jpeg(0))])
    moments_folder(root / "latents")
    folder, tars = FolderSource(root / "images"), TarSource(root / "tars")
    prepare_images(ImageDataSpec(path=str(root / "images")), root / "x.beton", size=8, num_workers=1)
    beton = BetonSource(root / "x.beton")
    latents = LatentDataset(root / "latents")
    return {
        "folder": lambda: folder.read(0),
        "tar": lambda: tars.read(0),
        "beton": lambda: beton.read(1),
        "latents": lambda: latents.batch(torch.arange(6), 0, 0)[0].tolist(),
        "latent header": lambda: str(open_shard(root / "latents" / "shard-00000.safetensors").tensors),
        "statistics": lambda: load_statistics(root / "latents", 4).mean.tolist(),
        "index": lambda: len(open_finished_folder(root / "latents")[0]),
        "checksum": lambda: open_shard(root / "latents" / "shard-00000.safetensors").is_intact(),
        "png": lambda: read_png(root / "images" / "y.png").tolist(),
        "new tar": lambda: TarSource(root / "tars").labels.tolist(),
    }


class Faults:
    """A system whose calls fail for a while, with one error."""

    def __init__(self, monkeypatch, number: int) -> None:
        self.left, self.number = 0, number
        self._fail(monkeypatch, os, "open", "pread", "preadv")
        for module in (builtins, io):
            self._fail(monkeypatch, module, "open")
        self._fail(monkeypatch, np, "fromfile")

    def _fail(self, monkeypatch, module: Any, *names: str) -> None:
        for name in names:
            monkeypatch.setattr(module, name, functools.partial(self._call, getattr(module, name)))

    def _call(self, real: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return real(*args, **options)


KINDS = ("folder", "tar", "beton", "latents", "latent header", "statistics", "index", "checksum", "png", "new tar")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_that_passes_is_waited_for_and_no_bad_data(tmp_path: Path, kind: str, monkeypatch) -> None:
    read = readers(tmp_path)[kind]
    for number in (errno.ESTALE, errno.EMFILE):
        with monkeypatch.context() as patched:
            faults = Faults(patched, number)
            expected = read()
            faults.left = 2
            assert read() == expected and faults.left == 0
            faults.left = 10**6
            with pytest.raises(
                ReadFault, match=rf"{os.strerror(number)}, 3 times in 0 s\); this is no fault of the data"
            ):
                read()
            faults.left = 0
            assert read() == expected


def test_a_fault_that_stays_ends_the_run_and_is_not_noted(tmp_path: Path, monkeypatch) -> None:
    images = image_set(write(tmp_path / "images", GOOD), on_error="skip", max_bad_share=1.0)
    name = images.source.describe(3)
    real = os.open

    def fail(path: Any, *args: Any, **options: Any) -> int:
        if path == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(ReadFault, match=rf"{name} cannot be read \(Input/output error"):
        list(ImageLoader(images, 4, decoder=pillow_decoder(images, 2)))
    assert images.bad == {}
    spec = ImageDataSpec(path=str(tmp_path / "images"), on_error="skip", max_bad_share=1.0)
    for num_workers in (1, 2):
        with pytest.raises(ReadFault, match=name):
            prepare_images(spec, tmp_path / "x.beton", size=8, num_workers=num_workers)
    monkeypatch.undo()
    assert prepare_images(spec, tmp_path / "x.beton", size=8, num_workers=1).bad == {}


def test_more_shards_than_a_process_may_open(tmp_path: Path) -> None:
    for number in range(300):
        write_tar(tmp_path / "tars" / f"{number:03d}.tar", [("1.jpg", bytes([number % 256]))])
        rows = {"latents": torch.full((1, 1, 2, 2), float(number)), "labels": torch.tensor([0])}
        features = torch.full((1, 1, 2, 2), float(number), dtype=torch.bfloat16)
        (tmp_path / "latents").mkdir(exist_ok=True)
        save_file({**rows, "features": features}, tmp_path / "latents" / f"{number:03d}.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        tars, latents = TarSource(tmp_path / "tars"), LatentDataset(tmp_path / "latents", normalize=False, flip=False)
        latents.companion = CachedFeatures(latents.shards)
        assert [tars.read(index)[0] for index in range(300)] == [number % 256 for number in range(300)]
        values, _, features = latents.batch(torch.arange(300), 0, 0)
        assert values[:, 0, 0, 0].tolist() == list(range(300)) and features[257, 0, 0, 0] == 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""Every JSON, .npz and index file that vadit reads, and files of weights, changed in many ways with little memory.

What may come of each is one sentence (UsageError, RunError) or an answer: no other exception, MemoryError least of all,
and no hang. A case is a function of its name alone; a failure names it.
"""

import dataclasses
import faulthandler
import functools
import io
import json
import os
import random
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_worker import SHARE
from latent_files import TOKENIZER, moments_folder
from mutations import mutate
from safetensors.torch import load_file
from tar_files import bytes_of, write_tar
from test_beton import FRONT
from test_beton import write as write_beton
from test_interop import network, state_of
from test_interop import write as write_diffusers

from vadit.config import DiTConfig, DiTSpec, FlowSpec, MaskSpec, SampleSpec
from vadit.config.files import load_run_config, save_config
from vadit.demo import run as demo
from vadit.eval import samples
from vadit.eval.image_files import open_images
from vadit.eval.latents import read_vectors
from vadit.images.sources.beton import (
    FOOTER,
    HEADER,
    MAGIC,
    MIN_PAGE_SIZE,
    OUR_FIELDS,
    BetonSource,
    EncodedImage,
    row_type,
)
from vadit.images.sources.beton_writer import BetonWriter
from vadit.images.sources.tar import TarSource
from vadit.images.sources.tar_index import index_path
from vadit.latents.shards import open_finished_folder
from vadit.latents.statistics import load_statistics
from vadit.models.autoencoder import Autoencoder
from vadit.models.dit import LightningDiT
from vadit.models.interop import load_diffusers_autoencoder, load_reference_dit
from vadit.models.masked import build_generator, load_exported
from vadit.report.log import read_log, read_scores
from vadit.runtime import choices
from vadit.runtime.errors import RunError, UsageError
from vadit.sampling.info import SamplingInfo, read_info, save_info
from vadit.sampling.write import noted_sampler
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.publish import TensorFile
from vadit.train.checkpoint.shares import Shares

MORE_BYTES = 3 << 30
SECONDS = 300  # Of a test, all of its cases: far more than it takes.
MODEL = DiTSpec(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)

Case = tuple[str, bytes]
Read = Callable[[], object]


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """3 GiB on top of what the process has; one that hangs is ended with its stack."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_BYTES, before[1]))
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    resource.setrlimit(resource.RLIMIT_AS, before)


def try_all(cases: Iterator[Case], put: Callable[[bytes], object], read: Read, name: str) -> None:
    """Each case is refused in one sentence that names the file, or read; some are refused."""
    told = []
    for case, data in cases:
        put(data)
        told.append(refusal(case, read))
        assert not told[-1] or (name in told[-1] and len(told[-1]) < 2000), f"{case}: {told[-1]}"
    assert any(told)


def refusal(case: str, read: Read) -> str:
    """What a refusal says, nothing where the file is read; any other exception fails with the case's name."""
    try:
        read()
    except (RunError, UsageError) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}"[:2000]) from error
    return ""


ODD_VALUES = (
    "null", "true", "-5", "0", "1000000000", "9" * 5000, "1" * 40, "NaN", "-Infinity", "1e999", "0.5", '"x"', '""',
    '"\\ud800"', '"\\u0000"', '"../../x"', "[]", "{}", "[[1]]", "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70,
    "[1, 2, 3, 4]", '[{"a": []}]', '"' + "x" * 100_000 + '"', '{"a": 1, "a": 2}',
)  # fmt: skip
ODD_FILES = (b"", b"\x80\x02}q\x00.", b"\xff\xfe{\x00}\x00", b"[" * 100_000, b"null", b"[]", b"{}", b"7", b'"x"')
JSON_CASES = 24


def json_cases(name: str, text: str) -> Iterator[Case]:
    """Odd files; odd values in place of one, a key that is there twice, gone or new; bits and cuts."""
    for number, data in enumerate((*ODD_FILES, text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode())):
        yield f"{name} file {number}", data
    for number in range(JSON_CASES):
        draw = random.Random(f"{name} {number}")
        values = json.loads(text)
        places = list(nodes(values))
        holder, key = draw.choice(places)
        change = draw.choice(("odd", "odd", "odd", "gone", "new", "bytes"))
        if change == "bytes":
            yield f"{name} {number}", mutate(text.encode(), draw, ("it", 0, len(text.encode())))[0]
            continue
        odd = draw.choice(ODD_VALUES)
        if change == "odd":
            holder[key] = "@odd"
        elif change == "gone":
            del holder[key]
        elif isinstance(holder, dict):
            holder[draw.choice(["new", key + "@twice"])] = "@odd"
        changed = json.dumps(values).replace('"@odd"', odd).replace("@twice", "")
        yield f"{name} {number} {change} {key} {odd[:20]}", changed.encode()


def nodes(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a value in nested ones: what holds it, and its key there."""
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        yield values, key
        if isinstance(value, dict | list):
            yield from nodes(value)


def run_config(folder: Path) -> tuple[Path, Read]:
    save_config(DiTConfig(), folder / "config.json")
    return folder / "config.json", lambda: load_run_config(folder)


def exported(folder: Path, name: str = "config.json") -> tuple[Path, Read]:
    torch.manual_seed(0)
    kind = "plain" if name == "config.json" else "mdt"
    mask = MaskSpec() if kind == "plain" else MaskSpec(kind="mdt", decoder_depth=1)
    build_generator(MODEL, mask).save_pretrained(folder)
    return folder / name, lambda: load_exported(folder)


def tokenizer(folder: Path) -> tuple[Path, Read]:
    Autoencoder(TOKENIZER).save_pretrained(folder)
    return folder / "config.json", lambda: Autoencoder.from_pretrained(folder)


def diffusers(folder: Path) -> tuple[Path, Read]:
    write_diffusers(folder / "vae", state_of(network()))
    return folder / "vae" / "config.json", lambda: load_diffusers_autoencoder(folder / "vae")


def latent_index(folder: Path) -> tuple[Path, Read]:
    moments_folder(folder / "latents")
    return folder / "latents" / "index.json", lambda: open_finished_folder(folder / "latents")


def sampling_info(folder: Path) -> tuple[Path, Read]:
    save_info(SamplingInfo([0.5], [2.0], classes=["a"], tokenizer="x", sampler=SampleSpec(), flow=FlowSpec()), folder)
    return folder / "sampling.json", lambda: read_info(folder)


def demo_settings(folder: Path) -> tuple[Path, Read]:
    values = {"seed": 1, "sizes": {"samples": 3}}
    (folder / "demo.json").write_text(json.dumps(values))
    return folder / "demo.json", lambda: demo._claim(folder, values)


def tar_labels(folder: Path) -> tuple[Path, Read]:
    def read() -> None:
        write_tar(folder / "a.tar", [("9.jpg", b"9"), ("9.json", (folder / "a.tar.json").read_bytes())])
        TarSource(folder / "a.tar")

    (folder / "a.tar.json").write_text(json.dumps({"label": 1, "text": {"caption": ["a", 2]}}))
    return folder / "a.tar.json", read


JSON_FILES: dict[str, Callable[[Path], tuple[Path, Read]]] = {
    "run": run_config,
    "generator": exported,
    "mask": functools.partial(exported, name="mask.json"),
    "tokenizer": tokenizer,
    "diffusers": diffusers,
    "latents": latent_index,
    "sampling": sampling_info,
    "demo": demo_settings,
    "tar": tar_labels,
}


@pytest.mark.parametrize("kind", JSON_FILES)
def test_json_files(kind: str, tmp_path: Path) -> None:
    path, read = JSON_FILES[kind](tmp_path)
    read()
    name = "a.tar" if kind == "tar" else str(tmp_path)
    try_all(json_cases(kind, path.read_text()), path.write_bytes, read, name)


def test_what_a_run_left_is_read_or_left_out(tmp_path: Path) -> None:
    """Reports, logs and choices of kernels go without what they cannot read."""
    noted = {"sampler": dataclasses.asdict(SampleSpec()), "autoguidance": False, "label_list": None}
    log = {"images": 8, "step": 1, "loss": 0.5, "grid": "a.png"}
    files: dict[str, tuple[Any, Read]] = {
        "backends.json": ({"x": {"name": "cpp", "reason": ""}}, lambda: choices.recorded(tmp_path, "x")),
        "metrics.json": ({"kind": "samples", "metrics": {"fid": 3}, "spread": {}}, lambda: read_scores(tmp_path)),
        "settings.json": (noted, lambda: noted_sampler(tmp_path)),
        "log.jsonl": (log, lambda: read_log(tmp_path / "log.jsonl")),
    }
    for name, (values, read) in files.items():
        for case, data in json_cases(name, json.dumps(values)):
            (tmp_path / name).write_bytes(data + b"\n")
            assert not refusal(case, read), case


def seal(path: Path) -> None:
    """A manifest that is right."""
    entries = {name: publish._flushed(path / name) for name in json.loads((path / "manifest.json").read_text())}
    publish.write_text(path / "manifest.json", json.dumps(entries))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", SHARE])
def test_parts_of_checkpoints(name: str, folder: Path, capsys) -> None:
    """A manifest or state that makes no sense: the checkpoint before it is taken; a share's header: an error."""
    path = folder / "step-00000003"
    share, tensors = Shares(path, "model"), load_file(path / SHARE)
    text = json.dumps(dataclasses.asdict(share.files[0].header)) if name == SHARE else (path / name).read_text()
    taken = set()

    def put(changed: bytes) -> None:
        if name == SHARE:
            words = {"vadit": changed.decode("utf-8", "replace")}
            publish.write_tensors(path / name, TensorFile(name, tensors, words))
        else:
            (path / name).write_bytes(changed)
        if name != "manifest.json":
            seal(path)

    def read() -> None:
        found = publish.newest(folder)
        assert found is not None and found.parent == folder
        taken.add(found.name)
        publish.read_state(found)
        Shares(found, "model").whole("master.{}")
        if found != path:
            raise RunError(f"{folder}: refused, as it should be")

    read()
    try_all(json_cases(name, text), put, read, str(folder))
    assert taken == ({path.name} if name == SHARE else {path.name, "step-00000002"})


HEADERS = (
    "{'descr': %s, 'fortran_order': %s, 'shape': %s, }",
    "{'descr': %s, 'fortran_order': %s, 'shape': %s, 'more': 1}",
    "{'descr': %s, 'shape': %s}",
    "(" * 5000,
    "[%s, %s, %s]",
)
DESCRIPTIONS = ("'|O'", "'<f8'", "'<c16'", "'|S0'", "'<U9'", "'>i2'", "('<f8', (1000000,))", "[('a', '<f8')]",
                "'nonsense'", "'<M8[s]'", "7", "'|V8'")  # fmt: skip
SHAPES = ("(1073741824,)", "(-1,)", "(4, -4)", "()", "(0,)", "(99999999999999999999,)", "(3, 100000, 100000, 3)",
          "(2, 2.5)", "'x'", "(True, True)", "(65536, 65536)", "(0, 16, 16, 3)", "(1000000000, 1, 1, 3)")  # fmt: skip
NPZ_CASES = 50


def npz_cases(name: str, arrays: dict[str, np.ndarray]) -> Iterator[Case]:
    """Headers with other types and shapes, over the old bytes or as many as they claim; forged sizes; bits and cuts."""
    plain = io.BytesIO()
    np.savez(plain, **arrays)  # type: ignore[arg-type]
    for number in range(NPZ_CASES):
        draw = random.Random(f"{name} {number}")
        change = draw.choice(("header", "header", "header", "bytes", "bytes", "bytes", "claim", "kind", "gone"))
        changed = bytearray(plain.getvalue())
        if change == "bytes":
            yield f"{name} {number}", mutate(bytes(changed), draw, ("it", 0, len(changed)))[0]
            continue
        target, into = draw.choice(list(arrays)), io.BytesIO()
        with zipfile.ZipFile(into, "w") as archive:
            for key, array in arrays.items():
                member = io.BytesIO()
                np.save(member, array)
                data, kind = member.getvalue(), zipfile.ZIP_DEFLATED
                if key == target and change == "gone":
                    continue
                if key == target and change == "kind":
                    kind = draw.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
                if key == target and change == "header":
                    data = forged(draw, array)
                archive.writestr(f"{key}.npy", data, compress_type=kind)
            if change == "claim":  # as written into the directory when the archive is closed
                info = archive.getinfo(f"{target}.npy")
                info.file_size = draw.choice((0, 1, info.file_size - 1, 1 << 31, (1 << 40) + 1))
        yield f"{name} {number} {change} {target}", into.getvalue()


def forged(draw: random.Random, array: np.ndarray) -> bytes:
    header = draw.choice(HEADERS)
    description = draw.choice((repr(array.dtype.str), draw.choice(DESCRIPTIONS)))
    if header.count("%s"):
        values = (description, draw.choice(("False", "False", "True", "2")), draw.choice(SHAPES))
        header %= values[: header.count("%s")]
    version = draw.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x09\x09"))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header) + 1)
    return b"\x93NUMPY" + version + length + header.encode() + b"\n" + array.tobytes()


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def read_pictures(path: Path) -> int:
    return sum(len(batch) for batch in open_images(path).batches(64))


MOMENTS = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.ones(3), "sigma_s": np.eye(3)}
NPZ_FILES: dict[str, tuple[dict[str, np.ndarray], Callable[[Path], object]]] = {
    "samples": ({"arr_0": pictures(4), "labels": np.arange(4)}, read_pictures),
    "reference": (MOMENTS, samples._load_statistics),
    "vectors": ({"x": np.ones((8, 4), np.float32)}, read_vectors),
}


@pytest.mark.parametrize("kind", NPZ_FILES)
def test_npz_files(kind: str, tmp_path: Path) -> None:
    arrays, read = NPZ_FILES[kind]
    path = tmp_path / "it.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    read(path)
    try_all(npz_cases(kind, arrays), path.write_bytes, lambda: read(path), "it.npz")


def test_a_small_npz_does_not_become_large(tmp_path: Path) -> None:
    """Two large pictures that deflate to nothing are read one by one."""
    path = tmp_path / "it.npz"
    np.savez_compressed(path, arr_0=np.zeros((2, 4736, 4736, 3), np.uint8))
    assert path.stat().st_size < 1 << 20
    assert [len(batch) for batch in open_images(path).batches(64)] == [1, 1]


def test_indices_of_tars(tmp_path: Path) -> None:
    """A cache: whatever it says, what is read is what the shard holds."""
    path = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", bytes([number]) * 700) for number in range(4)])

    def read() -> list[bytes]:
        return bytes_of(TarSource(path))

    expected, index = read(), index_path(path)
    with np.load(index) as kept:
        arrays = dict(kept)
    odd = ("start", 1 << 62), ("start", -1), ("size", 1 << 40), ("size", -700), ("label", -9), ("header", 9)
    for name, value in odd:
        records = arrays["records"].copy()
        records[name][2] = value
        np.savez(index.with_suffix(".npz"), **arrays | {"records": records})  # type: ignore[arg-type]
        index.with_suffix(".npz").rename(index)
        assert read() == expected, (name, value)
    for case, data in npz_cases("tar-index", arrays):
        index.write_bytes(data)
        assert read() == expected, case


def test_notes_of_betons(tmp_path: Path) -> None:
    """Notes that make no sense under checksums that are right; a table of rows that was never written."""
    path = write_beton(tmp_path / "a.beton", 3)
    data = path.read_bytes()
    table = int(np.frombuffer(data, HEADER, 1)["allocations"][0])
    size = int(np.frombuffer(data, FOOTER, 1, table - FOOTER.itemsize)["size"][0])
    start, text = table - FOOTER.itemsize - size, data[table - FOOTER.itemsize - size : table - FOOTER.itemsize]
    rows_end = FRONT + 3 * row_type(OUR_FIELDS).itemsize

    def put(notes: bytes) -> None:
        header = np.frombuffer(data, HEADER, 1).copy()
        header["allocations"] = start + len(notes) + FOOTER.itemsize
        front = header.tobytes() + data[HEADER.itemsize : start]
        tables = zlib.crc32(data[table:], zlib.crc32(front[:rows_end]))
        footer = np.array([(MAGIC, len(notes), zlib.crc32(notes), tables, 0)], FOOTER)
        path.write_bytes(front + notes + footer.tobytes() + data[table:])

    put(text)
    assert BetonSource(path).classes == ["cat", "dog", "eel"]
    try_all(json_cases("beton", text.decode()), put, lambda: BetonSource(path), "a.beton")
    header = np.frombuffer(data, HEADER, 1).copy()
    header["num_samples"], header["allocations"] = 10**9, 41 * 10**9
    path.write_bytes(header.tobytes() + data[HEADER.itemsize : rows_end])
    os.truncate(path, 41 * 10**9 + 24 * 10**9)
    pytest.raises(RunError, BetonSource, path).match(r"a\.beton is damaged.*hole")


def test_a_journal_of_a_beton(tmp_path: Path) -> None:
    """Pages that the journal does not record in good order are done again; one of other settings is refused."""
    path, settings = tmp_path / "a.beton", {"max_samples": 4, "page_size": MIN_PAGE_SIZE}
    with BetonWriter(path, **settings) as writer:  # type: ignore[arg-type]
        for number in range(3):
            writer.append(EncodedImage("raw", 1024, 512, bytes([number + 1]) * (3 << 19)), number)
        writer.skip("x", "no picture")
    journal, partial = tmp_path / "a.beton.partial.journal", tmp_path / "a.beton.partial"
    lines, data, done = journal.read_bytes().splitlines(), partial.read_bytes(), []

    def read() -> None:
        with BetonWriter(path, **settings) as writer:  # type: ignore[arg-type]
            done.append(writer.done)

    assert len(lines) == 3
    for at in (0, 2):
        for case, line in json_cases(f"journal {at}", lines[at].decode()):
            partial.write_bytes(data)
            journal.write_bytes(b"\n".join([*lines[:at], line, *lines[at + 1 :], b""]))
            told = refusal(case, read)
            assert not told or (at == 0 and "a.beton" in told), f"{case}: {told}"
    assert {0, 1} <= set(done)


WEIGHT_CASES = 40
ODD_NAMES = ("9" * 5000, f"blocks.{'9' * 5000}.x", 7, ("a",), "", "decoder.up_blocks.x.y", "decoder.up_blocks",
             "encoder.down.77.block.0.conv1.weight", "blocks.77.x")  # fmt: skip


def odd_tensors(tensor: torch.Tensor) -> list[Any]:
    flat = torch.ones(4)
    return [
        torch.ones(1).expand(1 << 36), torch.ones(1).expand(tensor.shape), torch.empty(tensor.shape, device="meta"),
        torch.empty(1 << 50, device="meta"), tensor.to_sparse(), torch.quantize_per_tensor(flat, 0.1, 0, torch.qint8),
        tensor.to(torch.complex64), tensor[..., None], torch.ones(()), torch.ones(0), torch.ones(0, 0, 0, 0),
        tensor.flatten()[:1], tensor.to(torch.int64), tensor.half(), None, 7, {"a": tensor}, "x",
    ]  # fmt: skip


def weight_cases(name: str, state: dict[Any, Any]) -> Iterator[Case]:
    """One tensor of another kind or shape, under another name, or gone."""
    for number in range(WEIGHT_CASES):
        draw = random.Random(f"{name} {number}")
        key, changed = draw.choice(list(state)), dict(state)
        value = changed.pop(key)
        odd = draw.choice(odd_tensors(value))
        new: Any = draw.choice((key, key, key, *ODD_NAMES))
        if draw.random() < 0.9:
            changed[new] = odd if new == key else value
        content = io.BytesIO()
        torch.save(changed, content)
        yield f"{name} {number} {key} {str(new)[:40]} {type(odd)} {getattr(odd, 'shape', odd)}", content.getvalue()


@pytest.mark.parametrize("kind", ["dit", "diffusers"])
def test_weights_of_strangers(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / ("it.pt" if kind == "dit" else "diffusion_pytorch_model.bin")
    state = dict(LightningDiT(MODEL).state_dict()) if kind == "dit" else state_of(network())
    read: Callable[[], object] = functools.partial(load_reference_dit, path)
    if kind == "diffusers":
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "norm_num_groups": 4}))
        read = functools.partial(load_diffusers_autoencoder, path)
    torch.save(state, path)
    read()
    try_all(weight_cases(kind, state), path.write_bytes, read, path.name)


def test_files_that_would_grow_are_refused(tmp_path: Path) -> None:
    """Compressed members (mapped as they are, their numbers would be wrong), and a bytearray of 10 GB in 30 bytes."""
    plain, odd = tmp_path / "plain.pt", tmp_path / "odd.pt"
    torch.save({"x": torch.ones(8, 4)}, plain)
    assert read_vectors(plain).sum() == 32
    with zipfile.ZipFile(plain) as kept, zipfile.ZipFile(odd, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in kept.namelist():
            archive.writestr(name, kept.read(name))
    pytest.raises(RunError, read_vectors, odd).match(r"odd\.pt cannot be read")
    odd.write_bytes(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R.")
    pytest.raises((RunError, UsageError), read_vectors, odd).match(r"odd\.pt")
    torch.save({"mean": torch.ones(1).expand(1 << 36), "std": torch.ones(4)}, tmp_path / "latents_stats.pt")
    pytest.raises(RunError, load_statistics, tmp_path, 4).match("does not hold the tensors mean and std")
    rows, size = 1 << 27, 8 << 27
    latents = {"dtype": "F32", "shape": [rows, 1, 0, 0], "data_offsets": [0, 0]}
    header = {"latents": latents, "labels": {"dtype": "I64", "shape": [rows], "data_offsets": [0, size]}}
    path, text = tmp_path / "a.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    pytest.raises(RunError, open_finished_folder, tmp_path).match(r"a\.safetensors.*a shard may hold 16,777,216 rows")

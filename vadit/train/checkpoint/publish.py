"""Checkpoint folders: files written through to the disk, the rename that makes them one, which are whole, which go."""

import contextlib
import functools
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vadit.config import RunSpec
from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, write_fault
from vadit.runtime.files import flush_to_disk
from vadit.runtime.json_files import Count, Limits, read_json
from vadit.runtime.reading import ReadFault, patiently
from vadit.runtime.safetensors_file import save_tensors

MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class State:
    """What a start needs of state.json."""

    step: Count
    images_seen: Count
    world_size: Annotated[int, Limits(ge=1)]
    optimizer: str
    loader: dict[str, Any]
    guard: dict[str, Any]


@dataclass(frozen=True)
class FileEntry:
    """A file in the manifest."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Part:
    """The files that one process has written, in which save."""

    token: str
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def write_tensors(path: Path, file: TensorFile) -> dict[str, Any]:
    """Write a safetensors file through to the disk, without holding up Python; its size and SHA-256."""
    save_tensors(path, file.tensors, file.metadata)
    return _flushed(path)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write a text file through to the disk; its size and SHA-256. A link there is replaced."""
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        file.write(text.encode())
    return _flushed(path)


def _flushed(path: Path) -> dict[str, Any]:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def publish(partial: Path, final: Path, marks: list[Path]) -> None:
    """Turn the marks of all parts into one manifest, flush, and rename: only now does the checkpoint exist."""
    manifest: dict[str, Any] = {}
    for mark in marks:
        manifest |= read_json(mark, Part).files
        mark.unlink()
    write_text(partial / MANIFEST, json.dumps(manifest, default=vars, indent=1, sort_keys=True))
    flush_to_disk(partial)
    if os.path.lexists(final):  # saved once more, after a rollback: never neither of the two
        replaced = final.with_name(final.name + ".replaced.partial")
        os.replace(final, replaced)
        os.replace(partial, final)
        _remove(replaced)
    else:
        os.replace(partial, final)
    flush_to_disk(final.parent)


def present(folder: Path) -> list[Path]:
    """Checkpoints under `folder`, whole or damaged, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".partial"), reverse=True)


def newest(folder: Path, *, hashes: bool = True) -> Path | None:
    """The newest whole checkpoint under `folder`, or None; damaged ones are named on the way.

    Without `hashes` the sizes of the files are enough, and nothing is printed: for a first look at a folder.
    """
    for path in present(folder):
        fault = _fault(path, hashes=hashes)
        if fault is None:
            return path
        if hashes and distributed.is_main():
            note(f"checkpoint {path} is damaged ({fault}); taking the one before it")
    return None


def _fault(path: Path, *, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_json(path / MANIFEST, dict[str, FileEntry])
    except ReadFault:
        raise
    except RunError:
        return f"no readable {MANIFEST}"
    try:
        for name in (STATE, *manifest):
            if name not in manifest or not (path / name).is_file():
                return f"{name} is missing"
            if (found := (path / name).stat().st_size) != manifest[name].bytes:
                return f"{name} has {found} bytes instead of {manifest[name].bytes}"
        if hashes:
            with ThreadPoolExecutor(8) as pool:  # hashing leaves Python to the others
                digests = pool.map(lambda name: _digest(path / name), manifest)
                for (name, entry), digest in zip(manifest.items(), digests, strict=True):
                    if digest != entry.sha256:
                        return f"{name} has changed"
        read_state(path)
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    except ReadFault:
        raise
    except RunError as error:
        return str(error)
    return None


def read_state(path: Path) -> State:
    """The state.json of a checkpoint; RunError where it makes no sense."""
    return read_json(path / STATE, State, allow_nan=True)


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, *_state: int) -> str:
    """Once per state of the file: a start asks for the newest whole checkpoint several times, of many gigabytes."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return patiently(digest, path)


def prune(folder: Path, spec: RunSpec, *, last: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep_checkpoints` and the first past each multiple of `keep_every_images`.

    Called after a new one exists, `last`: those of later steps were damaged, or the run would not be here again, and
    take nobody's place. What cannot be deleted is reported, and stays.
    """
    paths = [path for path in present(folder) if last is None or path.name <= last]
    kept = set(paths[: spec.keep_checkpoints])
    if spec.keep_every_images:
        first: dict[int, Path] = {}
        for path in paths:  # newest first, so that the oldest remains; the first of each stretch is never deleted
            with contextlib.suppress(RunError):
                first[read_state(path).images_seen // spec.keep_every_images] = path
        kept |= {path for stretch, path in first.items() if stretch > 0}
    for path in paths:
        if path in kept:
            continue
        doomed = path.with_name(path.name + ".old.partial")  # one that is half deleted must not look damaged
        try:
            os.replace(path, doomed)
            _remove(doomed)
        except OSError as error:
            note(f"the old checkpoint {path} could not be deleted ({write_fault(error)})")


def clear_up(folder: Path) -> None:
    """Remove what interrupted saves have left; put back a checkpoint that was about to be replaced."""
    for path in folder.glob("step-*.partial"):
        before = folder / path.name.removesuffix(".replaced.partial")
        if path.name.endswith(".replaced.partial") and not before.exists():
            os.replace(path, before)
        else:
            with contextlib.suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder, but only the link where it is one: a save would write where it leads."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()

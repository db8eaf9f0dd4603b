"""What `vadit prepare images` writes: a folder of shards, or a .beton; each knows how to go on and what it holds."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vadit.images.beton import BetonFile, BetonSource
from vadit.images.beton_writer import IMAGE_FIELDS, BetonWriter, EncodedImage
from vadit.images.loader import ImageSource
from vadit.images.prepare.workers import VERIFY_IMAGES, Encoded, Written
from vadit.images.tar import CLASSES_FILE, PREPARED_FILE, TarShardWriter, TarSource, shard_name
from vadit.images.tar_index import index_path, shard_index
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.runtime.files import whole_file

NAME = "images"
FORMAT = "vadit-prepared-images"
TELL_EVERY = 16

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], object]
"""Called with "prepare" or "verify", the images done and their number."""
Results = Callable[[list[range]], Iterator[Encoded | str]]
"""The images of some stretches in order, encoded, or why they cannot be had."""


@dataclass(frozen=True)
class Task:
    """What is to be written, and where."""

    out: Path
    source: ImageSource
    settings: dict[str, Any]
    """Whatever the bytes depend on."""
    shard_size: int
    results: Results
    progress: Progress | None
    raises: bool
    """Stop at the first bad image."""

    def tell(self, done: int) -> None:
        """So many images are written or left out."""
        if self.progress is not None and (done % TELL_EVERY == 0 or done == len(self.source)):
            self.progress("prepare", done, len(self.source))

    def note(self, bad: dict[int, str], index: int, why: str) -> None:
        """Leave an image out."""
        if self.raises:
            place = self.source.describe(index)
            told = why if place in why else f"image {place} does not decode ({why})"
            raise RunError(f"{told}; replace it, or leave it out with --on-error skip")
        bad[index] = why


class Output(ABC):
    """The files of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.bad: dict[int, str] = {}
        """Images that are left out -> why."""
        self.num_new = 0
        """Images that were written now."""

    @abstractmethod
    def write(self) -> None:
        """Write what is missing, all but the mark that it is complete."""

    @abstractmethod
    def complete(self) -> None:
        """Mark it as complete."""

    @abstractmethod
    def check_labels(self, labels: Tensor) -> None:
        """Compare what was written with the labels that it should have, int64 (n,); RunError where it differs."""

    @abstractmethod
    def written(self, size: int, decode: bool) -> Iterator[Written]:
        """Everything, in parts to be read back from the disk."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files."""

    @abstractmethod
    def close(self) -> None:
        """Let others write."""


class Shards(Output):
    """A folder of WebDataset shards; shard k holds images k * shard_size and on, without the bad ones.

    `prepare.json` says what the folder is made with, and, once it is complete, how many images each shard holds.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        n, step = len(task.source), task.shard_size
        stretches = [range(start, min(start + step, n)) for start in range(0, n, step)]
        self._stretches = {task.out / shard_name(NAME, number): stretch for number, stretch in enumerate(stretches)}
        self._digest = hashlib.sha256(json.dumps(task.settings).encode()).hexdigest()[:16]
        self._counts: dict[str, int] = {}
        try:
            task.out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(task.out, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UsageError(f"{task.out} cannot be used ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise UsageError(f"another process writes to {task.out}; wait for it, or choose another folder") from None

    def write(self) -> None:
        """Shard by shard; those that are there and whole are kept."""
        task = self.task
        begun = self._begun()
        missing = [path for path in self._stretches if not self._is_finished(path)]
        if missing or not begun:
            self._mark(None)
        results = task.results([self._stretches[path] for path in missing])
        done = sum(len(stretch) for path, stretch in self._stretches.items() if path not in missing)
        for path in missing:
            stretch = self._stretches[path]
            bad: dict[int, str] = {}
            with TarShardWriter(path, {"settings": self._digest, "first": stretch.start}) as writer:
                for index in stretch:
                    result = next(results)
                    if isinstance(result, str):
                        task.note(bad, index, result)
                    else:
                        writer.add(f"{index:08d}", result.extension, result.data, int(task.source.labels[index]))
                    done += 1
                    task.tell(done)
                writer.note["bad"] = bad
            self.num_new += writer.num_images
            self._counts[path.name] = writer.num_images
            self.bad |= bad

    def complete(self) -> None:
        """Names of the classes, and the counts."""
        write_text(self.task.out / CLASSES_FILE, json.dumps(self.task.source.classes, indent=0) + "\n")
        self._mark({name: self._counts[name] for name in sorted(self._counts)})

    def check_labels(self, labels: Tensor) -> None:
        """Of all shards, by their headers as they lie on the disk."""
        for path in self._stretches:
            index_path(path).unlink(missing_ok=True)
            _forget(path)
        if not torch.equal(TarSource(self.task.out).labels, labels):
            raise RunError(f"the labels in {self.task.out} are not those of {self.task.source.name}; remove it")

    def written(self, size: int, decode: bool) -> Iterator[Written]:
        """By shard."""
        for path in self._stretches:
            for start in range(0, self._counts[path.name], VERIFY_IMAGES):
                ids = range(start, min(start + VERIFY_IMAGES, self._counts[path.name]))
                yield Written(str(path), ids, size, decode)

    def files(self) -> list[Path]:
        """The shards."""
        return list(self._stretches)

    def close(self) -> None:
        """Give the folder free."""
        os.close(self._lock)

    def _begun(self) -> bool:
        """Whether the folder was begun with these settings; UsageError where it holds anything else."""
        path = self.task.out / PREPARED_FILE
        if path.is_file():
            try:
                found = json.loads(path.read_text())["settings"]
            except (ValueError, KeyError, TypeError):
                raise RunError(f"{path} is damaged; remove {self.task.out} and start again") from None
            _refuse_others(self.task, found)
        strange = [entry for entry in sorted(self.task.out.glob("*.tar")) if entry not in self._stretches]
        if strange or (not path.is_file() and any(shard.exists() for shard in self._stretches)):
            name = (strange or list(self._stretches))[0].name
            raise UsageError(f"{self.task.out} holds other shards ({name}); choose another folder")
        return path.is_file()

    def _is_finished(self, path: Path) -> bool:
        """Whether a shard is there and whole; its bad images are noted then."""
        if not path.exists():
            return False
        found = shard_index(path)
        note = found.note
        expected = {"settings": self._digest, "first": self._stretches[path].start}
        if note is None or found.bad or {key: note.get(key) for key in expected} != expected:
            logger.warning("%s is damaged or not of this data; it is made anew", path)
            return False
        if self.task.raises:
            for index, why in note["bad"].items():
                self.task.note({}, int(index), why)
        self.bad |= {int(index): why for index, why in note["bad"].items()}
        self._counts[path.name] = len(found.records)
        return True

    def _mark(self, shards: dict[str, int] | None) -> None:
        content = {"format": FORMAT, "settings": self.task.settings, "shards": shards}
        write_text(self.task.out / PREPARED_FILE, json.dumps(content, indent=2) + "\n")


class Beton(Output):
    """A .beton; class names, settings and bad images stand in its notes, the names also in NAME.beton.classes.json."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._writer: BetonWriter | None = None

    def write(self) -> None:
        """From the last whole page on; a file that is complete stays as it is."""
        task = self.task
        if task.out.exists():
            notes = BetonFile(task.out).notes
            if "settings" not in notes:
                raise UsageError(f"{task.out} is there, and not from vadit prepare; choose another name")
            _refuse_others(task, notes["settings"])
            bad = notes["bad"]
        else:
            _refuse_others(task, _begun_settings(task.out))
            self._writer = BetonWriter(task.out, IMAGE_FIELDS, max_samples=len(task.source), settings=task.settings)
            bad = self._writer.skipped
        self.bad |= {int(index): why for index, why in bad.items()}
        if task.raises:
            for index, why in self.bad.items():
                task.note({}, index, why)
        if self._writer is not None:
            self._append(self._writer)

    def _append(self, writer: BetonWriter) -> None:
        first = writer.num_samples
        stretch = range(writer.done, len(self.task.source))
        results = self.task.results([stretch])
        for index in stretch:
            result = next(results)
            if isinstance(result, str):
                self.task.note(self.bad, index, result)
                writer.skip(str(index), result)
            else:
                mode: Literal["raw", "jpg"] = "raw" if result.extension == "raw" else "jpg"
                image = EncodedImage(mode, result.width, result.height, result.data)
                writer.append(image, int(self.task.source.labels[index]))
            self.task.tell(index + 1)
        self.num_new = writer.num_samples - first

    def complete(self) -> None:
        """Tables and notes; the file gets its name."""
        task = self.task
        if self._writer is not None:
            bad = {str(index): why for index, why in self.bad.items()}
            self._writer.finish({"classes": task.source.classes, "settings": task.settings, "bad": bad})
        path = task.out.with_name(f"{task.out.name}.{CLASSES_FILE}")
        write_text(path, json.dumps(task.source.classes, indent=0) + "\n")

    def check_labels(self, labels: Tensor) -> None:
        """By the table as it lies on the disk."""
        _forget(self.task.out)
        if not torch.equal(BetonSource(self.task.out).labels, labels):
            raise RunError(f"the labels in {self.task.out} are not those of {self.task.source.name}; remove it")

    def written(self, size: int, decode: bool) -> Iterator[Written]:
        """In order."""
        n = len(BetonFile(self.task.out))
        for start in range(0, n, VERIFY_IMAGES):
            yield Written(str(self.task.out), range(start, min(start + VERIFY_IMAGES, n)), size, decode)

    def files(self) -> list[Path]:
        """The one file."""
        return [self.task.out]

    def close(self) -> None:
        """Keep what is there for another time."""
        if self._writer is not None:
            self._writer.close()


def write_text(path: Path, content: str) -> None:
    """A small file, whole or not there; RunError where the disk is full."""
    try:
        with whole_file(path) as partial:
            partial.write_text(content, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({write_fault(error)}); make room or give permission, then start again: "
            "it goes on where it was"
        ) from error


def _refuse_others(task: Task, found: Any) -> None:
    """UsageError where the settings that something was begun with are not those of now; it names the first."""
    if not isinstance(found, dict):
        return
    for name, value in task.settings.items():
        if found.get(name) != value:
            raise UsageError(
                f"{task.out} was begun with {name} {found.get(name)}, this command says {value}; "
                "set it as it was, or choose another place for the result"
            )


def _begun_settings(out: Path) -> Any:
    """Settings of a .beton that is not finished, from the first line of its journal (vadit.images.beton_writer)."""
    try:
        with open(f"{out}.partial.journal", "rb") as file:
            return json.loads(file.readline())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing there, or the writer will tell


def _forget(path: Path) -> None:
    """Drop a file from memory, where the system agrees, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

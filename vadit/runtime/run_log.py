"""What a run logs: TensorBoard events, and JSON objects, one a line.

log.jsonl has one per log point, evaluations.jsonl one per evaluation during training.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np

from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, write_fault
from vadit.runtime.files import open_log, whole_file
from vadit.runtime.json_files import Count, parse_json
from vadit.runtime.reading import read_lines

LOG, EVALUATIONS = "log.jsonl", "evaluations.jsonl"


class RunLog:
    """What one run logs, by its first process; all of it forgets what lies after a checkpoint that is resumed.

    A full disk is reported once a write and ends nothing: what could not be written is kept, and goes with the next.
    """

    def __init__(self, folder: Path, *, images_seen: int = 0) -> None:
        self._folder = folder
        self._files: dict[str, IO[str]] = {}
        self._events: _Events | None = None
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LOG, EVALUATIONS):
            _cut(folder / name, images_seen)
        self._files[LOG] = open_log(folder / LOG)
        self._events = _Events(folder / "tensorboard", images_seen + 1)

    def write(self, *, images: int, step: int, values: dict[str, float]) -> None:
        """One log point: `values` by name at so many images and optimizer steps."""
        if self._events is not None:
            self._events.scalars(values, images)
            self._put(LOG, {"images": images, "step": step, **values}, self._events)

    def write_evaluation(self, line: dict[str, Any], picture: np.ndarray | None = None) -> None:
        """One evaluation: images, step, numbers, and words; the picture (H, W, 3), uint8, for TensorBoard."""
        if self._events is None:
            return
        numbers = {f"evaluation/{name}": value for name, value in line.items() if isinstance(value, float)}
        self._events.scalars(numbers, line["images"])
        if picture is not None:
            self._events.picture("evaluation", picture, line["images"])
        self._put(EVALUATIONS, line, self._events)

    def _put(self, name: str, line: dict[str, Any], events: "_Events") -> None:
        try:
            file = self._files.get(name) or self._files.setdefault(name, open_log(self._folder / name))
            file.write(json.dumps(line) + "\n")
            file.flush()
            events.flush()
        except OSError as error:  # a full disk: Python keeps what could not be written, and a later flush goes on there
            _print_fault(error)

    def close(self) -> None:
        open_parts: list[Any] = [*self._files.values(), *([self._events] if self._events else [])]
        for part in open_parts:
            with contextlib.suppress(OSError):  # printed when the line was written
                part.close()
        self._files, self._events = {}, None


class _Events:
    """TensorBoard's events, written where they are made: its own writer does so in a thread that a full disk ends."""

    _MOST = 64 << 20  # bytes that wait for room, at most; what comes on top is lost

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        ending = f"{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / f"events.out.tfevents.{time.time():010.0f}.{ending}").open("xb", buffering=0)
        self._waiting = bytearray()
        self._records: Any = RecordWriter(SimpleNamespace(write=self._waiting.extend))
        self._event: Any = event_pb2
        self._add(file_version="brain.Event:2")
        # Points of an earlier start from there on are not shown any more.
        self._add(step=purge_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name at so many images."""
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(step=step, summary=scalar(name, value))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture uint8 (H, W, 3) at so many images."""
        from torch.utils.tensorboard.summary import image

        self._add(step=step, summary=image(name, pixels, dataformats="HWC"))

    def _add(self, **fields: Any) -> None:
        if len(self._waiting) > self._MOST:
            return
        self._records.write(self._event.Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        """Write what waits; OSError where not all of it could be, and it goes on there the next time."""
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


@dataclass(frozen=True)
class _Point:
    """What every line has."""

    images: Count


def _cut(path: Path, images_seen: int) -> None:
    """Leave the lines of a log up to so many images, where there is one; damaged ones go."""
    if path.is_symlink() or path.is_fifo():
        note(f"{path} is a symbolic link or a pipe, which no log goes into; a new file takes its place")
        path.unlink()
    if not path.exists():
        return
    kept, damaged = bytearray(), 0
    with path.open("rb") as file:
        for line in read_lines(file):
            try:
                if parse_json(line, _Point, path.name, allow_nan=True).images <= images_seen:
                    kept += line + b"\n"
            except RunError:
                damaged += 1
    if damaged:
        note(f"{damaged} damaged {'lines' if damaged > 1 else 'line'} of {path} (by a kill, or a power cut) left out")
    if len(kept) == path.stat().st_size:  # of what is there, parts were left out or none
        return
    try:
        with whole_file(path) as partial:
            partial.write_bytes(kept)
    except OSError as error:
        _print_fault(error)


def _print_fault(error: OSError) -> None:
    note(f"the run's log could not be written ({write_fault(error)})", "bold red")

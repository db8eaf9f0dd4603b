"""One save under way: each process writes its part in a thread, the main one publishes when all parts are there.

A part is one safetensors file per network, written, hashed on the way and flushed, and then `part-RANK.json` with
sizes and hashes: its appearance tells the main process, through the file system that all share, that the part is
whole. No collective is called here, so training goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vadit.runtime import distributed

CHUNK = 1 << 24
"""Bytes that are written and hashed in one go."""
POLL_S = 0.05
MANIFEST = "manifest.json"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be."""

    name: str
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]

    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class HostCopies:
    """Memory on the host that is used again at every save; pinned for tensors of a GPU, to copy at full speed."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, file: TensorFile) -> TensorFile:
        """The same file over copies of its tensors. Waits until they are made."""
        copies = {}
        for name, tensor in file.tensors.items():
            key = f"{file.name}:{name}"
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = self._buffers[key] = _host_memory(tensor)
            copies[name] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in file.tensors.values()):
            torch.cuda.current_stream().synchronize()
        return TensorFile(file.name, copies, file.metadata)


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError:  # the machine gives no more pinned memory; other memory is slower, and serves
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class Saving:
    """One process's share in writing the checkpoint `final`; all processes make one with the same `token`.

    state: what the main process adds, by file name; needed: bytes of all processes' parts. published: called there, in
    the thread, once `final` exists; failed: called in the thread of a process that could not do its share.
    """

    def __init__(
        self,
        final: Path,
        files: list[TensorFile],
        *,
        token: str,
        state: Mapping[str, str],
        published: Callable[[], None],
        failed: Callable[[Exception], None],
        needed: int,
        timeout_s: float,
    ) -> None:
        self.final = final
        self.partial = final.with_name(final.name + ".partial")
        self.fault: Exception | None = None
        self.seconds = 0.0
        self.written = threading.Event()
        """Set once this process's part is on disk, or has failed."""
        self.cancelled = threading.Event()
        """Set where another process has failed: the main one need not wait for its part."""
        self._files, self._token, self._state, self._timeout_s = files, token, state, timeout_s
        self._published, self._failed, self._needed = published, failed, needed
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def _run(self) -> None:
        start = time.perf_counter()
        try:
            self._write()
            self.written.set()
            if distributed.is_main():
                publish(self.partial, self.final, self._parts())
                self._published()
        except Exception as error:  # whatever goes wrong in a thread would be lost with it: the run must hear of it
            self.fault = error
            self._remove_own()
            if not self.cancelled.is_set():  # or else another process has failed, and tells
                self._failed(error)
        finally:
            self.seconds = time.perf_counter() - start
            self.written.set()

    def _write(self) -> None:
        self.partial.mkdir(parents=True, exist_ok=True)
        # Less what is there of processes that were faster.
        needed, free = self._needed - _size(self.partial), shutil.disk_usage(self.partial).free
        if free < needed:  # not to fill the disk first, on which the run's log may lie, too
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")
        written = {file.name: write_tensors(self.partial / file.name, file) for file in self._files}
        for name, text in self._state.items():
            written[name] = _write_text(self.partial / name, text)
        mark = self.partial / f"part-{distributed.rank():05d}.json"
        _write_text(mark.with_suffix(".new"), json.dumps({"token": self._token, "files": written}))
        os.replace(mark.with_suffix(".new"), mark)

    def _parts(self) -> list[Path]:
        """The marks of all processes' parts, once they are there."""
        marks = [self.partial / f"part-{rank:05d}.json" for rank in range(distributed.world_size())]
        end = time.monotonic() + self._timeout_s
        for mark in marks:
            while not (mark.exists() and json.loads(mark.read_text())["token"] == self._token):
                if self.cancelled.wait(POLL_S):
                    raise RuntimeError("another process could not write its part")
                if time.monotonic() > end:
                    raise RuntimeError(f"{mark.name} has not appeared in {self._timeout_s:.0f} s")
        return marks

    def _remove_own(self) -> None:
        """Give the disk back what a part that failed has taken."""
        if distributed.world_size() == 1:
            shutil.rmtree(self.partial, ignore_errors=True)
        for name in (*(file.name for file in self._files), *self._state):
            try:
                (self.partial / name).unlink(missing_ok=True)
            except OSError:  # what made it fail may stand in the way here, too; the next start clears up
                return


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, others of which may come and go."""
    total = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def publish(partial: Path, final: Path, marks: list[Path]) -> None:
    """Turn the marks into one manifest, flush, and rename: only now does the checkpoint exist."""
    manifest: dict[str, Any] = {}
    for mark in marks:
        manifest |= json.loads(mark.read_text())["files"]
        mark.unlink()
    _write_text(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
    _flush(partial)
    if final.exists():  # saved once more, after a rollback: never neither of the two
        replaced = final.with_name(final.name + ".replaced.partial")
        os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, final)
    _flush(final.parent)


def write_tensors(path: Path, file: TensorFile) -> dict[str, Any]:
    """Write a safetensors file through to the disk; its size and SHA-256, found on the way."""
    entries: dict[str, Any] = {"__metadata__": file.metadata}
    # The widest first: each then begins where its type may.
    ordered = sorted(file.tensors.items(), key=lambda item: -item[1].element_size())
    offset = 0
    for name, tensor in ordered:
        entries[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as out:
        for block in (len(text).to_bytes(8, "little"), text):
            digest.update(block)
            size += out.write(block)
        for _, tensor in ordered:
            row = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(row), CHUNK):
                part = row[start : start + CHUNK]
                digest.update(part)
                size += out.write(part)
        out.flush()
        os.fsync(out.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_text(path: Path, text: str) -> dict[str, Any]:
    content = text.encode()
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def advice(error: Exception) -> str:
    """What the user can do about a save that failed."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user the right to write there"
    if number == errno.ENOENT:
        return "leave its folder in place while the run goes on"
    return "free some disk space"

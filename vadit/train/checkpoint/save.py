"""One save under way: each process writes its part in a thread, the main one publishes when all parts are there.

A part is one safetensors file per network, written, flushed and hashed, and then `part-RANK.json` with
sizes and hashes: its appearance tells the main process, through the file system that all share, that the part is
whole. No collective is called here, so training goes on meanwhile.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vadit.runtime import distributed
from vadit.runtime.json_files import read_json
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.publish import TensorFile

POLL_S = 0.05


def host_copy(file: TensorFile, buffers: dict[str, torch.Tensor]) -> TensorFile:
    """The same file over copies of its tensors, once they are made.

    They go into `buffers`, host memory that is used again at every save: pinned for tensors of a GPU.
    """
    copies = {}
    for name, tensor in file.tensors.items():
        key = f"{file.name}:{name}"
        buffer = buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = buffers[key] = _host_memory(tensor)
        copies[name] = buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    if any(tensor.is_cuda for tensor in file.tensors.values()):
        torch.cuda.current_stream().synchronize()
    return TensorFile(file.name, copies, file.metadata)


def _host_memory(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    except RuntimeError:  # the machine gives no more pinned memory; other memory is slower, and serves
        return torch.empty(tensor.shape, dtype=tensor.dtype)


class Saving(threading.Thread):
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
        super().__init__(name="checkpoint", daemon=True)
        self.final, self.partial = final, final.with_name(final.name + ".partial")
        self.fault: Exception | None = None
        self.seconds = 0.0
        self.written = threading.Event()  # set once this process's part is on disk, or has failed
        self.cancelled = threading.Event()  # set where another process has failed: its part is not waited for
        self._files, self._token, self._state, self._timeout_s = files, token, state, timeout_s
        self._published, self._failed, self._needed = published, failed, needed
        self.start()

    def run(self) -> None:
        start = time.perf_counter()
        try:
            self._write()
            self.written.set()
            if distributed.is_main():
                publish.publish(self.partial, self.final, self._parts())
                self._published()
        except Exception as error:  # whatever goes wrong in a thread would be lost with it: the run must hear of it
            self.fault = error
            self._remove_own()
            if not self.cancelled.is_set():  # or else another process has failed, and reports it
                self._failed(error)
        finally:
            self.seconds = time.perf_counter() - start
            self.written.set()

    def _write(self) -> None:
        if self.partial.is_symlink():  # not ours: to write there would be to write where it leads
            self.partial.unlink(missing_ok=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        # Less what is there of processes that were faster.
        needed, free = self._needed - _size(self.partial), shutil.disk_usage(self.partial).free
        if free < needed:  # not to fill the disk first, on which the run's log may lie, too
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")
        written = {file.name: publish.write_tensors(self.partial / file.name, file) for file in self._files}
        for name, text in self._state.items():
            written[name] = publish.write_text(self.partial / name, text)
        mark = self.partial / f"part-{distributed.rank():05d}.json"
        publish.write_text(mark.with_suffix(".new"), json.dumps({"token": self._token, "files": written}))
        os.replace(mark.with_suffix(".new"), mark)

    def _parts(self) -> list[Path]:
        """The marks of all processes' parts, once they are there."""
        marks = [self.partial / f"part-{rank:05d}.json" for rank in range(distributed.world_size())]
        end = time.monotonic() + self._timeout_s
        for mark in marks:
            while not (mark.exists() and read_json(mark, publish.Part).token == self._token):
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


def advice(error: Exception) -> str:
    """What the user can do about a save that failed."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give this user the right to write there"
    if number == errno.ENOENT:
        return "leave its folder in place while the run goes on"
    return "free some disk space"

"""Reading: what passes (a busy server, too many open files) is waited for, here alone, and never taken for bad data."""

import contextlib
import errno
import functools
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TypeVar

from vadit.runtime.errors import RunError

PASSING = {
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EDEADLK),
    *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.ETIME, errno.ECOMM, errno.EPROTO, errno.ENOLCK),
    *(errno.ENOTCONN, errno.ESHUTDOWN, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOLINK),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EPIPE),
}
"""Faults of the machine, its disks and its network: they say nothing of what a file holds."""
WAITS_S = (0.1, 0.5, 2.0, 5.0, 10.0, 20.0)  # before each further try
MAX_WHOLE = 1 << 30  # bytes of a picture, or another file that is read whole
MAX_LINE = 1 << 20  # bytes of a log's line
MAX_OPEN = 256  # files that a reader keeps open, where the system lets a process have eight times as many

T = TypeVar("T")


class ReadFault(RunError):
    """Something cannot be read for now, whatever it holds: it ends the run and is never noted as bad data."""


def no_memory(what: str) -> ReadFault:
    """Where what was read cannot be held."""
    return ReadFault(f"there is no memory for {what}; free some, or use fewer workers")


def patiently(action: Callable[[], T], path: str | Path) -> T:
    """What reading `path` gives; a fault that passes is waited for, and becomes a ReadFault in the end."""
    for wait in (*WAITS_S, None):
        try:
            return action()
        except Exception as error:
            words = passing(error)
            if not words:
                raise
            if wait is None:
                raise ReadFault(
                    f"{path} cannot be read ({words}, {1 + len(WAITS_S)} times in {sum(WAITS_S):g} s); this is no "
                    "fault of the data but of the machine, its disk or its network: mend it, then run the same command"
                ) from error
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def passing(error: BaseException | None) -> str:
    """The system's words for a fault that passes, which libraries may have wrapped in errors of their own, or ""."""
    while error is not None:
        number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
        if isinstance(error, FileNotFoundError) and number is None:
            return "it is there but does not open"  # safetensors says so of every fault; see `load_tensors`
        text = str(error)
        for each in PASSING:
            if number == each or (number is None and os.strerror(each) in text):
                return os.strerror(each)
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def readable(what: object, remedy: str, kind: type[Exception] = RunError) -> Iterator[None]:
    """An OSError of the block as one sentence: that `what` cannot be read, why, and the remedy."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} cannot be read ({error.strerror or error}); {remedy}") from None


def read_file(path: str | Path, limit: int | None = None) -> bytes:
    """A file's content, or its first `limit` bytes; OSError where it is none (a pipe, a device) or cannot be read.

    OSError, too, for one above MAX_WHOLE that is wanted whole: a sparse one would fill the memory with zeros.
    """

    def read() -> bytes:
        # a pipe would wait for its other end for ever
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no regular file", str(path))
            if limit is None and status.st_size > MAX_WHOLE:
                raise OSError(errno.EFBIG, f"more than {MAX_WHOLE >> 30} GiB", str(path))
            return file.read(-1 if limit is None else limit)

    return patiently(read, path)


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a log but empty ones and the zeros of a power cut; one above MAX_LINE comes in parts."""
    return filter(None, (line.strip(b"\0\r\n ") for line in iter(lambda: file.readline(MAX_LINE), b"")))


@contextlib.contextmanager
def openable(path: str | Path) -> Iterator[str]:
    """A name of a file for libraries in Rust and C++, which call all that does not open missing: OSError comes first.

    They take UTF-8 alone; where the name is other bytes it is that of the open file.
    """
    with open(path, "rb") as file:
        name = os.fspath(path)
        yield name if name.encode(errors="ignore").decode() == name else f"/proc/self/fd/{file.fileno()}"


def read_all(descriptor: int, start: int, size: int) -> bytes:
    """Up to `size` bytes from `start` on; fewer only where the file ends."""
    data = os.pread(descriptor, size, start)
    while len(data) < size and (more := os.pread(descriptor, size - len(data), start + len(data))):
        data += more  # network file systems may hand out less at a time
    return data


class OpenFiles:
    """Files by their numbers, of which those that were read from last stay open; from any thread.

    They are read with pread and not mapped: where a file shrinks or a disk fails, that is an error and no signal that
    ends the process. `check(number, status)` may refuse a file whenever it is opened.
    """

    def __init__(
        self, paths: Sequence[str | Path], check: Callable[[int, os.stat_result], object] = lambda *_: None
    ) -> None:
        self._paths, self._check = paths, check
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = MAX_OPEN if allowed == resource.RLIM_INFINITY else min(MAX_OPEN, max(1, allowed // 8))
        self.opened = functools.lru_cache(room)(self._opened)

    def read(self, number: int, start: int, size: int) -> bytes:
        """Up to `size` bytes from `start` on, fewer only at the file's end; OSError or ReadFault."""
        return self.use(number, lambda descriptor: read_all(descriptor, start, size))

    def use(self, number: int, action: Callable[[int], T]) -> T:
        """What an action makes of a file's descriptor."""
        try:
            file = self.opened(number)  # held, or it might be closed, and its number be another's
            return action(file.descriptor)
        except OSError:
            return patiently(lambda: self._use_anew(number, action), self._paths[number])

    def _use_anew(self, number: int, action: Callable[[int], T]) -> T:
        self.opened.cache_clear()  # a stale one is opened again, and others have room
        file = self.opened(number)
        return action(file.descriptor)

    def _opened(self, number: int) -> "_OpenFile":
        file = _OpenFile(self._paths[number])
        self._check(number, os.fstat(file.descriptor))
        return file


class _OpenFile:
    """A file that closes when nobody uses it any more."""

    def __init__(self, path: str | Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

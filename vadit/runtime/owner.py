"""The owner of a folder: the process that writes there, and no other one meanwhile.

It holds a lock on the file `.owner` there, which says who it is. A POSIX lock belongs to a process: one that is killed
gives it back at once, though workers that it has forked live on (flock would be theirs, too). Where a file system has
no locks, or may keep them on each machine by itself, what `.owner` says decides: whether its process lives on this
machine, or whether the file's time, which an owner renews, still moves.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.files import kernel, no_link
from vadit.runtime.json_files import parse_json

NAME = ".owner"
BEAT_S = 10.0  # between two signs of life
SILENCE_S = 60.0  # after so long without one, an owner whose process cannot be seen from here is taken for dead
FORGOTTEN_S = 3600.0  # a sign of life so old needs no second look, however much the clocks of machines differ
SETTLE_S = 1.0  # without locks: how long one who claims the folder at the same moment may take to write it down
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: set[str] = set()  # files that this process holds: to open and close one again would give its lock away


@dataclass(frozen=True)
class Claim:
    """What an owner writes down."""

    host: str
    pid: int
    kernel: str  # of its machine, since that was started
    process: str  # what tells it from others with that number: its namespace, and when it began


@contextlib.contextmanager
def owned(folder: str | Path, remedy: str) -> Iterator[None]:
    """The main process owns `folder`, which is made where it is missing, for all until the block ends. Collective.

    A folder that was made for it and is empty at the end goes again. UsageError: another one owns it (number and host,
    and `remedy`), or it cannot be a folder of ours. RunError: the disk is full or fails.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        distributed.from_main(lambda: stack.enter_context(held(folder / NAME, folder, remedy)))
        yield


@contextlib.contextmanager
def held(file: Path, what: Path, remedy: str) -> Iterator[None]:
    """This process alone holds `file`, made for it, as the mark of who writes `what`. Raises as `owned` does."""
    pid, key, done = os.getpid(), os.path.realpath(file), threading.Event()
    made = [each for each in file.parents if not each.exists()]
    if key in _held:
        raise UsageError(f"{what} is in use by this process itself ({pid} on {socket.gethostname()}); {remedy}")
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = _claim(file, what, remedy)
        except OSError as error:
            kind = RunError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE) else UsageError
            raise kind(f"{what} cannot be written ({error.strerror or error}); {remedy}") from None
        _held.add(key)
        beats = threading.Thread(target=_beat, args=(handle, _read(handle)[0], done), name="owner", daemon=True)
        beats.start()
        try:
            yield
        finally:
            if os.getpid() == pid:  # not in a fork
                done.set()
                beats.join()
                with contextlib.suppress(OSError):
                    if _is_at(file, handle):  # not another's, who came after the folder was deleted
                        file.unlink()
                _held.remove(key)
                os.close(handle)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _beat(handle: int, claim: bytes, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(handle)
            if _read(handle)[0] != claim:  # this process, or its machine, stood still for too long
                note("another process has taken over what this one writes: it ends here", "bold red")
                os._exit(75)


def _claim(file: Path, what: Path, remedy: str) -> int:
    """The file, open and where possible locked, with our claim in it."""
    own = Claim(socket.gethostname(), os.getpid(), kernel(), _process(os.getpid()))
    text, silent = json.dumps(asdict(own)).encode(), b""
    while True:
        with contextlib.ExitStack() as stack:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, handle)
            locked, (found, seen) = _lock(handle), _read(handle)
            lives = locked is None or (found not in (b"", silent) and _lives(found, seen, bool(locked)))
            if lives is False:
                os.ftruncate(handle, 0)
                os.pwrite(handle, text, 0)
                time.sleep(0 if locked else SETTLE_S)
                if _is_at(file, handle) and (locked or _look(file)[0] == text):
                    stack.pop_all()
                    return handle
                continue
        if lives and not found:  # between its lock and its word
            time.sleep(BEAT_S / 100)
            found, _ = _look(file)
        owner = "process {0.pid} on {0.host}".format(_parsed(found))
        if lives is None:
            note(f"{what} was left by {owner}, or is in use; waiting {SILENCE_S:.0f} s for a sign of life")
            lives, silent = _moves(file), found
        if lives:
            raise UsageError(f"{what} is in use by {owner}; wait until it has ended, or {remedy}")


def _lock(handle: int) -> bool | None:
    """Whether the file is locked now; False where its file system has no locks, None where another process has it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _lives(found: bytes, seen: int, locked: bool) -> bool | None:
    """Whether the process of a claim is still there, its last sign of life at `seen` ns; None where only time tells."""
    claim = _parsed(found)
    if claim.kernel == kernel():
        if locked:
            return False  # it would have kept the lock from us
        if claim.process.partition(" ")[0] == _process(os.getpid()).partition(" ")[0]:
            return _process(claim.pid) == claim.process
    return False if time.time() - seen / 1e9 > FORGOTTEN_S else None


def _moves(file: Path) -> bool:
    """Whether the file's time or content changes while we watch."""
    end, first = time.monotonic() + SILENCE_S, _look(file)
    while time.monotonic() < end:
        time.sleep(BEAT_S / 10)
        if (now := _look(file)) != first:
            return now[0] != b""  # gone: its owner has ended
    return False


def _look(file: Path) -> tuple[bytes, int]:
    """Content and time of the file as a network file system's server has it, for it is opened anew."""
    with contextlib.suppress(FileNotFoundError), open(file, "rb", opener=no_link) as opened:
        return _read(opened.fileno())
    return b"", 0


def _read(handle: int) -> tuple[bytes, int]:
    return os.pread(handle, 1 << 16, 0).strip(b"\0"), os.fstat(handle).st_mtime_ns


def _is_at(file: Path, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle))
    return False


def _parsed(found: bytes) -> Claim:
    try:
        return parse_json(found, Claim, NAME)
    except RunError:
        return Claim("a machine unknown", 0, "", "")


def _process(pid: int) -> str:
    """The namespace that the number is of, and when the process began; empty where there is none that still runs."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "" if state in b"ZX" else f"{os.readlink('/proc/self/ns/pid')} {int(rest[18])}"
    except (OSError, ValueError, IndexError):
        return ""

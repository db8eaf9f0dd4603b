"""Files that are whole or not there, and folders that belong to one set of settings."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vadit.runtime.errors import RunError, UsageError, short, write_fault

SPACE = "free some space or choose another folder"
_PREFIX = ".vadit-partial-"
_swept: set[Path] = set()  # folders that this process has cleared of what others had left


@contextlib.contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Write to the yielded path: it takes the name `path` when the block ends, and vanishes where the block fails.

    It lies in a new folder beside `path`, of a name that nobody can know before, so that no link there is followed;
    one at `path` itself is replaced. Folders on the way are made. `flush`: through to the disk. What went wrong is
    raised as it is: `saved_file` says it in a sentence.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:
        _swept.add(path.parent)
        _sweep(path.parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX + kernel()[:8] + "-", dir=path.parent))
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        partial = folder / path.name
        yield partial
        if flush:
            flush_to_disk(partial)
        os.replace(partial, path)
        if flush:
            flush_to_disk(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def no_link(path: str | Path, flags: int) -> int:
    """An `opener` for `open` that follows no link."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def open_log(path: Path) -> IO[str]:
    """A log to append lines to, no link followed; a line that a killed process left half is ended first."""
    file = open(path, "a+", encoding="utf-8", opener=no_link)  # noqa: SIM115 (the caller closes it)
    if (size := file.tell()) and os.pread(file.fileno(), 1, size - 1) != b"\n":
        file.write("\n")
    return file


def flush_to_disk(path: Path) -> None:
    """Write a file, or what a folder lists, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not do so for folders
            raise
    finally:
        os.close(handle)


def kernel() -> str:
    """What tells a machine, since it was last started, from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _sweep(folder: Path) -> None:
    """Remove what killed processes have left of files that were to be whole: nobody has it locked any more.

    Locks of folders are known on their machine alone: what was made on another one goes after a day.
    """
    for left in folder.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # a second: its process may not have come to lock it yet
                enough_s = 1 if left.name.startswith(_PREFIX + kernel()[:8]) else 86400
                if time.time() - os.fstat(handle).st_mtime > enough_s:
                    shutil.rmtree(left)
            finally:
                os.close(handle)


@contextlib.contextmanager
def saved_file(path: Path, advice: str = SPACE, *, flush: bool = True) -> Iterator[Path]:
    """`whole_file` whose failure is one sentence: RunError with the path, the reason and what to do about it.

    torch and safetensors raise errors of their own for a full disk; those of vadit pass unchanged.
    """
    try:
        with whole_file(path, flush=flush) as partial:
            yield partial
    except (UsageError, RunError):
        raise
    except Exception as error:
        raise RunError(f"{path} cannot be written ({write_fault(error)}); {advice}") from error


def save_json(path: Path, values: Any, advice: str = SPACE) -> None:
    """Write JSON as a `saved_file`."""
    with saved_file(path, advice) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def reference(path: str | Path, folder: str | Path) -> str:
    """`path` as a file in `folder` names it: relative to it where both have one parent, to be moved with it."""
    target, place = Path(path).resolve(), Path(folder).resolve()
    return os.path.relpath(target, place) if target.is_relative_to(place.parent) else str(target)


def referred(name: str, folder: str | Path) -> str:
    """The path that `reference` gave this name."""
    return os.path.normpath(Path(folder).resolve() / name)


def check_output(setting: str, path: str | Path, *, folder: bool = True) -> None:
    """UsageError where a folder, or a file, cannot be made at `path`: before any work begins, and nothing is made."""
    if not os.fspath(path):
        raise UsageError(f"{setting} is empty; name a place to write to")
    place = Path(path) if folder else Path(path).parent
    try:
        if not folder and Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):  # permissions alone do not tell: a read-only disk, /proc
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        ours = {errno.ENOTDIR: "it is a file", errno.ENOENT: "it takes no files"}  # the words for ours are misleading
        fault = ours.get(error.errno or 0, error.strerror)
        where = "" if place == Path(path) or (not folder and error.errno == errno.EISDIR) else f"{place}: "
        raise UsageError(f"{setting} {path} cannot be written ({where}{fault}); choose another place") from None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def refuse_other_settings(
    place: Path, what: str, old: Any, new: Mapping[str, Any], remedy: str, *, automatic: Collection[str] = ()
) -> None:
    """UsageError where `place` holds `what` ("a run", "samples") that was made with other settings; names the first.

    old: what was kept. new: the settings of now. Both are compared as JSON holds them, None as what is missing.
    automatic: settings that were left at auto.
    """
    if not isinstance(old, dict):
        raise RunError(f"{place} does not say how its {what} came about (damaged); delete it or choose another folder")
    before, now = (flat(json.loads(json.dumps(each))) for each in (old, new))
    for name in (*before, *now):
        if (was := before.get(name)) != (found := now.get(name)):
            says = "auto takes here" if name in automatic else "this command says"
            raise UsageError(f"{place} holds {what} made with {name} {short(was)}, {says} {short(found)}; {remedy}")

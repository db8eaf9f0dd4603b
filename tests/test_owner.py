"""One process at a time writes a folder, and files in it are whole, whatever was killed there or lies in the way."""

import errno
import fcntl
import json
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from vadit import cli
from vadit.runtime import files, owner
from vadit.runtime.errors import UsageError
from vadit.runtime.files import whole_file
from vadit.runtime.owner import NAME, Claim, owned


@pytest.fixture(params=["locks", errno.ENOLCK, errno.EOPNOTSUPP])
def locks(request: pytest.FixtureRequest, monkeypatch) -> bool:
    """Whether the file system has locks."""
    monkeypatch.setattr(owner, "SETTLE_S", 0.01)
    if request.param != "locks":

        def lockf(*_: int) -> None:
            raise OSError(request.param, "no locks here")

        monkeypatch.setattr(fcntl, "lockf", lockf)
    return bool(request.param == "locks")


@contextmanager
def another(folder: Path) -> Iterator[int]:
    """Another process that owns `folder` and has a worker of its own, which outlives it; its id."""
    ready, ours = os.pipe()
    if not (pid := os.fork()):
        with owned(folder, "name another"):
            if not (worker := os.fork()):
                time.sleep(60)
                os._exit(0)
            os.write(ours, f"{worker} ".encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(ready, 100))
    try:
        yield pid
    finally:
        os.kill(worker, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(ours)


def test_an_owner_is_named_and_a_killed_one_is_none(locks: bool, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with another(folder) as pid:
        before = (folder / NAME).read_bytes()
        for _ in range(2):
            with pytest.raises(UsageError, match=f"in use by process {pid} on {socket.gethostname()}; .*name another$"):
                owned(folder, "name another").__enter__()
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [(NAME, before)]
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with owned(folder, ""), pytest.raises(UsageError, match="in use by this process itself"):
            owned(folder, "").__enter__()
        assert list(folder.iterdir()) == []
    with owned(tmp_path / "b" / "c", ""):
        assert json.loads((tmp_path / "b" / "c" / NAME).read_text())["pid"] == os.getpid()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a"], "what was made for it goes again"


OTHER = Claim("node7", 4711, "another kernel", "pid:[1] 1")


@pytest.mark.parametrize("claim", [b"", b"\0\0\0", b"{", b'{"pid": {}}', asdict(OTHER), "here"])
def test_a_process_out_of_sight_lives_as_long_as_its_file_moves(
    claim: bytes | dict[str, object] | str, locks: bool, tmp_path: Path, monkeypatch
) -> None:
    """On another machine, in another container, or of a damaged claim."""
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    if claim == "here":  # on this machine, in another container
        claim = asdict(replace(OTHER, kernel=files.kernel()))
    file = tmp_path / NAME
    file.write_bytes(claim if isinstance(claim, bytes) else json.dumps(claim).encode())
    in_sight = claim in (b"", b"\0\0\0") or (locks and isinstance(claim, dict) and claim["kernel"] == files.kernel())
    handle, done = os.open(file, os.O_RDWR), threading.Event()
    beats = threading.Thread(target=owner._beat, args=(handle, owner._read(handle)[0], done))
    beats.start()
    if not in_sight:
        with pytest.raises(UsageError, match=r"process (4711 on node7|0 on a machine unknown)"):
            owned(tmp_path, "").__enter__()
    done.set()
    beats.join()
    os.close(handle)
    monkeypatch.setattr(owner, "SILENCE_S", 0.2)
    with owned(tmp_path, ""):
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_who_was_taken_over_writes_no_more(tmp_path: Path, monkeypatch) -> None:
    """It stood still for longer than the others waited."""
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    monkeypatch.setattr(os, "_exit", codes.put)
    with owned(tmp_path, ""):
        (tmp_path / NAME).write_text("another's")
        assert codes.get(timeout=60) == 75


def test_what_can_be_no_folder_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / NAME).symlink_to(tmp_path / "victim")
    for place in ("file/run", "link"):
        with pytest.raises(UsageError, match=f"{place} cannot be written .*; name another$"):
            owned(tmp_path / place, "name another").__enter__()
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "command",
    ["train lightningdit-b-debug --run.out", "train vavae-f16d32-dinov2-debug --run.out", "demo --out"],
)
def test_commands_leave_anothers_folder_alone(command: str, tmp_path: Path, capsys) -> None:
    partial = tmp_path / "checkpoints" / "step-00000001.partial"
    partial.mkdir(parents=True)
    with owned(tmp_path, ""):
        before = sorted(tmp_path.rglob("*"))
        assert cli.main([*command.split(), str(tmp_path)]) == 2
        assert f"error: {tmp_path} is in use" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_whole_files_replace_links_and_follow_none(tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("mine")
    for link in (target, tmp_path / "report.html.partial"):
        link.symlink_to(victim)
    with whole_file(target) as partial:
        assert not partial.exists() and partial.parent.parent == tmp_path
        partial.write_text("new")
    assert (target.read_text(), target.is_symlink(), victim.read_text()) == ("new", False, "mine")
    with pytest.raises(RuntimeError), whole_file(target) as partial:
        partial.write_text("half")
        raise RuntimeError
    pytest.raises(OSError, files.open_log, tmp_path / "report.html.partial").match("symbolic")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert target.read_text() == "new" and names == ["report.html", "report.html.partial", "victim"]


def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_swept", set())
    old = [tmp_path / f"{files._PREFIX}{start}-x" for start in (files.kernel()[:8], "anothers")]
    with whole_file(tmp_path / "slow") as slow:
        slow.touch()
        for left in (*old, slow.parent):
            left.mkdir(exist_ok=True)
            (left / "half").touch()
            os.utime(left, (time.time() - 5,) * 2)
        files._swept.clear()
        with whole_file(tmp_path / "other") as other:
            other.touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([old[1].name, "other", "slow"])

"""How the watchdogs of a run's processes talk: TCP connections to rank 0, one line of JSON a message.

To rank 0: {token, rank, ...} with what a `Standing` says, at an end {token, rank, done: true} or {..., failed:
sentence}. From rank 0: {step, doing} as a sign of life, {ask: true} for an answer at once, {verdict: sentence},
{done: true}.
Connections that break are made anew: a link that is down for a while does no harm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CONNECT_S = 2.0
ASK_EVERY_S = 1.0
"""Pause between two messages once something is wrong."""

TELL_UNREACHED_S = 60.0
MAX_LINE = 1 << 16


@dataclass
class Standing:
    """What is known of a process."""

    rank: int
    step: int = 0
    """The last step told."""
    doing: str = "starting"
    idle_s: float = 0.0
    """Time that its main thread has told nothing, by its own clock."""
    where: str = ""
    """Where its main thread stands, once it has been idle for a while."""
    waits: bool = False
    """Whether that is in a collective: it waits for the others."""
    accuses: bool = False
    """Whether a collective has failed there, as it does where another process dies."""
    silent_s: float = 0.0
    """Time since its own thread was heard."""
    gone_s: float | None = None
    """Time since its connection closed without an end in order: the process has died."""
    done: bool = False
    """Left in good order."""


_TOLD = ("step", "doing", "idle_s", "where", "waits", "accuses")


class Peers:
    """The others, as seen from this process."""

    def __init__(self) -> None:
        self.verdict: str | None = None
        """Why the run ends, once another process says so."""
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)

    def wake(self) -> None:
        """End the pause of `round`, from another thread."""
        with contextlib.suppress(OSError):  # closed: nobody sleeps there any more
            self._wake.send(b"!")

    def round(self, own: Standing, wait_s: float, passed_s: float) -> None:
        """Tell and hear, for `wait_s` or until there is something to judge; `passed_s` since the last round."""
        raise NotImplementedError

    def standings(self, own: Standing) -> list[Standing]:
        """What is known of every process."""
        raise NotImplementedError

    def tell(self, verdict: str) -> None:
        """Tell the others why the run ends."""

    def leave(self, failure: str | None) -> None:
        """Tell that this process ends, in good order or not, and close; the last call, from any thread."""
        self._woken.close()
        self._wake.close()

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)


class Hub(Peers):
    """Rank 0's side: hears of all."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.token = secrets.token_hex(8)
        self.port = 0
        self._own = Standing(0)
        self._known = {rank: Standing(rank) for rank in range(1, world_size)}
        self._lines: dict[socket.socket, _Lines] = {}
        self._rank: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        _allow_files(world_size)
        self._listener = _listen() if world_size > 1 else None
        if self._listener is not None:
            self.port = self._listener.getsockname()[1]
            self._selector.register(self._listener, selectors.EVENT_READ)

    def round(self, own: Standing, wait_s: float, passed_s: float) -> None:
        self._own = own
        for each in self._known.values():
            each.silent_s += passed_s
            if each.gone_s is not None:
                each.gone_s += passed_s
        if own.accuses or any(each.gone_s is not None or each.accuses for each in self._known.values()):
            wait_s = min(wait_s, ASK_EVERY_S)
            self._send_all({"ask": True})
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                if key.fileobj is self._woken:
                    self._drain()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif self._hear(key.fileobj):  # type: ignore[arg-type]
                    return

    def standings(self, own: Standing) -> list[Standing]:
        return [own, *self._known.values()]

    def tell(self, verdict: str) -> None:
        self._send_all({"verdict": verdict})

    def leave(self, failure: str | None) -> None:
        self._send_all({"done": True} if failure is None else {"verdict": f"rank 0 failed: {failure}"})
        for connection in list(self._lines):
            _close(connection)
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        super().leave(failure)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone before it was met, or too many open files
            time.sleep(0.1)
            return
        connection.setblocking(False)
        self._lines[connection] = _Lines()
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> bool:
        """Take what has come in; whether it needs judging at once."""
        try:
            data = connection.recv(MAX_LINE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            return self._drop(connection)
        urgent = False
        for message in self._lines[connection].feed(data):
            if message.get("token") != self.token or message.get("rank") not in self._known:
                return self._drop(connection)  # a port scanner, or a process of another run
            each = self._known[message["rank"]]
            self._rank[connection] = each.rank
            each.silent_s, each.gone_s = 0.0, None
            each.done = bool(message.get("done"))
            for name in _TOLD:
                setattr(each, name, message.get(name, getattr(each, name)))
            if "failed" in message:
                self.verdict = f"rank {each.rank} failed: {message['failed']}"
                each.done = True
            urgent |= "failed" in message or each.accuses
            _send(connection, {"step": self._own.step, "doing": self._own.doing})
        return urgent

    def _drop(self, connection: socket.socket) -> bool:
        """Forget a connection; whether a process has gone with it."""
        self._selector.unregister(connection)
        connection.close()
        del self._lines[connection]
        rank = self._rank.pop(connection, None)
        if rank is None or rank in self._rank.values() or self._known[rank].done:
            return False  # it has another connection, or had said that it leaves
        self._known[rank].gone_s = 0.0
        return True

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in self._rank:
            _send(connection, message)


class Link(Peers):
    """The side of any other rank: hears of rank 0 only."""

    def __init__(self, rank: int, *, address: str, port: int, token: str) -> None:
        super().__init__()
        self._address = (address, port)
        self._greeting = {"token": token, "rank": rank}
        self._zero = Standing(0)
        self._met = False
        self._connection: socket.socket | None = None
        self._lines = _Lines()

    def round(self, own: Standing, wait_s: float, passed_s: float) -> None:
        self._zero.silent_s += passed_s
        if self._zero.gone_s is not None:
            self._zero.gone_s += passed_s
        if self._connection is None and not self._zero.done:
            self._connect()
        told = dataclasses.asdict(own)
        if self._connection is not None and not _send(
            self._connection, self._greeting | {name: told[name] for name in _TOLD}
        ):
            self._lose()
        wait_s = min(wait_s, ASK_EVERY_S) if own.accuses or self._connection is None else wait_s
        end = time.monotonic() + wait_s
        while (left := end - time.monotonic()) > 0:
            with selectors.DefaultSelector() as selector:
                for source in (self._woken, self._connection):
                    if source is not None:
                        selector.register(source, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(left)]
            if self._woken in ready:
                self._drain()
                return
            if ready and self._hear():
                return

    def standings(self, own: Standing) -> list[Standing]:
        return [self._zero, dataclasses.replace(own)]

    def leave(self, failure: str | None) -> None:
        if self._connection is not None:
            _send(self._connection, self._greeting | ({"done": True} if failure is None else {"failed": failure}))
            _close(self._connection)
        super().leave(failure)

    def _connect(self) -> None:
        try:
            self._connection = socket.create_connection(self._address, timeout=CONNECT_S)
        except OSError as error:
            # Nobody listens any more: the process is gone. A time-out or a lost route does not say so.
            if not (self._met and isinstance(error, ConnectionRefusedError)):
                self._zero.gone_s = None
            if not self._met and self._zero.silent_s > TELL_UNREACHED_S:
                self._met = True  # told once
                print(
                    f"[rank {self._greeting['rank']}] the watchdog cannot reach rank 0 at {self._address[0]} port "
                    f"{self._address[1]} ({error}); training goes on, but a hang will be told less well",
                    file=sys.__stderr__,
                    flush=True,
                )
            return
        self._connection.setblocking(False)
        self._lines = _Lines()

    def _hear(self) -> bool:
        """Take what has come in; whether there is something to do at once."""
        assert self._connection is not None
        try:
            data = self._connection.recv(MAX_LINE)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._lose()
            return True
        urgent = False
        for message in self._lines.feed(data):
            self._met = True
            self._zero.silent_s, self._zero.gone_s = 0.0, None
            self._zero.done |= bool(message.get("done"))
            self._zero.step = message.get("step", self._zero.step)
            self._zero.doing = message.get("doing", self._zero.doing)
            self.verdict = message.get("verdict", self.verdict)
            urgent |= not message.keys() <= {"step", "doing"}
        return urgent

    def _lose(self) -> None:
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        if not self._zero.done and self._zero.gone_s is None:
            self._zero.gone_s = 0.0


class _Lines:
    """Bytes of a connection, taken apart into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[:MAX_LINE]
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            yield message if isinstance(message, dict) else {}


def _listen() -> socket.socket:
    """A port of the system's choice, on all interfaces, as the rendezvous of the process group has one."""
    listener = None
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 compiled in but switched off
            listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    listener = listener or socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)
    return listener


def _allow_files(more: int) -> None:
    """A connection per process: the usual limit of 1,024 open files would be used up by them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard < 0 else min(wanted, hard), hard))


def _send(connection: socket.socket, message: dict[str, Any]) -> bool:
    """Whether the connection still stands; a buffer that is full for long belongs to one that hears nothing."""
    try:
        connection.send(json.dumps(message).encode() + b"\n")
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    connection.close()


def master_address() -> str:
    """The host of rank 0, as the launcher has told it."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")

"""Ends a run whose processes wait for one that is dead or stuck, and says which one.

A collective that waits for a lost process cannot be interrupted, and when its own timeout ends it, nobody knows for
whom it waited (`distributed.set_collective_timeout` moves that timeout out of the way). So each process has two threads
beside the main one. The messenger writes into the process group's store how this process gets on, and reads how others
do; a store that is out of reach may hold it up for ever. The watchdog judges by what the messenger last brought, and is
never held up. Rank 0 knows of all and ends the run for all once no process gets on any more; the others end it where
rank 0, which keeps the store, or a process of their own machine is lost.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import resource
import secrets
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch.distributed as dist

from vadit.runtime import distributed, launcher
from vadit.runtime.errors import RunError, UsageError, leave_for_torchrun, one_line
from vadit.runtime.files import kernel
from vadit.runtime.json_files import parse_json

HANG_CODE = 75  # exit code of a process that its watchdog has ended (EX_TEMPFAIL: the same command may well succeed)
GRACE_S = 10.0  # time that a process has to end by itself after another one has failed or gone
GIL_S = 60.0  # what the thread that needs no GIL waits longer than the one that can say more
HURRY_S = 0.2  # pause between two rounds once something is wrong
STORE_S = 60.0  # timeout of the store's calls, as far as they keep to it
STDERR = 2
MAX_BYTES = 10_000  # of a message; what is longer is none of ours
MAX_NAMED = 8  # processes that a message describes one by one
AGAIN = "the same command goes on from the last checkpoint"
_COLLECTIVES = tuple(f"{os.sep}{name}{os.sep}" for name in (f"torch{os.sep}distributed", "deepspeed"))
_READERS = tuple(f"{os.sep}vadit{os.sep}{name}" for name in (f"train{os.sep}", f"runtime{os.sep}distributed.py"))
"""Where the main thread stands still for numbers of the device alone: it loads, saves and computes in other files."""


@dataclass
class Standing:
    """What is known of a process; the first part as it reports it, the last two as the reader finds them."""

    rank: int
    step: int = 0
    doing: str = "starting"
    idle_s: float = 0.0  # time for which its main thread has reported nothing, by its own clock
    where: str = ""  # where its main thread stands, once it has been idle for a while
    waits: bool = False  # whether that is in a collective: it waits for the others
    accuses: bool = False  # whether a collective has failed there, as it does where another process dies
    done: bool = False  # whether it has left
    silent_s: float = 0.0  # time since its own threads were heard
    gone_s: float | None = None  # time since its process was found to have ended

    @classmethod
    def parse(cls, rank: int, message: bytes) -> "Standing | None":
        """Out of a message; None where it makes no sense, which counts as silence."""
        try:
            found = parse_json(message[:MAX_BYTES], cls, "a message", allow_nan=True)
            return dataclasses.replace(found, rank=rank, idle_s=max(0.0, found.idle_s))  # 0 for NaN, too
        except Exception:  # whatever it is: no message may end the watchdog
            return None


class Watchdog:
    """Guards the training loop of this process; `timeout_s` 0 guards nothing. Entering it is collective.

        with Watchdog(spec.hang_timeout_s) as watchdog:
            watchdog.beat(step)                     # once per step: an assignment
            watchdog.beat(step, doing="saving")     # before what takes long

    A process alone is guarded against its own hang. Time in which this process was itself stopped (Ctrl-Z, a laptop's
    sleep) does not count, up to `timeout_s` and a minute where there are several processes. On leaving, RunError: this
    process failed in a collective because another one has failed or gone, which it names.
    """

    def __init__(self, timeout_s: float, *, grace_s: float = GRACE_S) -> None:
        self.timeout_s = timeout_s
        self.grace_s = min(grace_s, timeout_s)
        # Rank 0 reads 500 messages a second at most, each for about 10 us.
        self.interval_s = min(max(timeout_s / 60, 0.2), max(1.0, distributed.world_size() / 500), 30.0)
        self.quiet_s = 3 * self.interval_s + 1  # silence that a process whose threads run does not keep
        self.position = (0, "starting")
        self._own = Standing(distributed.rank())
        self._messenger: Messenger | None = None
        self._hurry, self._judged = threading.Event(), threading.Event()
        self._leaving, self._left = threading.Event(), threading.Event()
        self._verdict = ""
        self._main = 0
        self._threads: list[threading.Thread] = []

    def beat(self, step: int, doing: str = "training") -> None:
        """Report that the main thread gets on: `step` steps are done, `doing` is what comes now."""
        self.position = (step, doing)

    def __enter__(self) -> "Watchdog":
        if self.timeout_s:
            self._main = threading.get_ident()
            works: dict[str, Callable[[], None]] = {"watchdog": self._watch}
            if distributed.world_size() > 1:
                self._messenger = Messenger(self._own)
                works["messenger"] = self._talk
            for name, work in works.items():
                self._threads.append(threading.Thread(target=self._or_end, args=(work,), name=name, daemon=True))
                self._threads[-1].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.timeout_s:
            return
        if error is not None and self._messenger is not None and _speaks_of_another(error):
            self._own.accuses = True
            self._hurry.set()
            self._judged.wait(self.grace_s + self.quiet_s)  # the others may know who it was
        self._leaving.set()
        self._hurry.set()
        self._threads[0].join()
        if self._messenger is not None:
            # Stopped is of the loop: all processes leave, each in its time.
            in_order = error is None or isinstance(error, SystemExit) or type(error).__name__ == "Stopped"
            self._messenger.publish("" if in_order else f"rank {self._own.rank} failed: {_sentence(error)}")
            self._own.done = True
            if distributed.is_main():  # the store goes with this process: let all read it first
                self._messenger.wait(self.grace_s if in_order else self.quiet_s)
            self._left.set()
            self._threads[1].join(self.quiet_s)  # the store may be out of reach
            self._messenger.close()
        if self._own.accuses and self._verdict:
            raise RunError(f"{self._verdict}; {AGAIN}") from error

    def _or_end(self, work: Callable[[], None]) -> None:
        """A thread's work; should it fail the run ends, for nobody would guard it."""
        try:
            work()
        except BaseException as error:
            try:
                traceback.print_exc(file=sys.__stderr__)
            finally:
                self._exit(f"the watchdog itself has failed ({type(error).__name__}: {error})")

    def _pause(self) -> None:
        if self._hurry.wait(self.interval_s):
            time.sleep(HURRY_S)

    def _talk(self) -> None:
        assert self._messenger is not None
        while not self._left.is_set():
            self._messenger.exchange()
            self._pause()
        self._messenger.exchange()

    def _watch(self) -> None:
        own, seen, before = self._own, None, time.monotonic()
        try:
            while not self._leaving.is_set():
                if self._messenger is not None:
                    # A main thread that never lets go of the GIL holds this one up, too: a thread of C ends us then.
                    faulthandler.dump_traceback_later(self.timeout_s + GIL_S, exit=True, file=STDERR)
                now = time.monotonic()
                passed_s = min(now - before, 2 * self.interval_s + 3)  # more: this process was stopped meanwhile
                before, beat = now, self.position
                own.idle_s = own.idle_s + passed_s if beat is seen else 0.0
                (own.step, own.doing), seen = beat, beat
                own.where, own.waits = _whereabouts(self._main) if own.idle_s > self.timeout_s / 4 else ("", False)
                others = [] if self._messenger is None else self._messenger.standings(passed_s)
                known = "" if self._messenger is None else self._messenger.verdict
                if verdict := known or judge([own, *others], self.timeout_s, self.grace_s, self.quiet_s):
                    self._end(verdict)
                self._pause()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, verdict: str) -> None:
        """Publish a verdict; end the process, unless its main thread is about to do so by itself."""
        self._verdict = verdict
        if self._messenger is not None:
            self._messenger.publish(verdict)
        self._hurry.set()
        self._judged.set()
        # One that has waited all the time for nothing will not.
        if not self._leaving.wait(0.0 if self._own.idle_s >= self.timeout_s else self.grace_s):
            self._exit(verdict)

    def _exit(self, verdict: str) -> None:
        who = f"[rank {self._own.rank}] " if self._messenger is not None else ""
        stream, verdict = sys.__stderr__, one_line(verdict)  # no lock of a progress bar holds that stream up
        try:
            print(f"\n{who}error: {verdict}; the threads of this process stand here:", file=stream, flush=True)
            faulthandler.dump_traceback(file=STDERR, all_threads=True)
            print(f"{who}error: {verdict}; {AGAIN}", file=stream, flush=True)  # once more, where it is seen
            leave_for_torchrun(f"error: {verdict}")
            faulthandler.cancel_dump_traceback_later()
            if self._messenger is not None:
                self._messenger.publish(verdict)
                time.sleep(self.quiet_s)  # the store goes with rank 0: let all read the verdict
        finally:
            os._exit(HANG_CODE)


def judge(standings: list[Standing], timeout_s: float, grace_s: float, quiet_s: float) -> str:
    """Who holds the run up, in a sentence; empty while there is somebody who gets on.

    The first standing is the judge's own. Rank 0 knows of all processes; who knows of a few says only who is lost.
    """
    present = [each for each in standings if not each.done]
    accused, of_all = any(each.accuses for each in present), standings[0].rank == 0
    gone = [each for each in present if each.gone_s is not None]
    heard = [each for each in present if each.gone_s is None]
    silent = [each for each in heard if each.silent_s >= (quiet_s if accused else timeout_s / 2)]
    living = [each for each in heard if each not in silent]
    idle_s = min((each.idle_s for each in living), default=timeout_s)
    stalled = idle_s >= timeout_s
    newest = max((each.step for each in living), default=0)
    behind = [each for each in living if each.step < newest]
    busy = [each for each in living if not each.waits]
    some = busy if len(busy) < len(living) or len(living) == 1 else []
    gone_s = max((each.gone_s or 0.0 for each in gone), default=0.0)
    ended = gone_s >= 1.0 if accused else min(gone_s, idle_s) >= grace_s
    lost = "{who} has not been heard of for {silent_s:.0f} s; {last}"
    cases = [
        # whether it is so, whom it names, how the sentence begins, what it says of each
        (ended, gone, "", "{who} is gone (its process has ended); {last}"),
        (accused and not gone, silent, "", lost),
        (stalled, gone + silent, "", lost),
        (stalled and of_all, behind, "", f"{{who}} lags behind step {newest}; {{last}}, {{idle_s:.0f}} s ago{{where}}"),
        (stalled and of_all, some, "", "{who} does not get on; {last}, {idle_s:.0f} s ago{where}"),
        (stalled and of_all, living, "nobody gets on; ", "{who}: {last}, {idle_s:.0f} s ago{where}"),
    ]
    return next((begin + _list(named, sentence) for so, named, begin, sentence in cases if so and named), "")


def _list(standings: list[Standing], sentence: str) -> str:
    """`sentence` filled in for each, for so many at most."""
    texts = [
        sentence.format(
            who=f"rank {each.rank}",
            last=f"the last step it reported is {each.step} ({each.doing})",
            silent_s=each.silent_s,
            idle_s=each.idle_s,
            where=each.where and f", in {each.where}",
        )
        for each in standings[:MAX_NAMED]
    ]
    more = len(standings) - MAX_NAMED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


class Messenger:
    """Exchanges standings and the verdict by the process group's store, over a client of its own; collective to make.

    Keys are watchdog/NONCE/RANK and watchdog/NONCE/verdict, with a nonce of this start: torchrun may keep one store
    over its restarts. Rank 0 reads all processes, the others rank 0 and those of their machine, whose end they see.
    """

    def __init__(self, own: Standing) -> None:
        self._own = own
        self.verdict = ""  # why the run ends: the first sentence that any process has published
        ranks, main = range(distributed.world_size()), distributed.is_main()
        nonce, machine = secrets.token_hex(8), _machine()
        if main:
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # the store has one more connection per process
        self._store: dist.Store | None = _connect()
        if main:  # who asks for a missing key waits
            for name in (*ranks, "verdict"):
                self._store.set(f"watchdog/{nonce}/{name}", "")
        found = distributed.all_gathered((nonce, machine, os.getpid()))
        self._prefix = f"watchdog/{found[0][0]}/"
        self._near: dict[int, int] = {}  # rank by handle, of the processes of this machine
        self._ends = select.poll()
        for rank in ranks:
            if rank != own.rank and found[rank][1] == machine:
                with contextlib.suppress(OSError, AttributeError):  # a system without such handles
                    handle = os.pidfd_open(found[rank][2])
                    self._ends.register(handle, select.POLLIN)
                    self._near[handle] = rank
        others = set(ranks) if main else {0, *self._near.values()}
        self._known = {rank: Standing(rank) for rank in sorted(others - {own.rank})}
        self._messages: dict[int, bytes] = {}
        self._heard: dict[int, bytes] = {}
        self._number = 0
        self._closed = False  # whether nobody listens any more where rank 0 kept the store

    def publish(self, verdict: str) -> None:
        """Let all know why the run ends, unless that is known."""
        self.verdict = self.verdict or verdict

    def exchange(self) -> None:
        """Write and read once; blocks while the store is out of reach."""
        try:
            store = self._store = self._store or _connect()
            self._number += 1
            message = dataclasses.asdict(self._own) | {"number": self._number}
            store.set(f"{self._prefix}{self._own.rank}", json.dumps(message))
            if self.verdict:  # of several the first one stays
                store.compare_set(f"{self._prefix}verdict", "", self.verdict)
            *messages, verdict = store.multi_get([f"{self._prefix}{name}" for name in (*self._known, "verdict")])
            self._messages = dict(zip(self._known, messages, strict=True))
            self.verdict = verdict[:MAX_BYTES].decode(errors="replace") or self.verdict
            self._closed = False
        except dist.DistStoreError:
            pass  # it answers late
        except (dist.DistNetworkError, OSError) as error:
            self._store = None
            self._closed |= isinstance(error, ConnectionRefusedError)

    def standings(self, passed_s: float) -> list[Standing]:
        """What is known of the others, `passed_s` after the last call."""
        ended = {self._near[handle] for handle, _ in self._ends.poll(0)} | ({0} if self._closed else set())
        for rank, message in self._messages.items():
            if message != self._heard.get(rank) and (news := Standing.parse(rank, message)) is not None:
                news.silent_s, news.gone_s = -passed_s, self._known[rank].gone_s
                self._known[rank] = news
            self._heard[rank] = message
        for rank, each in self._known.items():
            each.silent_s += passed_s
            each.gone_s = None if rank not in ended else 0.0 if each.gone_s is None else each.gone_s + passed_s
        return list(self._known.values())

    def wait(self, limit_s: float) -> None:
        """Until all others have left."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end and not all(each.done or each.gone_s for each in self.standings(HURRY_S)):
            time.sleep(HURRY_S)

    def close(self) -> None:
        """Let go of the others' processes."""
        while self._near:
            os.close(self._near.popitem()[0])


def _connect() -> dist.Store:
    """A client of the process group's store, whose own one other threads wait with."""
    address = launcher.place().address, launcher.place().port
    with socket.create_connection(address, STORE_S):  # the client itself does not say that nobody listens
        pass
    return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=STORE_S), wait_for_workers=False)


def _machine() -> tuple[str, ...]:
    """What processes share whose ids mean the same: the system's start, and the container."""
    with contextlib.suppress(OSError):
        return kernel(), os.readlink("/proc/self/ns/pid")
    return (secrets.token_hex(8),)


def _speaks_of_another(error: BaseException | None) -> bool:
    """Whether a collective has failed, which is how other processes' deaths are felt here."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    if isinstance(error, RunError):  # of a save, for one, that a collective is a part of
        return _speaks_of_another(error.__cause__)
    text = str(error)
    return type(error) is RuntimeError and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|was)", text) is not None


def _sentence(error: BaseException | None) -> str:
    text = " ".join(str(error).split())[:1000]
    return text if isinstance(error, (RunError, UsageError)) else f"{type(error).__name__}: {text}"


def _whereabouts(thread: int) -> tuple[str, bool]:
    """Where a thread stands, innermost function first and then that of this package; whether it is in a collective."""
    frame = sys._current_frames().get(thread)
    places: list[str] = []
    waits = False
    depth = 0
    while frame is not None:
        file = frame.f_code.co_filename
        place = f"{frame.f_code.co_name} ({os.path.basename(file)}:{frame.f_lineno})"
        ours = f"{os.sep}vadit{os.sep}" in file
        # Gloo waits inside the collective. NCCL's return at once: what waits is the host, for a number on the device.
        waits |= depth < 6 and any(part in file for part in _COLLECTIVES)
        waits |= depth == 0 and ours and any(part in file for part in _READERS)
        if depth == 0 or ours:
            places.append(place)
        if ours:
            break
        frame, depth = frame.f_back, depth + 1
    return " of ".join(places), waits

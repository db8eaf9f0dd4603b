"""Ends a run whose processes wait for one that is dead or stuck, and says which one.

A collective that waits for a lost process cannot be interrupted, and when its own time limit ends it, nobody knows for
whom it waited (`collectives.outlast` moves that limit out of the way). So each process has a thread that goes round
them: every few seconds it tells rank 0, over a TCP connection of its own, the last step that the main thread has told
and for how long it has told nothing. Rank 0 ends the run for all once no process gets on any more; the others end it by
themselves where rank 0 is the one that is lost.

How the threads talk is in `watchdog_peers.py`.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import threading
import time
from types import TracebackType

import torch.distributed as dist

from vadit.runtime import distributed
from vadit.runtime.errors import RunError, UsageError, leave_for_torchrun
from vadit.train.watchdog_peers import Hub, Link, Peers, Standing, master_address

HANG_CODE = 75
"""Exit code of a process that its watchdog has ended (EX_TEMPFAIL: the same command may well succeed)."""

GRACE_S = 10.0
"""Time that a process has to end by itself after another one has failed or gone."""

GIL_S = 60.0
"""What the thread that needs no GIL waits longer than the one that can tell more."""

STDERR = 2
_COLLECTIVES = tuple(f"{os.sep}{name}{os.sep}" for name in (f"torch{os.sep}distributed", "deepspeed"))
_READERS = (f"{os.sep}vadit{os.sep}train{os.sep}", f"{os.sep}vadit{os.sep}distributed.py")
"""Where the main thread stands still for numbers of the device alone: it loads, saves and computes in other files."""
MAX_NAMED = 8
"""Processes that a message describes one by one."""

AGAIN = "the same command goes on from the last checkpoint"


class Watchdog:
    """Guards the training loop of this process; `timeout_s` 0 guards nothing. Entering it is collective.

        with Watchdog(spec.hang_timeout_s) as watchdog:
            watchdog.beat(step)                     # once per step: an assignment
            watchdog.beat(step, doing="saving")     # before what takes long

    A process alone is guarded against its own hang. Time in which this process was itself stopped (Ctrl-Z, a laptop's
    sleep) does not count, up to `timeout_s` and a minute where there are several processes.

    Raises on leaving:
        RunError: this process failed in a collective because another one has failed or gone, which it names.
    """

    def __init__(self, timeout_s: float, *, grace_s: float = GRACE_S) -> None:
        if timeout_s < 0:
            raise UsageError(f"run.hang_timeout_s is {timeout_s}; it must be a number of seconds, or 0 for never")
        self.timeout_s = timeout_s
        self.grace_s = min(grace_s, timeout_s)
        # Rank 0 reads thirty messages a second at most, each for about 0.2 ms.
        self.interval_s = min(max(timeout_s / 60, 0.2), max(1.0, distributed.world_size() / 30), 30.0)
        self._beat = (0, "starting")
        self._accusing = False
        self._peers: Peers | None = None
        self._leaving = threading.Event()
        self._judged = threading.Event()
        self._verdict: str | None = None
        self._main = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int, doing: str = "training") -> None:
        """Tell that the main thread gets on: `step` steps are done, `doing` is what comes now."""
        self._beat = (step, doing)

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            self._main = threading.get_ident()
            self._peers = _meet()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._peers is None:
            return
        if error is not None and distributed.world_size() > 1 and _tells_of_another(error):
            self._accusing = True
            self._peers.wake()
            self._judged.wait(self.grace_s + 2)  # the others may know who it was
        self._leaving.set()
        self._peers.wake()
        self._thread.join()
        # Stopped is of the loop: all processes leave, each in its time.
        in_order = error is None or isinstance(error, SystemExit) or type(error).__name__ == "Stopped"
        self._peers.leave(None if in_order or self._verdict else _sentence(error))
        if self._accusing and self._verdict:
            raise RunError(f"{self._verdict}; {AGAIN}") from error

    # ------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        own = Standing(rank=distributed.rank())
        seen: tuple[int, str] | None = None
        before = time.monotonic()
        try:
            while not self._leaving.is_set():
                if distributed.world_size() > 1:
                    # A main thread that never lets go of the GIL holds this one up, too: a thread of C ends us then.
                    faulthandler.dump_traceback_later(self.timeout_s + GIL_S, exit=True, file=STDERR)
                now = time.monotonic()
                passed = min(now - before, 2 * self.interval_s + 3)  # more: this process was stopped meanwhile
                before, beat = now, self._beat
                own.idle_s = own.idle_s + passed if beat is seen else 0.0
                (own.step, own.doing), seen = beat, beat
                self._round(own, passed)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _round(self, own: Standing, passed_s: float) -> None:
        assert self._peers is not None
        own.accuses = self._accusing
        own.where, own.waits = _whereabouts(self._main) if own.idle_s > self.timeout_s / 4 else ("", False)
        self._peers.round(own, self.interval_s, passed_s)
        standings = self._peers.standings(own)
        verdict = self._peers.verdict or judge(standings, timeout_s=self.timeout_s, grace_s=self.grace_s)
        if verdict is not None and not self._leaving.is_set():
            self._end(verdict, own)

    def _end(self, verdict: str, own: Standing) -> None:
        """Tell the others; end the process, unless its main thread is about to do so by itself."""
        assert self._peers is not None
        self._peers.tell(verdict)
        self._verdict = verdict
        self._judged.set()
        # One that has waited all the time for nothing will not.
        if self._leaving.wait(0.0 if own.idle_s >= self.timeout_s else self.grace_s):
            return
        who = f"[rank {own.rank}] " if distributed.world_size() > 1 else ""
        stream = sys.__stderr__
        print(f"\n{who}error: {verdict}; the threads of this process stand here:", file=stream, flush=True)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        print(f"{who}error: {verdict}; {AGAIN}", file=stream, flush=True)  # once more, where it is seen
        leave_for_torchrun(f"error: {verdict}")
        os._exit(HANG_CODE)


def judge(standings: list[Standing], *, timeout_s: float, grace_s: float) -> str | None:
    """Who holds the run up, in a sentence, or None while there is somebody who gets on."""
    others = [each for each in standings if not each.done]
    gone = [each for each in others if each.gone_s is not None]
    silent = [each for each in others if each not in gone and each.silent_s >= timeout_s / 2]
    living = [each for each in others if each not in gone and each not in silent]
    idle_s = min((each.idle_s for each in living), default=timeout_s)
    patience_s = min(grace_s, 1.0) if any(each.accuses for each in others) else grace_s
    if any((each.gone_s or 0) >= patience_s for each in gone) and (patience_s < grace_s or idle_s >= grace_s):
        return _list(gone, "{who} is gone (its connection has closed); {told}")
    if idle_s < timeout_s:
        return None
    if gone or silent:
        return _list(gone + silent, "{who} has not been heard of for {silent_s:.0f} s; {told}")
    newest = max(each.step for each in living)
    behind = [each for each in living if each.step < newest]
    if behind:
        return _list(behind, f"{{who}} lags behind step {newest}; {{told}}, {{idle_s:.0f}} s ago{{where}}")
    busy = [each for each in living if not each.waits]
    if busy and (len(busy) < len(living) or len(living) == 1):
        return _list(busy, "{who} does not get on; {told}, {idle_s:.0f} s ago{where}")
    return "nobody gets on; " + _list(living, "{who}: {told}, {idle_s:.0f} s ago{where}")


def _list(standings: list[Standing], sentence: str) -> str:
    """`sentence` filled in for each, for so many at most."""
    texts = [
        sentence.format(
            who=f"rank {each.rank}",
            told=f"the last step it told is {each.step} ({each.doing})",
            silent_s=each.silent_s,
            idle_s=each.idle_s,
            where=each.where and f", in {each.where}",
        )
        for each in standings[:MAX_NAMED]
    ]
    more = len(standings) - MAX_NAMED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "")


def _meet() -> Peers:
    """Connect the threads of all processes. Collective."""
    if distributed.world_size() == 1:
        return Hub(1)
    hub = Hub(distributed.world_size()) if distributed.is_main() else None
    message = [None if hub is None else (hub.port, hub.token)]
    dist.broadcast_object_list(message, src=0)
    if hub is not None:
        return hub
    assert message[0] is not None
    port, token = message[0]
    return Link(distributed.rank(), address=master_address(), port=port, token=token)


def _tells_of_another(error: BaseException | None) -> bool:
    """Whether a collective has failed, which is how other processes' deaths are felt here."""
    if isinstance(error, (dist.DistBackendError, dist.DistNetworkError)):
        return True
    if isinstance(error, RunError):  # of a save, for one, that a collective is a part of
        return _tells_of_another(error.__cause__)
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

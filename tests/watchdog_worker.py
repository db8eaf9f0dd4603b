"""Pairs of processes in which one dies, stops or sticks: `watchdog_worker.py OUT`, for test_watchdog.py.

All cases run at once, forked from here, so that torch is imported once. OUT/CASE-RANK.txt is what a process said,
OUT/codes.json the exit codes by name (negative: the signal).
"""

import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from launched import free_port

from vadit.runtime import distributed, launcher
from vadit.runtime.errors import RunError
from vadit.train import watchdog
from vadit.train.watchdog import Messenger, Watchdog

TIMEOUT_S, GRACE_S = 6.0, 2.0
STEPS, LAST_STEP = 6, 3
STEP_S = 0.5  # several heartbeats long


strangers: list[socket.socket] = []


class Stopped(Exception):
    """As the loop's."""


def sleep_for_ever() -> None:
    time.sleep(1000)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RunError("the disk is gone")


def fail_unforeseen() -> None:
    raise KeyError("weight")


def ask_to_stop() -> None:
    raise Stopped


def keep_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)


def break_watchdog() -> None:
    watchdog.judge = None  # type: ignore[assignment]
    sleep_for_ever()


def break_messenger() -> None:
    Messenger.exchange = None  # type: ignore[assignment,method-assign]
    sleep_for_ever()


def talk_nonsense() -> None:
    json.dumps = lambda message: "[" * 100_000  # type: ignore[assignment]


def pester() -> None:
    """Strangers at the store's port: some talk, and some only hold the line."""
    here = launcher.place()
    for message in (b"[" * 60_000 + b"\n", b"\0\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n", *[b""] * 50):
        strangers.append(socket.create_connection((here.address, here.port)))
        strangers[-1].sendall(message)


def nothing() -> None:
    pass


# name: (number of processes, what rank 0 does after LAST_STEP, what rank 1 does, whether rank 0 then sums with rank 1)
CASES: dict[str, tuple[int, Callable[[], None], Callable[[], None]]] = {
    "well": (2, nothing, nothing),
    "asked": (2, ask_to_stop, ask_to_stop),
    "stopped": (2, nothing, stop),
    "stopped_main": (2, stop, nothing),
    "killed": (2, nothing, die),
    "killed_main": (2, die, nothing),
    # NCCL tells nobody that a process has died: a sleep plays its part.
    "killed_quietly": (2, sleep_for_ever, die),
    "killed_main_quietly": (2, die, sleep_for_ever),
    "stuck": (2, nothing, sleep_for_ever),
    "stuck_main": (2, sleep_for_ever, nothing),
    "failed": (2, sleep_for_ever, fail),
    "failed_main": (2, fail_unforeseen, sleep_for_ever),
    "kept_gil": (2, nothing, keep_the_gil),
    "alone": (1, sleep_for_ever, nothing),
    "paused": (2, nothing, nothing),
    "watchdog_fails": (2, nothing, break_watchdog),
    "messenger_fails": (2, nothing, break_messenger),
    "nonsense": (2, pester, talk_nonsense),
}


def let_all_hear(dog: Watchdog, step: int) -> None:
    """Return once every process knows that all the others have come so far, however slow the machine is."""
    behind = dog._messenger is not None
    while behind:
        dog.beat(step)
        time.sleep(0.1)
        count = torch.tensor(sum(each.step < step for each in dog._messenger._known.values()))
        dist.all_reduce(count)
        behind = bool(count)


def work(case: str, rank: int, port: str) -> int:
    world_size, *acts = CASES[case]
    launcher._place = launcher.Place(rank, world_size, rank, "127.0.0.1", int(port))
    distributed.join("gloo", timedelta(minutes=5))
    try:
        with Watchdog(TIMEOUT_S, grace_s=GRACE_S) as dog:
            for step in range(1, STEPS + 1):
                dist.all_reduce(torch.ones(1))
                dog.beat(step)
                time.sleep(STEP_S)
                if step == LAST_STEP:
                    let_all_hear(dog, step)
                    acts[rank]()
            open_to = {each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"}
            assert open_to == ({"127.0.0.1"} if world_size > 1 else set()), open_to
            dog.beat(STEPS, doing="leaving")
            time.sleep(rank)
    except RunError as error:
        print(f"RunError: {error}", file=sys.stderr, flush=True)
        return 1
    except Stopped:
        return 0
    return 0


def start(case: str, rank: int, port: str, out: Path) -> int:
    """Fork a process; its id."""
    pid = os.fork()
    if pid:
        return pid
    handle = os.open(out / f"{case}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 99
    watchdog.GIL_S = 60.0 if case == "paused" else 1.0
    try:
        code = work(case, rank, port)
    finally:
        traceback.print_exc()
        os._exit(code)


def main(out: Path) -> None:
    running: dict[int, str] = {}
    for case, (world_size, *_) in CASES.items():
        port = free_port()
        running |= {start(case, rank, port, out): f"{case}-{rank}" for rank in range(world_size)}
    paused = [pid for pid, name in running.items() if name.startswith("paused")]
    time.sleep(2)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in paused:
            os.kill(pid, number)
        time.sleep(TIMEOUT_S + 3 if number == signal.SIGSTOP else 0)
    codes = {}
    stopped = {"stopped-1", "stopped_main-0"}
    while set(running.values()) - stopped:
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

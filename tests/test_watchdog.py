"""Processes that die, stop, stick or fail: the others end, and say who it was and how far it had got."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from launched import LIMIT_S

from vadit.train import watchdog
from vadit.train.watchdog import HANG_CODE, Standing, Watchdog, judge

WORKER = Path(__file__).parent / "watchdog_worker.py"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], Path]:
    """Exit code of every process by CASE-RANK, and the folder of what they said."""
    out = tmp_path_factory.mktemp("pairs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(WORKER), str(out)]
    done = subprocess.run(command, env=environment, timeout=LIMIT_S, capture_output=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "codes.json").read_text()), out


@pytest.mark.parametrize("case", ["well", "asked", "paused", "nonsense"])
def test_a_run_in_order_is_left_alone(case: str, pairs: tuple[dict[str, int], Path]) -> None:
    codes, out = pairs
    assert (codes[f"{case}-0"], codes[f"{case}-1"]) == (0, 0)
    assert "error:" not in (out / f"{case}-0.txt").read_text() + (out / f"{case}-1.txt").read_text()


TOLD = "the last step it reported is 3 (training)"
ENDED = {
    # case and rank of one that is well: its exit code and its last line
    "stopped-0": (HANG_CODE, "rank 1 has not been heard of for", TOLD),
    "stopped_main-1": (HANG_CODE, "rank 0 has not been heard of for", TOLD),
    "killed-0": (1, "RunError: rank 1 is gone", TOLD),
    "killed_main-1": (1, "RunError: rank 0 is gone", TOLD),
    "killed_quietly-0": (HANG_CODE, "rank 1 is gone", TOLD),
    "killed_main_quietly-1": (HANG_CODE, "rank 0 is gone", TOLD),
    "stuck-0": (HANG_CODE, "rank 1 does not get on", TOLD),
    "stuck-1": (HANG_CODE, "rank 1 does not get on", "in sleep_for_ever (watchdog_worker.py:"),
    "stuck_main-0": (HANG_CODE, "rank 0 does not get on", "in sleep_for_ever (watchdog_worker.py:"),
    "stuck_main-1": (HANG_CODE, "rank 0 does not get on", TOLD),
    "failed-0": (HANG_CODE, "rank 1 failed: the disk is gone", "the same command"),
    "failed-1": (1, "RunError: the disk is gone", ""),
    "failed_main-1": (HANG_CODE, "rank 0 failed: KeyError: 'weight'", "the same command"),
    "kept_gil-0": (HANG_CODE, "rank 1 has not been heard of for", TOLD),
    "alone-0": (HANG_CODE, "rank 0 does not get on", "in sleep_for_ever (watchdog_worker.py:"),
}


@pytest.mark.parametrize("name", ENDED)
def test_the_others_end_and_name_it(name: str, pairs: tuple[dict[str, int], Path]) -> None:
    codes, out = pairs
    code, *parts = ENDED[name]
    last = [line for line in (out / f"{name}.txt").read_text().splitlines() if "rror: " in line][-1]
    assert codes[name] == code, last
    for part in parts:
        assert part in last
    if code == HANG_CODE:  # the stack of the main thread
        assert "watchdog_worker.py" in (out / f"{name}.txt").read_text().split("stand here:")[1]


def test_a_main_thread_that_keeps_the_gil_is_ended_with_its_stack(pairs: tuple[dict[str, int], Path]) -> None:
    codes, out = pairs
    assert codes["kept_gil-1"] == 1
    assert "in keep_the_gil" in (out / "kept_gil-1.txt").read_text()


def sentence(*standings: Standing) -> str | None:
    return judge(list(standings), timeout_s=60.0, grace_s=10.0, quiet_s=4.0) or None


@pytest.mark.parametrize(
    ("standings", "named"),
    [
        # nobody is judged while somebody gets on, and until times have run out
        ([Standing(0, step=5, idle_s=100.0), Standing(1, step=5, idle_s=1.0)], None),
        ([Standing(0, step=5, idle_s=59.0), Standing(1, step=5, idle_s=100.0, silent_s=100.0)], None),
        ([Standing(0, idle_s=9.0), Standing(1, gone_s=50.0)], None),
        ([Standing(0, idle_s=50.0), Standing(1, gone_s=9.0)], None),
        ([Standing(0, idle_s=50.0), Standing(1, done=True, silent_s=500.0)], None),
        # a collective that has failed shortens the wait for the dead, and makes silence tell
        ([Standing(0), Standing(1, step=3, gone_s=1.5)], None),
        ([Standing(0, accuses=True), Standing(1, step=3, gone_s=1.5)], "rank 1 is gone"),
        ([Standing(0, accuses=True), Standing(1, step=3, silent_s=4.5)], "rank 1 has not been heard of for 4 s"),
        ([Standing(0, accuses=True), Standing(1, silent_s=3.5)], None),
        ([Standing(0), Standing(1, silent_s=4.5)], None),
        # who knows of a few says only who is lost
        ([Standing(1, step=5, idle_s=99.0), Standing(0, step=5, idle_s=99.0)], None),
        ([Standing(1, idle_s=99.0), Standing(0, silent_s=31.0)], "rank 0 has not been heard of for 31 s"),
    ],
)
def test_who_is_judged(standings: list[Standing], named: str | None) -> None:
    text = sentence(*standings)
    assert text is None if named is None else text is not None and text.startswith(named)


def test_the_one_that_lags_is_named() -> None:
    waiting = [Standing(rank, step=8, idle_s=61.0, waits=True) for rank in (0, 2)]
    behind = Standing(1, step=7, doing="saving", idle_s=70.0, where="flush (checkpoint.py:9)")
    text = sentence(waiting[0], behind, waiting[1])
    assert text == (
        "rank 1 lags behind step 8; the last step it reported is 7 (saving), 70 s ago, in flush (checkpoint.py:9)"
    )
    text = sentence(*waiting)
    assert text is not None and text.startswith("nobody gets on; rank 0: ") and "rank 2: " in text
    busy = [Standing(rank, step=8, idle_s=61.0) for rank in range(3, 20)]
    text = sentence(*waiting, *busy)
    assert text is not None and "rank 0" not in text and "rank 10 does" in text and text.endswith("; and 9 more")


@pytest.mark.parametrize(
    ("file", "waits"),
    [
        ("vadit/train/tracker.py", True),  # reads on the host what NCCL is to deliver
        ("vadit/runtime/distributed.py", True),
        ("site-packages/deepspeed/runtime/utils.py", True),
        ("torch/distributed/distributed_c10d.py", True),
        ("vadit/latents/dataset.py", False),
        ("threading.py", False),
    ],
)
def test_a_process_that_waits_for_others_is_told_from_one_that_is_stuck(file: str, waits: bool) -> None:
    names: dict[str, Any] = {}
    exec(compile("def stand(lock):\n    lock.acquire()\n", f"/env/{file}", "exec"), names)
    lock = threading.Lock()
    lock.acquire()
    thread = threading.Thread(target=names["stand"], args=(lock,))
    thread.start()
    assert thread.ident is not None
    while True:  # until it stands still
        where, found = watchdog._whereabouts(thread.ident)
        if where.startswith("stand"):
            break
    lock.release()
    thread.join()
    assert found is waits


@pytest.mark.parametrize(
    "message",
    [b"", b"\xff\xfe", b"null", b"{}", b"[" * 100_000, b'{"step": "x"}', b'{"step": 1e999}', b"9" * 5000]
    + [json.dumps(dataclasses.asdict(Standing(1)) | {name: []}).encode() for name in ("step", "idle_s")],
)
def test_no_message_ends_the_watchdog(message: bytes) -> None:
    assert Standing.parse(1, message) is None


def test_settings_and_messages_mean_what_they_say() -> None:
    own = Standing(1, 7, "saving", 3.5, "flush (save.py:9)", waits=True, accuses=True, done=True)
    assert Standing.parse(1, json.dumps(dataclasses.asdict(own)).encode()) == own
    never = Standing.parse(1, json.dumps(dataclasses.asdict(own) | {"idle_s": math.nan}).encode())
    assert never is not None and never.idle_s == 0
    with Watchdog(0) as dog:
        dog.beat(1)
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())


@pytest.mark.parametrize("case", ["watchdog_fails", "messenger_fails"])
def test_a_watchdog_that_fails_ends_the_run(case: str, pairs: tuple[dict[str, int], Path]) -> None:
    codes, out = pairs
    assert codes[f"{case}-1"] == HANG_CODE and codes[f"{case}-0"] in (1, HANG_CODE)
    assert "[rank 1] error: the watchdog itself has failed (TypeError: " in (out / f"{case}-1.txt").read_text()
    text = (out / f"{case}-0.txt").read_text()
    assert "the watchdog itself has failed" in text or "rank 1 is gone" in text

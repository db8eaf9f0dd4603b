"""Why the last start of a run ended, if it was killed for memory: then it could not say a word itself.

While a run trains, `.running` in its folder says twice a second which step it is in and how much memory there is. A run
that ends takes the file away, unless memory is what ended it.
"""

import contextlib
import json
import os
import re
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import LESS_MEMORY, RunError, used_up
from vadit.runtime.files import kernel, no_link
from vadit.runtime.free import free_bytes
from vadit.runtime.json_files import read_json

PERIOD_S = 0.5  # in which a process on a CPU takes a GB or two
FULL, HALF = 0.85, 0.5
"""Shares that a run held of the memory it could have, when it was killed for it: by itself, or as the kernel killed."""


@dataclass(frozen=True)
class _Mark:
    """Where a run was last."""

    step: int  # that was under way
    doing: str
    held: int  # bytes of the main process
    free: int
    least: int  # bytes that were free when fewest were: another process of the run may be gone by now
    kills: int  # by the kernel for memory, of all processes, from the start of the machine to that of the run
    kernel: str  # of the machine, since it was started
    over: str = ""  # what was used up, where an error said so


@contextlib.contextmanager
def explaining_oom(folder: Path, position: Callable[[], tuple[int, str]]) -> Iterator[None]:
    """Say what ended the last start, if it was memory; mark where this one is (`position`: steps done, and doing)."""
    if not distributed.is_main():
        yield
        return
    path, done, over, last = folder / ".running", threading.Event(), "", _now("", 0, "")
    with contextlib.suppress(OSError, RunError):
        if why := _explanation(read_json(path, _Mark), last):
            note(why)

    def keep() -> None:
        nonlocal last
        while True:
            step, doing = position()
            now = _now(over, step + 1, doing)
            last = replace(now, least=min(now.free, last.least), kills=last.kills)
            text = json.dumps(asdict(last)).ljust(1024)
            with contextlib.suppress(OSError), open(no_link(path, os.O_WRONLY | os.O_CREAT), "wb", 0) as file:
                file.write(text.encode())  # at once, over what was there: it is whole whenever the process is killed
            if done.wait(PERIOD_S):
                return

    thread = threading.Thread(target=keep, name="oom", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        over = used_up(error)
        raise
    finally:
        done.set()
        thread.join()
        keep() if over else path.unlink(missing_ok=True)


def _now(over: str, step: int, doing: str) -> _Mark:
    found = None
    with contextlib.suppress(OSError):  # a sandbox may not have it
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    free = free_bytes(torch.device("cpu"))
    return _Mark(step, doing, held, free, free, int(found[1]) if found else 0, kernel(), over)


def _explanation(mark: _Mark, now: _Mark) -> str:
    """What a mark that was left says of memory, if anything."""
    killed = mark.kernel == now.kernel and mark.kills < now.kills
    why = f"{mark.over} was used up"
    if not mark.over:
        free, share = (mark.least, HALF) if killed else (mark.free, FULL)
        if mark.held < share * (mark.held + free):
            return ""
        why = f"it held {mark.held / 2**30:.1f} GiB and {free / 2**30:.1f} were free: probably killed for memory"
    return f"the last start ended in step {mark.step} ({mark.doing}), where {why}; {LESS_MEMORY}"

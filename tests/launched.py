"""Runs that are started through a launcher, for the tests: what they are, what they leave, and what they should."""

import contextlib
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checkpoint_worker import MEASURED

LAUNCH = Path(__file__).parents[1] / "launch"
LIMIT_S = 900  # For what should take half a minute, on a machine that does much else.

GENERATOR = ["lightningdit-b-debug", "--flow.no-direction-loss", "--optimizer.lr", "3e-3"]
GENERATOR += ["--optimizer.weight-decay", "0.1", "--engine.max-grad-norm", "0.5", "--engine.ema-decays", "0.9"]
"""The generator of `training_plain.tiny_dit`, which sees four images a step."""
STEPS = 40
LONG_GENERATOR = [*GENERATOR, "--run.total-images", str(4 * STEPS), "--run.save-every-images", "40"]
TOKENIZER = ["vavae-f16d32-dinov2-debug", "--run.save-every-images", "4", "--engine.ema-decays", "0.9"]


def environment(**own: str) -> dict[str, str]:
    """Of a launcher on a CPU, without what this process has of a launcher's; `vadit` and the launchers are found."""
    foreign = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODES", "NODE_RANK", "PROCESSES")
    foreign += ("HOSTFILE", "RESTARTS", "LOCAL_ADDR", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": path} | own


_CALLS = itertools.count()


def free_port() -> str:
    """A port that nobody listens on, below those that the system gives out by itself, so that nobody is faster.

    Each call of a process, and of the forks that it makes, has another one.
    """
    while True:
        port = 20_000 + (101 * os.getpid() + next(_CALLS)) % 10_000
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return str(port)


def run_ranks(command: list[str], count: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes and output of `command` as so many processes of one group, without a launcher."""
    variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(count))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        started = []
        for rank, file in enumerate(files):
            own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen(command, env=own, stdout=file, stderr=file))
            stack.callback(started[-1].kill)
        codes = [process.wait(timeout=LIMIT_S) for process in started]
        for file in files:
            file.seek(0)
        return codes, [file.read() for file in files]


def launch_two(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script as two processes under DeepSpeed's launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank"]
    command = [*launcher, "--master_port", free_port(), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=LIMIT_S)


def train_by_two(wanted: dict[Path, list[str]]) -> None:
    """`vadit train ARGUMENTS` with --run.out OUT for each, by two processes of this machine without a launcher."""
    for out, arguments in wanted.items():
        codes, said = run_ranks([sys.executable, "-m", "vadit", "train", *arguments, "--run.out", str(out)])
        assert codes == [0, 0], said


def logged(out: Path) -> list[dict[str, Any]]:
    """Every whole line of the log, of all stages, without what was measured."""
    lines = []
    for path in sorted(out.rglob("log.jsonl")):
        text = path.read_text()
        lines += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def wait_until(condition: Callable[[], bool], started: list[subprocess.Popen[Any]], what: str) -> None:
    """Wait for a state of what `started` does; fails where it ends before."""
    end = time.monotonic() + LIMIT_S
    while True:
        ended = any(process.poll() is not None for process in started)  # asked first: it may be so by the end
        if condition():
            return
        assert not ended, f"ended before {what}"
        assert time.monotonic() < end, f"no {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """No file grows beyond `num_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

"""Runs of both trainers by two processes over gloo: forked, watched, and killed where a fault asks for it.

Importing torch and DeepSpeed takes longer than such a run. So one process imports all of it once, and every process
of every run is forked from there. A fork is sound while its parent has a single thread and no process group, and has
computed nothing: it is then what a new process is after its imports. So runs are compared after the last fork.
"""

import dataclasses
import importlib
import logging
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from checkpoint_worker import run_folders
from launched import free_port
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit import cli
from vadit.config import DiTConfig, TokenizerConfig
from vadit.recipes import get_recipe
from vadit.runtime import launcher
from vadit.train import dit, engine, tokenizer
from vadit.train.checkpoint import publish

T = TypeVar("T")
Config = DiTConfig | TokenizerConfig
Hook = Callable[[int, int, Path], None]
"""What happens in a process before its step: (number of the step in this life, rank, run folder)."""

STEPS, EVERY = 12, 2
"""Steps of a run, and from one checkpoint to the next."""
LIMIT_S = 600.0  # For what takes some seconds, on a machine that does much else.
CHUNK_S, FLUSH_S = 0.03, 0.1
"""What the slow disk adds to each 64 KiB that are written, and to each flush of a folder."""
_IMPORTED = (
    "deepspeed", "deepspeed.runtime.zero.stage3", "networkx", "safetensors.torch", "timm", "torch._dynamo",
    "torch._inductor.compile_fx", "torch.utils.cpp_extension", "torch.utils.tensorboard",
)  # fmt: skip


def import_all() -> None:
    """What the runs would import late; and forget a launcher that has started this process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    for name in _IMPORTED:
        importlib.import_module(name)


def fork() -> int:
    """os.fork, where it is sound."""
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1 or torch.distributed.is_initialized():
        raise RuntimeError(f"{len(threads)} threads, or a process group: a fork would not be as a new process")
    return os.fork()


# --- what is run
@dataclass(frozen=True)
class Variant:
    """One kind of run. `stages`: a tokenizer in the three stages of its recipe, each a run folder of its own."""

    network: str
    zero_stage: int
    precision: str
    stages: bool = False

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.network}{'-in-stages' if self.stages else ''}-zero{self.zero_stage}-{self.precision}"

    def config(self, out: Path, **changes: Any) -> Config:
        """Its settings; `changes` are of the run."""
        own: dict[str, Any] = {"zero_stage": self.zero_stage, "precision": self.precision, "ema_decays": (0.9, 0.5)}
        run = {"save_every_images": EVERY * BATCH, "keep_checkpoints": 3, "hang_timeout_s": 60.0, **changes}
        if self.network == "generator":
            return tiny_dit(out, steps=STEPS, run=run, **own)
        config = tiny_tokenizer(out, steps=STEPS, run=run, **own)
        if not self.stages:
            return config
        stages = get_recipe("vavae-f16d32-dinov2-debug").stages  # type: ignore[union-attr]
        length = STEPS // len(stages) * BATCH
        return dataclasses.replace(config, stages=tuple(dataclasses.replace(s, total_images=length) for s in stages))


def saved_steps(out: Path) -> int:
    """Steps that the newest checkpoints hold, over all stages."""
    found = [publish.newest(folder / "checkpoints", hashes=False) for folder in run_folders(out)]
    return sum(int(path.name.removeprefix("step-")) for path in found if path is not None)


def disk_state(out: Path) -> str | None:
    """Whether a checkpoint is being written, or published, at this moment."""
    for folder in run_folders(out):
        for path in (folder / "checkpoints").glob("*.partial"):
            whole = path.name.endswith((".old.partial", ".replaced.partial")) or (path / publish.MANIFEST).exists()
            return "publishing" if whole else "writing"
    return None


def _hook_steps(marks: Path, rank: int, out: Path, hook: Hook | None) -> None:
    """A byte in `marks` at the start of every step, and the hook."""
    handle = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    modules: tuple[Any, ...] = (dit, tokenizer)
    for module in modules:

        def step(*args: Any, original: Any = module.train_step) -> Any:
            os.write(handle, b".")
            if hook is not None:
                hook(os.fstat(handle).st_size, rank, out)
            return original(*args)

        module.train_step = step


def slow_disk() -> None:
    """Let this process write its checkpoints slowly, piece by piece, and flush slowly."""
    save, flush = publish.save_tensors, publish.flush_to_disk

    def slow_save(path: Path, *content: Any) -> None:
        save(path, *content)
        whole = path.read_bytes()
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(whole), 1 << 16):
                time.sleep(CHUNK_S)
                file.write(whole[start : start + (1 << 16)])

    def slow_flush(folder: Path) -> None:
        time.sleep(FLUSH_S)
        flush(folder)
        time.sleep(FLUSH_S)

    publish.save_tensors, publish.flush_to_disk = slow_save, slow_flush


class Pair:
    """Both processes of one start of a run: its life. What they say goes to OUT-LIFE-RANK.txt, or beside `beside`.

    hook: called before each step. prepare: called with the rank before the training.
    """

    def __init__(
        self,
        config: Config,
        *,
        life: int = 0,
        slow: bool = False,
        hook: Hook | None = None,
        prepare: Callable[[int], None] | None = None,
        beside: Path | None = None,
    ) -> None:
        self.out, self.life = Path(config.run.out), life
        self._beside = beside or self.out
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.codes: dict[int, int] = {}
        port = free_port()

        def work(rank: int) -> None:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            launcher.read()
            _hook_steps(self._file(rank, "steps"), rank, self.out, hook)
            if slow:
                slow_disk()
            if prepare is not None:
                prepare(rank)
            (dit if isinstance(config, DiTConfig) else tokenizer).train(config)  # type: ignore[attr-defined]

        self.pids = [self._fork(rank, work) for rank in (0, 1)]

    def _fork(self, rank: int, work: Callable[[int], None]) -> int:
        if pid := fork():
            return pid
        code = 99
        try:
            text = os.open(self._file(rank, "txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(text, 1)
            os.dup2(text, 2)
            try:
                work(rank)
                code = 0
            except BaseException as error:  # as the command line does
                code = cli._report(error, debug=False)
            finally:
                engine.finish()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _file(self, rank: int, suffix: str) -> Path:
        return self._beside.with_name(f"{self._beside.name}-{self.life}-{rank}.{suffix}")

    def said(self) -> str:
        """All that both have said, without line breaks: rich folds lines anywhere."""
        texts = [path.read_text() for rank in (0, 1) if (path := self._file(rank, "txt")).exists()]
        return " ".join(" ".join(texts).split())

    def steps(self) -> int:
        """Steps that were begun in this life, by either process."""
        marks = [self._file(rank, "steps") for rank in (0, 1)]
        return max((path.stat().st_size for path in marks if path.exists()), default=0)

    def ended(self) -> bool:
        """Whether any process has; takes note of its code."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return bool(self.codes)

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """The exit codes of both; whoever has not ended in time is killed."""
        end = time.monotonic() + limit_s
        while not self.ended() or len(self.codes) < 2:
            if time.monotonic() > end:
                for rank in {0, 1} - self.codes.keys():
                    os.kill(self.pids[rank], signal.SIGKILL)
                end += LIMIT_S
            time.sleep(0.005)
        return [self.codes[0], self.codes[1]]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is so; whether it came before a process ended."""
        while not condition():
            if self.ended():
                return False
            if time.monotonic() - self.started > LIMIT_S:
                self.wait(0.0)
                return False
            time.sleep(0.002)
        return True

    def kill(self, rank: int) -> bool:
        """kill -9 one process; whether it was still alive."""
        if self.ended():
            return False
        os.kill(self.pids[rank], signal.SIGKILL)
        return True

    def remove(self) -> None:
        """A run that went well leaves nothing, of any of its lives."""
        shutil.rmtree(self.out, ignore_errors=True)
        for path in self._beside.parent.glob(f"{self._beside.name}-[0-9]-[01].*"):
            path.unlink()


def in_forks(tasks: Sequence[Callable[[], T]], lanes: int, scratch: Path) -> Iterator[tuple[int, T | str]]:
    """Results of the tasks, each in a fork of this process, `lanes` at a time; of one that fails its traceback."""
    waiting = list(enumerate(tasks))
    running: dict[int, int] = {}
    while waiting or running:
        while waiting and len(running) < lanes:
            number, task = waiting.pop(0)
            if not (pid := fork()):
                found: Any = "its process has died"
                try:
                    found = task()
                except BaseException:
                    found = traceback.format_exc()
                finally:
                    (scratch / f"{os.getpid()}.result").write_bytes(pickle.dumps(found))
                    os._exit(0)
            running[pid] = number
        pid, _ = os.wait()
        number, path = running.pop(pid), scratch / f"{pid}.result"
        yield number, pickle.loads(path.read_bytes()) if path.exists() else "its process has died"
        path.unlink(missing_ok=True)

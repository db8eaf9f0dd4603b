"""What a log point holds besides the loss: how fast the run is, what it waits for, and how far it is from its goal.

    images_per_s            images of all processes over the time of their steps; saves and evaluations are not in it
    images_per_s_per_gpu    that over the number of processes
    mfu                     FLOPs that `vadit.estimate.flops` counts, over what the GPU does at most (bf16, dense)
    data_wait_share         share of the steps' time in which the device had nothing to do but wait for a batch
    comm_share              share that DeepSpeed's collectives took of the device, waiting for slower processes included
    memory_gib              most that torch held on any GPU since the last point; on a CPU, the process's most ever
    epochs                  images over the size of the data set
    hours_left              to the end of the run, at the pace of this start with saves and evaluations in it
    hours_to_64_epochs      the same to the 64 epochs of the paper, until they are done

Nothing here waits for the device between two log points.
"""

import contextlib
import functools
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vadit.runtime import distributed

_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "inference_all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "broadcast", "all_to_all_single",
)  # fmt: skip
"""What a step calls of DeepSpeed's backend."""
GOAL_EPOCHS = 64  # epochs of the paper's headline


@dataclass(eq=False)
class Tracker:
    """Loss terms and clocks of one start of a run; every process has one, and reads it at the same steps."""

    device: torch.device
    batch_size: int
    total_images: int
    num_samples: int
    flops_per_image: float | None = None
    peak_flops: float | None = None
    communication_known: bool = True

    def __post_init__(self) -> None:
        self.waiting = Stopwatch(self.device)  # for data
        self.communication = Stopwatch(self.device)  # in collectives of the engines
        self._pace: tuple[float, int] | None = None  # time of the first log point of this start, and its images
        self._peak_gib = 0.0
        self._begin()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def batches(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what the device waits for them is counted."""
        while True:
            with self.waiting.running():
                batch = next(stream)
            yield batch

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """The terms of one step that counts, scalars on the device: summed there, so that no step waits for it."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A save or an evaluation: its time is none of the steps, nor are its collectives and its memory."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what the steps left to do is theirs
            self._peak_gib = max(self._peak_gib, _memory_gib(self.device))
        begin = time.perf_counter()
        self.waiting.stopped = self.communication.stopped = True
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            self.waiting.stopped = self.communication.stopped = False
            self._paused_s += time.perf_counter() - begin

    def read(self, images_seen: int) -> dict[str, float]:
        """The values of a log point, terms as means over processes and steps; waits for the device. Collective."""
        values: dict[str, float] = {}
        if self._steps:
            means = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
            values |= zip(self._sums, distributed.all_mean(means).tolist(), strict=True)
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused_s, 1e-9)
        rate = self._steps * self.batch_size / seconds
        values |= {"images_per_s": rate, "images_per_s_per_gpu": rate / distributed.world_size()}
        if self.flops_per_image is not None and self.peak_flops is not None:
            values["mfu"] = values["images_per_s_per_gpu"] * self.flops_per_image / self.peak_flops
        clocks = [self.waiting.read(), self.communication.read()]
        shares = torch.tensor(clocks, device=self.device) / seconds
        waited, communicated = distributed.all_mean(shares).tolist()
        values["data_wait_share"] = min(waited, 1.0)
        if self.communication_known:
            values["comm_share"] = min(communicated, 1.0)
        peak_gib = max(self._peak_gib, _memory_gib(self.device))
        values["memory_gib"] = distributed.any_most(peak_gib, self.device)
        values |= self._distances(images_seen, now)
        self._begin()
        return values

    def restart(self) -> None:
        """Forget the steps since the last log point: the run goes back."""
        self.waiting.read()
        self.communication.read()
        self._pace = None
        self._begin()

    def _begin(self) -> None:
        """Begin the steps of the next log point."""
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}  # a term may begin between two log points
        self._steps, self._start, self._paused_s = 0, time.perf_counter(), 0.0
        self._peak_gib = 0.0  # of the steps before the last pause

    def _distances(self, images_seen: int, now: float) -> dict[str, float]:
        """How far it is to the ends, in epochs and hours."""
        if self._pace is not None and images_seen > self._pace[1]:
            pace = (now - self._pace[0]) / (images_seen - self._pace[1])
        else:  # the first point: its steps may hold a compilation, so that the pace is counted from here on
            pace = (now - self._start) / max(self._steps * self.batch_size, 1)
            self._pace = (now, images_seen)
        values = {"epochs": images_seen / self.num_samples}
        values["hours_left"] = max(self.total_images - images_seen, 0) * pace / 3600
        goal = GOAL_EPOCHS * self.num_samples
        if images_seen < goal:
            values["hours_to_64_epochs"] = (goal - images_seen) * pace / 3600
        return values


def _memory_gib(device: torch.device) -> float:
    """Most that torch held on the device since the last call; on a CPU the most that the process ever had."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stopwatch:
    """Seconds that a device spent in some stretches of work.

    On a GPU a stretch lies between two events of the default stream: where the host waits for data while the GPU has
    work left, nothing is counted; where a collective runs beside the arithmetic, on a stream of its own, neither. On a
    CPU it is the time of the wall.
    """

    _MANY = 256  # open stretches from which on those that are over are read, so that a log point finds few

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []
        self._seconds = 0.0
        self._inside = False
        self.stopped = False  # whether stretches are not counted at the moment

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is inside, once where such stretches are nested."""
        beside = self._cuda and torch.cuda.current_stream(self._device) != torch.cuda.default_stream(self._device)
        if self._inside or self.stopped or beside:
            yield
            return
        self._inside = True
        begin = self._now()
        try:
            yield
        finally:
            self._inside = False
            end = self._now()
            if self._cuda:
                self._pairs.append((begin, end))
                self._drain(wait=False)
            else:
                self._seconds += end - begin

    def read(self) -> float:
        """Seconds since the last reading; waits for the last stretch."""
        self._drain(wait=True)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.default_stream(self._device))
        return event

    def _drain(self, *, wait: bool) -> None:
        if not wait and len(self._pairs) < self._MANY:
            return
        while self._pairs and (wait or self._pairs[0][1].query()):
            begin, end = self._pairs.popleft()
            if wait:
                end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
            self._spare += [begin, end]


@contextlib.contextmanager
def timed_collectives(backend: Any, watch: Stopwatch) -> Iterator[None]:
    """Count with `watch` how long the collectives of `backend` take, and how long what they began is waited for.

    backend: `vadit.train.engine.communication_backend()`.
    """
    names = [name for name in _COLLECTIVES if hasattr(backend, name)] if distributed.world_size() > 1 else []

    def clocked(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            with watch.running():
                handle = collective(*args, **kwargs)
            return _TimedHandle(handle, watch) if hasattr(handle, "wait") else handle

        return call

    for name in names:
        setattr(backend, name, clocked(getattr(backend, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(backend, name)  # the class's own shows again


class _TimedHandle:
    """A collective under way, whose wait is counted."""

    def __init__(self, handle: Any, watch: Stopwatch) -> None:
        self._handle, self._watch = handle, watch

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._watch.running():
            return self._handle.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

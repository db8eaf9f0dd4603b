"""Rounds of a trainer's steps, and where their time went: what `bench_step.py` measures with."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import torch

from vadit.runtime import distributed
from vadit.train.checkpoint.checkpoints import Position

ROUND_S = 0.05
"""A round is as many steps as last so long."""
BUDGET_S = 90.0
"""Rounds are cut down to harness.MIN_ROUNDS where all of them would take longer."""
SIDE = {"cpu": 1024, "cuda": 8192}
"""Side of the large product."""


class Parts:
    """Time spent inside chosen calls. On a GPU by events, which wait for nothing until they are read."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time counts as `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            result = call(*args, **kwargs)
            self._spans.setdefault(name, []).append((begin, self._now()))
            return result

        return wrapped

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Milliseconds by name since the last reading; the device must have come to rest."""
        found = {
            name: sum(begin.elapsed_time(end) if self.cuda else (end - begin) * 1e3 for begin, end in spans)
            for name, spans in self._spans.items()
        }
        self._spans.clear()
        return found


class Resident:
    """The first batch of a loader, on the device, for ever."""

    def __init__(self, stream: Iterator[Any], device: torch.device) -> None:
        self._batch = _moved(next(stream), device)

    def __next__(self) -> Any:
        return self._batch

    def __iter__(self) -> Iterator[Any]:
        return self


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {each.name: _moved(getattr(batch, each.name), device) for each in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, tuple):
        moved = [_moved(each, device) for each in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)
    return batch


class Timed:
    """Batches of another iterator, whose waits are counted as data."""

    def __init__(self, batches: Iterator[Any], parts: Parts) -> None:
        self._next = parts.timed("data", batches.__next__)

    def __next__(self) -> Any:
        return self._next()

    def __iter__(self) -> Iterator[Any]:
        return self


@dataclass
class Measured:
    """Rounds of one case: seconds per step, and milliseconds of its parts."""

    step_s: list[float]
    parts_ms: dict[str, list[float]]
    matmul_s: list[float]
    steps: int
    peak_gib: float


def measure(task: Any, *, precision: str, device: torch.device, resident: bool, rounds: int, warmup: int) -> Measured:
    """Warm up, then rounds of steps of a trainer's task, in turns with one large product.

    resident: keep the first batch on the device and train on it for ever.
    """
    cuda = device.type == "cuda"
    parts = Parts(cuda)
    for engine in task.engines.values():
        engine.backward = parts.timed("backward", engine.backward)
    task.guard.step = parts.timed("optimizer", task.guard.step)
    task.ema.update = parts.timed("optimizer", task.ema.update)
    stream = task.loader.stream()
    batches: Iterator[Any] = Resident(stream, device) if resident else stream
    batches = Timed(batches, parts)
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        begin = time.perf_counter()
        for _ in range(count):
            for engine in task.engines.values():
                engine.begin_step(1e-6)
            task.step(batches, Position(step=done, images_seen=0))
            done += 1
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count

    product, matmul_s = _product(precision, device), []
    for _ in range(max(warmup, 1)):
        once = steps(1)
    count = max(1, round(ROUND_S / once))
    rounds = min(rounds, max(harness.MIN_ROUNDS, int(BUDGET_S / (once * count))))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = Measured([], {}, matmul_s, 0, 0.0)
    parts.read()
    for _ in range(rounds):
        # all processes start a round together, whatever they did before
        distributed.barrier()
        found.step_s.append(steps(count))
        taken = {name: value / count for name, value in parts.read().items()}
        for name in ("data", "backward", "optimizer"):
            found.parts_ms.setdefault(name, []).append(taken.get(name, 0.0))
        rest = found.step_s[-1] * 1e3 - sum(taken.values())
        found.parts_ms.setdefault("forward", []).append(rest)
        found.peak_gib = max(found.peak_gib, _peak_gib(cuda))
        matmul_s.append(product())
    found.steps = rounds * count
    stream.close()
    return found


def _product(precision: str, device: torch.device) -> Callable[[], float]:
    """Seconds of a large product, on call."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    cuda = device.type == "cuda"

    def product() -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10 if cuda else 1):
            torch.mm(a, b)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / (10 if cuda else 1)

    product()
    return product


def _peak_gib(cuda: bool) -> float:
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

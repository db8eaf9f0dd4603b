"""Rounds of a trainer's steps, and where their time went: what `bench_step.py` measures with."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import harness
import torch

from vadit.runtime import distributed
from vadit.train.checkpoint.checkpoints import Position

ROUND_S = 0.05  # A round is as many steps as last so long.
BUDGET_S = 90.0  # Rounds are cut down to harness.MIN_ROUNDS where all of them would take longer.
SIDE = {"cpu": 1024, "cuda": 8192}  # Side of the large product.


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


def _batches(stream: Iterator[Any], parts: Parts, resident: torch.device | None) -> Iterator[Any]:
    """Batches whose waits count as data; with a device, the first one stays there, for ever."""
    stream = stream if resident is None else itertools.repeat(_moved(next(stream), resident))
    fetch = parts.timed("data", stream.__next__)
    while True:
        yield fetch()


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
    batches = _batches(stream, parts, device if resident else None)
    done = 0

    def steps(count: int) -> float:
        nonlocal done
        begin = time.perf_counter()
        for _ in range(count):
            for engine in task.engines.values():
                engine.begin_step(1e-6)
            task.ema.begin_step(done)
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
        taken["forward"] = found.step_s[-1] * 1e3 - sum(taken.values())
        for name in ("data", "forward", "backward", "optimizer"):
            found.parts_ms.setdefault(name, []).append(taken.get(name, 0.0))
        matmul_s.append(product())
    found.steps = rounds * count
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found.peak_gib = peak / 2**30
    stream.close()
    return found


def _product(precision: str, device: torch.device) -> Callable[[], float]:
    """Seconds of a large product, on call."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    cuda = device.type == "cuda"
    repeats = 10 if cuda else 1

    def product() -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    product()
    return product

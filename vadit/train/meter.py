"""Means of the loss terms between two log points, and clocks that a GPU reads without being waited for."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch

from vadit.runtime import distributed


class Meter:
    """Means of the loss terms since the last log point, summed on the device so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}  # a term may begin between two log points
        self.steps = 0
        """Steps since the last log point."""

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """The terms of one step, scalars on the device."""
        for name, value in terms.items():
            self._sums[name] = (
                self._sums[name] + value.detach().float() if name in self._sums else value.detach().float()
            )
            self._counts[name] = self._counts.get(name, 0) + 1
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means over processes and the steps that had the term, and a fresh start; waits for the device. Collective."""
        if not self.steps:
            return {}
        own = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        values = dict(zip(self._sums, distributed.all_mean(own).tolist(), strict=True))
        self._sums, self._counts, self.steps = {}, {}, 0
        return values


class Stopwatch:
    """Seconds that a device spent in some stretches of work.

    On a GPU a stretch lies between two events of the default stream: where the host waits for data while the GPU has
    work left, nothing is counted; where a collective runs beside the arithmetic, on a stream of its own, neither. On a
    CPU it is the time of the wall.
    """

    _MANY = 256
    """Open stretches from which on those that are over are read, so that a log point finds few."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._pairs: deque[tuple[Any, Any]] = deque()
        self._spare: list[Any] = []
        self._seconds = 0.0
        self._inside = False
        self.stopped = False
        """Whether stretches are not counted at the moment."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what is inside, once where such stretches are nested."""
        if self._inside or self.stopped or (self._cuda and not self._on_default_stream()):
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

    def _on_default_stream(self) -> bool:
        return bool(torch.cuda.current_stream(self._device) == torch.cuda.default_stream(self._device))

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

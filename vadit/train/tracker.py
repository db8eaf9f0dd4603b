"""What a log point tells besides the loss: how fast the run is, what it waits for, and how far it is from its goal.

    images_per_s            images of all processes over the time of their steps; saves and evaluations are not in it
    images_per_s_per_gpu    that over the number of processes
    mfu                     FLOPs that the formula of `vadit.estimate.flops` asks for, over the GPU's peak (bf16, dense)
    data_wait_share         share of the steps' time in which the device had nothing to do but wait for a batch
    comm_share              share that DeepSpeed's collectives took of the device, waiting for slower processes included
    memory_gib              most that torch held on any GPU since the last point; on a CPU, the process's most ever
    epochs                  images over the size of the data set
    hours_left              to the end of the run, at the pace of this start with saves and evaluations in it
    hours_to_64_epochs      the same to the 64 epochs of the paper, until they are done

Nothing here waits for the device between two log points.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from vadit.runtime import distributed
from vadit.train.meter import Meter, Stopwatch

MEASURED = frozenset(
    {
        "images_per_s",
        "images_per_s_per_gpu",
        "mfu",
        "data_wait_share",
        "comm_share",
        "memory_gib",
        "hours_left",
        "hours_to_64_epochs",
        "save_stall_ms",
        "save_write_ms",
    }
)
"""Values of a log point that a clock or the machine gives; all others are the same at every run of equal settings."""
GOAL_EPOCHS = 64
"""Epochs of the paper's headline."""


class Tracker:
    """Loss terms and clocks of one start of a run; every process has one, and reads it at the same steps."""

    def __init__(
        self,
        device: torch.device,
        *,
        batch_size: int,
        total_images: int,
        num_samples: int | None = None,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        communication_known: bool = True,
    ) -> None:
        self._device = device
        self._batch_size = batch_size
        self._total_images = total_images
        self._num_samples = num_samples
        self._flops_per_image = flops_per_image
        self._peak_flops = peak_flops
        self._communication_known = communication_known
        self._meter = Meter()
        self.waiting = Stopwatch(device)
        """For data."""
        self.communication = Stopwatch(device)
        """In collectives of the engines."""
        self._start = time.perf_counter()
        self._paused_s = 0.0
        self._peak_gib = 0.0  # of the steps before the last pause
        self._pace: tuple[float, int] | None = None  # time of the first log point of this start, and its images
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def batches(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The same batches; what the device waits for them is counted."""
        while True:
            with self.waiting.running():
                batch = next(stream)
            yield batch

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """The terms of one step that counts."""
        self._meter.add(terms)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """A save or an evaluation: its time is none of the steps, nor are its collectives and its memory."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # what the steps left to do is theirs
            self._peak_gib = max(self._peak_gib, _memory_gib(self._device))
        begin = time.perf_counter()
        self.waiting.stopped = self.communication.stopped = True
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.reset_peak_memory_stats(self._device)
            self.waiting.stopped = self.communication.stopped = False
            self._paused_s += time.perf_counter() - begin

    def read(self, images_seen: int) -> dict[str, float]:
        """The values of a log point by name; waits for the device. Collective."""
        steps = self._meter.steps
        values = self._meter.read()
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused_s, 1e-9)
        rate = steps * self._batch_size / seconds
        values |= {"images_per_s": rate, "images_per_s_per_gpu": rate / distributed.world_size()}
        if self._flops_per_image is not None and self._peak_flops is not None:
            values["mfu"] = values["images_per_s_per_gpu"] * self._flops_per_image / self._peak_flops
        clocks = [self.waiting.read(), self.communication.read()]
        shares = torch.tensor(clocks, device=self._device) / seconds
        waited, communicated = distributed.all_mean(shares).tolist()
        values["data_wait_share"] = min(waited, 1.0)
        if self._communication_known:
            values["comm_share"] = min(communicated, 1.0)
        peak_gib = max(self._peak_gib, _memory_gib(self._device))
        values["memory_gib"] = distributed.any_most(peak_gib, self._device)
        values |= self._distances(images_seen, steps, now)
        self._start, self._paused_s, self._peak_gib = time.perf_counter(), 0.0, 0.0
        return values

    def restart(self) -> None:
        """Forget the steps since the last log point: the run goes back."""
        self._meter = Meter()
        self.waiting.read()
        self.communication.read()
        self._start, self._paused_s, self._pace = time.perf_counter(), 0.0, None

    def _distances(self, images_seen: int, steps: int, now: float) -> dict[str, float]:
        """How far it is to the ends, in epochs and hours."""
        if self._pace is not None and images_seen > self._pace[1]:
            pace = (now - self._pace[0]) / (images_seen - self._pace[1])
        else:  # the first point: its steps may hold a compilation, so that the pace is counted from here on
            pace = (now - self._start) / max(steps * self._batch_size, 1)
            self._pace = (now, images_seen)
        hours = {"hours_left": max(self._total_images - images_seen, 0) * pace / 3600}
        if self._num_samples is None:
            return hours
        goal = GOAL_EPOCHS * self._num_samples
        if images_seen < goal:
            hours["hours_to_64_epochs"] = (goal - images_seen) * pace / 3600
        return {"epochs": images_seen / self._num_samples, **hours}


def _memory_gib(device: torch.device) -> float:
    """Most that torch held on the device since the last call; on a CPU the most that the process ever had."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""Means of the loss terms between two log points."""

from __future__ import annotations

import time

import torch

from vadit import distributed


class Meter:
    """Means of the loss terms since the last log point, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._start = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """The terms of one step, scalars on the device."""
        for name, value in terms.items():
            self._sums[name] = (
                self._sums[name] + value.detach().float() if name in self._sums else value.detach().float()
            )
        self._steps += 1

    def peek(self) -> dict[str, float]:
        """Means over steps and processes since the last log point; waits for the device."""
        if not self._steps:
            return {}
        means = distributed.all_mean(torch.stack(list(self._sums.values())) / self._steps)
        return dict(zip(self._sums, means.tolist(), strict=True))

    def read(self, batch_size: int) -> dict[str, float]:
        """The means and the throughput, and a fresh start."""
        values = self.peek()
        seconds = time.perf_counter() - self._start
        values["images_per_s"] = self._steps * batch_size / seconds
        self._sums, self._steps, self._start = {}, 0, time.perf_counter()
        return values

"""The order of an epoch, some thousand samples at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vadit.runtime import rng
from vadit.runtime.stream import split_epochs

ORDER_AHEAD = 4096
"""Samples whose place in the order is worked out at once: the permutation is many small array operations."""


@dataclass(frozen=True)
class OrderPart:
    """Samples of one epoch: their places in its order and their ids, int64 (B,) each."""

    seed: int
    epoch: int
    places: Tensor
    ids: Tensor


class Order:
    """`sample_ids` with some of the coming samples worked out ahead; the same ids for the same positions."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._ahead: OrderPart | None = None

    def parts(self, positions: Tensor, seed: int) -> list[OrderPart]:
        """The samples at ascending positions, epoch by epoch."""
        return [self._part(epoch, places, seed) for epoch, places in split_epochs(positions, self._num_samples)]

    def _part(self, epoch: int, places: Tensor, seed: int) -> OrderPart:
        ahead = self._ahead
        if ahead is None or (ahead.seed, ahead.epoch) != (seed, epoch) or not _lies_in(places, ahead.places):
            step = int(places[1] - places[0]) if len(places) > 1 else 1
            stop = min(int(places[0]) + step * max(ORDER_AHEAD, len(places)), self._num_samples)
            coming = torch.arange(int(places[0]), max(stop, int(places[-1]) + 1), step)
            ids = rng.permute(coming, self._num_samples, rng.fold(seed, "order", epoch))
            self._ahead = ahead = OrderPart(seed, epoch, coming, ids)
        start = int(torch.searchsorted(ahead.places, places[0]))
        return OrderPart(seed, epoch, places, ahead.ids[start : start + len(places)])


def _lies_in(places: Tensor, coming: Tensor) -> bool:
    """Whether `places` is a piece of `coming`; both are ascending."""
    start = int(torch.searchsorted(coming, places[0]))
    return torch.equal(coming[start : start + len(places)], places)

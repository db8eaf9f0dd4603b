"""Position in the data: which sample comes when, for every loader.

The samples of all epochs form one endless global stream. Position p belongs to epoch p // n and shows sample
permute(p % n) under a key made of seed and epoch, so the order is a function of (seed, p) alone and one integer, the
images seen, is the whole state. A global batch is `batch_size * world_size` positions in a row; rank r takes
positions r, r + W, r + 2W, ... of it. A resumed run may therefore have another number of processes.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.runtime.json_files import Count, checked

Batch = TypeVar("Batch")

PREFETCH_BATCHES = 3


def split_epochs(positions: Tensor, n: int) -> Iterator[tuple[int, Tensor]]:
    """Cut ascending positions (int64) at the epoch ends: (epoch, places inside it in [0, n))."""
    for epoch in torch.unique_consecutive(positions // n).tolist():
        yield epoch, positions[positions // n == epoch] - epoch * n


def sample_ids(positions: Tensor, n: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """The samples at ascending global positions, epoch by epoch: (epoch, ids int64)."""
    for epoch, places in split_epochs(positions, n):
        yield epoch, rng.permute(places, n, rng.fold(seed, "order", epoch))


def debug_count(path: str) -> int:
    """The N of a path "debug:N"."""
    number = path.removeprefix("debug:")
    if not number.isdecimal() or int(number) < 1:
        raise UsageError(f"data.path is {path!r}; debug data needs a count of at least 1, as in debug:64")
    return int(number)


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint keeps of a loader."""

    seed: int
    images_seen: Count
    num_samples: Count | None = None


def check_position(state: dict[str, Any], num_samples: int) -> _Saved:
    """A loader's saved state; UsageError where it is of another number of samples than there are now."""
    saved = checked(_Saved, state, "the loader's state in the checkpoint", remedy="take another checkpoint")
    if saved.num_samples not in (None, num_samples):
        raise UsageError(
            f"the saved position counts {saved.num_samples} samples but the data set has {num_samples}; set data.path "
            "to the data of the first part of the run, or start from its weights: --run.init-from with this run "
            "folder, and another --run.out"
        )
    return saved


class PositionedLoader(ABC, Generic[Batch]):
    """A loader with an exact position; subclasses say how the samples at some positions become a batch.

    `batch_size` is per rank. `iter(loader)` yields what is left of the current epoch (the last batch may be short, or
    absent on some ranks); `loader.stream()` yields full batches for ever, across epoch ends.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if n < 1:
            raise UsageError("the data set is empty; set data.path to a folder with data")
        self.num_samples, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.images_seen = 0

    @property
    def epoch(self) -> int:
        """Epoch of the next sample, from 0."""
        return self.images_seen // self.num_samples

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(endless=False)

    def stream(self) -> Generator[Batch, None, None]:
        """Full batches for ever, from the current position on."""
        return self._batches(endless=True)

    def state_dict(self) -> dict[str, Any]:
        """The position: seed, images handed out over all ranks, their epoch, and the size of the data set."""
        return {
            "seed": self.seed,
            "images_seen": self.images_seen,
            "epoch": self.epoch,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; iterators that are already running follow with their next batch."""
        saved = check_position(state, self.num_samples)
        self.seed, self.images_seen = saved.seed, saved.images_seen

    def ids_between(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[int]:
        """The samples of all ranks that were handed out between two states of this loader, in the order of the data.

        They are those of the order; one that was skipped as damaged is named and not what took its place.
        """
        positions = torch.arange(before["images_seen"], after["images_seen"])
        found: list[int] = []
        for epoch, places in split_epochs(positions, self.num_samples):
            found += self._ids(places, epoch, after["seed"]).tolist()
        return found

    def _ids(self, places: Tensor, epoch: int, seed: int) -> Tensor:
        """The samples at places of an epoch, int64 in and out: a bijection of [0, n)."""
        return rng.permute(places, self.num_samples, rng.fold(seed, "order", epoch))

    @abstractmethod
    def _session(self) -> AbstractContextManager[Callable[[Tensor], Callable[[], Batch]]]:
        """What loads while an iterator lives (threads, a pipeline).

        It yields start(positions int64, ascending) -> wait() -> batch. Waits are called in the order of the starts; a
        started batch may be dropped without a wait.
        """

    def _batches(self, *, endless: bool) -> Generator[Batch, None, None]:
        pending: deque[tuple[int, int, Callable[[], Batch] | None]] = deque()
        ahead, seed = -1, self.seed
        with self._session() as start:
            while True:
                expected = pending[0][0] if pending else ahead
                if (expected, seed) != (self.images_seen, self.seed):  # at the start, and moved by load_state_dict
                    pending.clear()
                    ahead, seed = self.images_seen, self.seed
                    end = math.inf if endless else (self.epoch + 1) * self.num_samples
                while len(pending) < PREFETCH_BATCHES and ahead < end:
                    stop = int(min(ahead + self.batch_size * self.world_size, end))
                    positions = torch.arange(min(ahead + self.rank, stop), stop, self.world_size)
                    pending.append((ahead, stop, start(positions) if len(positions) else None))
                    ahead = stop
                if not pending:
                    return
                _, stop, wait = pending.popleft()
                batch = wait() if wait else None
                self.images_seen = stop  # counts what was handed out, not what was prefetched
                if batch is not None:
                    yield batch

"""The order of an epoch for a .beton larger than memory: few of its pages at a time, in large reads.

A window is WINDOW_BYTES of pages, drawn at random from the whole file without replacement; the samples of a window
come in random order, then those of the next window. So an epoch reads every page once, as a whole, and keeps one
window (at its end two) in the page cache, which the machine's processes share. It is FFCV's QUASI_RANDOM as a function
of (seed, epoch, place) alone: position and ranks are as exact as with the random order.

Neighbours in the file share a page, so a file in the order of its classes (`vadit prepare` keeps the source's order)
shows about as many classes at a time as a window has pages: 64 of 8 MiB. Smaller steps towards the uniform order of
`random` need a file in mixed order, or a larger window.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vadit.images.sources.beton import BetonSource
from vadit.runtime import rng

WINDOW_BYTES = 512 << 20  # pages that are shuffled at a time
_EPOCHS_KEPT = 2
WINDOWS_KNOWN = 4  # windows that are remembered as asked for: those of two batches at an epoch's end


class _Layout(NamedTuple):
    """The pages of an epoch in their order."""

    pages: np.ndarray  # numbers into `PageOrder._pages`, int64 (P,)
    ends: np.ndarray  # samples in the first p + 1 pages, int64 (P,)
    window_ends: np.ndarray  # samples in the first w + 1 windows, int64


class PageOrder:
    """Which sample stands at which place of an epoch, so that places near each other share few pages."""

    def __init__(self, source: BetonSource, window_bytes: int = WINDOW_BYTES) -> None:
        self._file, self._page_size = source.file, source.file.page_size
        pages = (source.ptrs // np.uint64(self._page_size)).astype(np.int64)
        self._pages, self._counts = np.unique(pages, return_counts=True)
        self._members = np.argsort(pages, kind="stable")
        self._begins = np.cumsum(self._counts) - self._counts
        self._window = max(1, window_bytes // self._page_size)
        self._layout = functools.lru_cache(_EPOCHS_KEPT)(self._draw_layout)

    def ids(self, places: Tensor, epoch: int, seed: int) -> Tensor:
        """The samples at places of an epoch, int64 in and out; a bijection of [0, n)."""
        layout = self._layout(epoch, seed)
        wanted = places.numpy()
        spot = np.empty_like(wanted)
        windows = np.searchsorted(layout.window_ends, wanted, side="right")
        for window in np.unique(windows).tolist():
            here = windows == window
            begin = int(layout.window_ends[window - 1]) if window else 0
            inside = torch.from_numpy(wanted[here] - begin)
            key = rng.fold(seed, "window", epoch, window)
            spot[here] = begin + rng.permute(inside, int(layout.window_ends[window]) - begin, key).numpy()
        turn = np.searchsorted(layout.ends, spot, side="right")
        page = layout.pages[turn]
        offset = spot - (layout.ends[turn] - self._counts[page])
        return torch.from_numpy(self._members[self._begins[page] + offset])

    @contextlib.contextmanager
    def reading_ahead(self) -> Iterator[Callable[[Tensor, int, int], None]]:
        """A function to call with (places, epoch, seed) before their samples are read.

        It has the system read the pages of their window, and of the next one, in a thread of its own.
        """
        pool = ThreadPoolExecutor(1, thread_name_prefix="vadit-data")

        @functools.lru_cache(WINDOWS_KNOWN)
        def ask(window: int, epoch: int, seed: int) -> None:
            for page in self._layout(epoch, seed).pages[window * self._window : (window + 1) * self._window]:
                pool.submit(self._file.will_read, int(self._pages[page]) * self._page_size, self._page_size)

        def touch(places: Tensor, epoch: int, seed: int) -> None:
            ends = self._layout(epoch, seed).window_ends
            first, last = np.searchsorted(ends, [int(places[0]), int(places[-1])], side="right").tolist()
            for window in range(first, min(last + 2, len(ends))):
                ask(window, epoch, seed)

        try:
            yield touch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _draw_layout(self, epoch: int, seed: int) -> _Layout:
        count = len(self._pages)
        pages = rng.permute(torch.arange(count), count, rng.fold(seed, "pages", epoch)).numpy()
        ends = np.cumsum(self._counts[pages])
        last = np.minimum(np.arange(self._window, count + self._window, self._window), count) - 1
        return _Layout(pages, ends, ends[last])

"""The order of a .beton larger than memory: whole pages, few at a time, asked for ahead."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from launched import LIMIT_S

from vadit.images.sources.beton import MIN_PAGE_SIZE, BetonSource, EncodedImage
from vadit.images.sources.beton_writer import BetonWriter
from vadit.images.sources.page_order import PageOrder

COUNT = 37
WINDOW = 3
"""Pages; 12 hold three images each, the last one a single image."""


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> BetonSource:
    path = tmp_path_factory.mktemp("paged") / "images.beton"
    with BetonWriter(path, max_samples=COUNT, page_size=MIN_PAGE_SIZE) as writer:
        for _ in range(COUNT):
            writer.append(EncodedImage("raw", 480, 480, bytes(480 * 480 * 3)), 0)
        writer.finish()
    return BetonSource(path)


def page_order(source: BetonSource) -> PageOrder:
    return PageOrder(source, window_bytes=WINDOW * MIN_PAGE_SIZE)


def windows_of(source: BetonSource, ids: np.ndarray) -> list[list[int]]:
    """The places of an epoch in stretches that hold no more than WINDOW pages."""
    pages = source.ptrs[ids] // MIN_PAGE_SIZE
    stretches, begin = [], 0
    while begin < len(ids):
        end = begin + 1
        while end < len(ids) and len(set(pages[begin : end + 1])) <= WINDOW:
            end += 1
        stretches.append(list(range(begin, end)))
        begin = end
    return stretches


def test_an_epoch_takes_each_page_once_and_as_a_whole(paged: BetonSource) -> None:
    order = page_order(paged)
    epochs = [order.ids(torch.arange(COUNT), epoch, seed=5).numpy() for epoch in range(3)]
    for ids in epochs:
        assert sorted(ids) == list(range(COUNT))
        windows = [set(paged.ptrs[ids[places]] // MIN_PAGE_SIZE) for places in windows_of(paged, ids)]
        assert [len(window) for window in windows] == [3, 3, 3, 3, 1]
        assert sum(len(window) for window in windows) == len(set().union(*windows))
    # pages are mixed inside a window, and every epoch and seed has an order of its own
    steps = [abs(int(one) - int(other)) for ids in epochs for one, other in itertools.pairwise(ids[:9])]
    assert max(steps) > 2
    others = [*epochs, order.ids(torch.arange(COUNT), 0, seed=6).numpy()]
    assert len({tuple(ids) for ids in others}) == 4 and len({tuple(ids - ids // 3 * 3) for ids in others}) == 4


def test_it_is_a_function_of_the_place(paged: BetonSource) -> None:
    order, other = page_order(paged), page_order(paged)
    whole = order.ids(torch.arange(COUNT), 4, seed=5)
    for rank in range(3):
        assert torch.equal(other.ids(torch.arange(rank, COUNT, 3), 4, seed=5), whole[rank::3])
    assert [int(order.ids(torch.tensor([place]), 4, seed=5)[0]) for place in range(COUNT)] == whole.tolist()


def test_reading_ahead_asks_for_the_window_and_the_next_one(
    paged: BetonSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = page_order(paged)
    asked: list[int] = []

    def will_read(ptr: int, size: int) -> None:
        assert size == MIN_PAGE_SIZE and ptr % size == 0
        asked.append(ptr // size)

    monkeypatch.setattr(paged.file, "will_read", will_read)
    ids = order.ids(torch.arange(COUNT), 0, 5).numpy()
    stretches = windows_of(paged, ids)
    windows = [sorted(set((paged.ptrs[ids[places]] // MIN_PAGE_SIZE).tolist())) for places in stretches]

    def wait(count: int) -> list[list[int]]:
        for _ in range(100 * LIMIT_S):  # what was not asked for yet when the block ends is given up
            if len(asked) >= count:
                break
            threading.Event().wait(0.01)
        parts, begin = [], 0
        while begin < len(asked):
            parts.append(sorted(asked[begin : begin + WINDOW]))
            begin += WINDOW
        return parts

    with order.reading_ahead() as touch:
        last = stretches[0][-1]
        touch(torch.arange(0, last + 1), 0, 5)  # the first window alone
        assert wait(6) == windows[:2]
        touch(torch.arange(last, last + 1), 0, 5)  # nothing new
        touch(torch.arange(last + 1, last + 2), 0, 5)
        assert wait(9) == windows[:3]
        touch(torch.arange(last, COUNT), 0, 5)  # all others, and none beyond
        assert wait(13) == windows
        touch(torch.arange(0, 1), 1, 5)  # another epoch
        wait(19)
    assert len(asked) == 19

"""How long a step is in DeepSpeed's collectives, and how long a collective waits for the others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

from vadit.runtime import distributed
from vadit.train.meter import Stopwatch

_COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "inference_all_reduce",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "broadcast",
    "all_to_all_single",
)
"""What a step calls of DeepSpeed's backend."""


def outlast(hang_timeout_s: float) -> None:
    """Let no collective give up before the watchdog does, after `hang_timeout_s` seconds (0: never).

    By itself NCCL aborts the process after 10 minutes, with no word about who is missing, where one of them perhaps
    still writes a large checkpoint to a slow disk. Call it once all process groups are made.
    """
    limit = timedelta(seconds=2 * hang_timeout_s + 600) if hang_timeout_s else timedelta(days=7)
    set_timeout = getattr(distributed_c10d, "set_timeout", distributed_c10d._set_pg_timeout)  # before torch 2.14
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(limit, group)


@contextlib.contextmanager
def timed(backend: Any, watch: Stopwatch) -> Iterator[None]:
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

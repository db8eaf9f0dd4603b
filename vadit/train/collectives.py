"""How long a step is in DeepSpeed's collectives."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from vadit import distributed
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

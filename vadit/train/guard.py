"""What keeps a run from being lost: the stop request, and the refusal to go on from a loss that is not finite."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType

from vadit.errors import RunError


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (preemption, time limit) or the first Ctrl-C: the loop saves and ends after its step.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True


def check_finite(terms: dict[str, float], *, images: int, folder: str) -> None:
    """Refuse to go on, and to save, once a logged term is NaN or infinite."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise RunError(
            f"{', '.join(bad)} is not finite after {images:,} images; the last checkpoint in {folder} is sound: "
            "continue from it with --engine.max-grad-norm 1, a lower --optimizer.lr or --model.qk-norm"
        )

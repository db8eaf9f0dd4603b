"""The terminal: one console for all messages, and the progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vadit.runtime import distributed

console = Console(stderr=True, highlight=False)


class _Rate(ProgressColumn):
    """Images per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-- img/s" if speed is None else f"{speed:,.0f} img/s", style="cyan")


class ProgressBar:
    """A bar with images/s and time left; silent on all processes but the main one."""

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        columns = (
            TextColumn("{task.description:<26}"),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        silent = not distributed.is_main()
        self._progress = Progress(*columns, console=console, disable=silent, speed_estimate_period=30)
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, note: str | None = None) -> None:
        """Set the number of images done, and a short note behind the bar."""
        self._progress.update(self._task, completed=done)
        if note is not None:
            self._progress.update(self._task, note=note)

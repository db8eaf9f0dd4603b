"""What a run tells while it runs: a progress bar, TensorBoard events, and `log.jsonl`, a JSON object per log point."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from vadit import distributed
from vadit.errors import write_fault
from vadit.files import whole_file

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
        self._progress = Progress(
            *columns, console=console, disable=not distributed.is_main(), speed_estimate_period=30
        )
        self._task = self._progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, note: str | None = None) -> None:
        """Set the number of images done, and a short note behind the bar."""
        self._progress.update(self._task, completed=done)
        if note is not None:
            self._progress.update(self._task, note=note)


class RunLog:
    """`log.jsonl` and TensorBoard events of one run; both forget what lies after a checkpoint that is resumed."""

    def __init__(self, folder: Path, *, images_seen: int = 0) -> None:
        self._file = None
        if not distributed.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["images"] <= images_seen]
        with whole_file(path) as partial:
            partial.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._open_events = functools.partial(SummaryWriter, str(folder / "tensorboard"))
        self._events: Any = self._open_events(purge_step=images_seen + 1 if images_seen else None)

    def write(self, *, images: int, step: int, values: dict[str, float]) -> None:
        """One log point: `values` by name at so many images and optimizer steps."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"images": images, "step": step, **values}) + "\n")
            self._file.flush()
            if self._events is None:
                self._events = self._open_events()
            for name, value in values.items():
                self._events.add_scalar(name, value, global_step=images)
        except OSError as error:  # a full disk: Python keeps what could not be written, and a later flush goes on there
            self._events = None  # its thread has ended; another one may have more luck
            console.print(f"the run's log could not be written ({write_fault(error)})", style="bold red", markup=False)

    def close(self) -> None:
        """Flush and close both."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # told when the line was written
                self._file.close()
            with contextlib.suppress(OSError):
                if self._events is not None:
                    self._events.close()


def _lines(path: Path) -> list[str]:
    """Whole lines of a log: one that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()

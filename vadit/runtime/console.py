"""The terminal, the one door to it: what is printed, on stdout and on stderr, and the progress bar.

Paths, class names, members of archives and other programs' messages are strangers' words. None of them is markup, and
none reaches the terminal but as characters that it shows: whatever a terminal would obey, or not show, is escaped as
Python's `repr` does (`\\x1b`, `\\u202e`, a byte that is no UTF-8 as `\\xe9`). This module alone prints; what other
libraries print passes `guarded_streams`.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import IO, Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from vadit.runtime import launcher
from vadit.runtime.errors import escaped, one_line

T = TypeVar("T")


def _to_nobody(descriptor: int) -> None:
    """Lose what is printed from now on: its reader has left, and the work is not the reader's to end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class _Terminal(Console):
    """A console that knows no markup and escapes all text, however it comes: as message, cell, title or note."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:  # type: ignore[override]
        """What rich makes of a string before it measures it."""
        return super().render_str(escaped(text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces that rich makes of anything that it prints; those for the cursor have no text of others."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(escaped(piece.text), piece.style)

    def on_broken_pipe(self) -> None:
        """The reader has left (`vadit recipes | head`)."""
        _to_nobody(self.file.fileno())


_console = _Terminal(stderr=True)
_bars = 0  # progress bars that are drawn just now


def say(*lines: str) -> None:
    """Results, on stdout."""
    for line in lines:
        print(one_line(line))


def say_once(text: str) -> None:
    """`say` of the main process alone."""
    if launcher.place().rank == 0:
        say(text)


def note(text: str, style: str = "yellow") -> None:
    """What happens meanwhile, one line on stderr, above the progress bar; `style` is one of rich."""
    _console.print(one_line(text), style=style, soft_wrap=True)


def note_once(text: str, style: str = "yellow") -> None:
    """`note` of the main process alone."""
    if launcher.place().rank == 0:
        note(text, style)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """No notes and no bars until the block ends."""
    before, _console.quiet = _console.quiet, True
    try:
        yield
    finally:
        _console.quiet = before


def show(renderable: RenderableType) -> None:
    """A table or the like on stdout, at full width into a file or pipe."""
    console = _Terminal()
    if not console.is_terminal:
        console.width = 140  # a file or a pipe has no width: do not fold what a line could hold
    console.print(renderable)


class _Guarded(FileProxy):
    """A stream in the place of stdout or stderr for whatever is printed past this module: escaped, above the bar.

    What rich draws goes to the stream itself (`rich_proxied_file`, by which rich knows streams that it has wrapped).
    """

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(_console, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # LANG=C, PYTHONIOENCODING=ascii

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return str(getattr(self.rich_proxied_file, "encoding", None) or "utf-8")

    def isatty(self) -> bool:
        """Never: who asks would send colours."""
        return False

    def write(self, text: str) -> int:
        """Write with nothing in it that a terminal obeys."""
        try:
            if _bars:
                super().write(escaped(text))
            else:
                self.rich_proxied_file.write(escaped(text))
        except BrokenPipeError:
            _to_nobody(self.fileno())
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
            self.rich_proxied_file.flush()
        except BrokenPipeError:
            _to_nobody(self.fileno())

    def close(self) -> None:
        """Left to its owner."""


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Escape what anybody prints, be it a library's warning or a traceback, and let no character end the work."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Guarded(stream) for stream in before)  # None: closed by the caller
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Rate(ProgressColumn):
    """Images per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("-- img/s" if speed is None else f"{speed:,.0f} img/s", style="cyan")


class ProgressBar:
    """A bar with images/s and time left; silent on all processes but the main one.

    Where stderr is no terminal (a log of SLURM's, a pipe), a line at each note, or else now and then.
    """

    def __init__(self, title: str, total: int, *, done: int = 0) -> None:
        columns = (
            TextColumn("{task.description:<26}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._drawn, self._silent = _console.is_terminal, launcher.place().rank > 0
        hidden = self._silent or not self._drawn
        clock: dict[str, Any] = {"speed_estimate_period": 600, "get_time": lambda: time.monotonic()}
        self._progress = Progress(*columns, console=_console, disable=hidden, **clock)
        self._task = self._progress.add_task(one_line(title), total=total, completed=done, note="")
        self._begun = self._told = (time.monotonic(), done)  # at the start, and at the last line

    def __enter__(self) -> "ProgressBar":
        global _bars
        self._progress.start()
        _bars += self._drawn
        return self

    def __exit__(self, *_: object) -> None:
        global _bars
        _bars -= self._drawn
        self._progress.stop()
        if self._told[1] != self._progress.tasks[0].completed:
            self._tell("")

    def update(self, done: int, note: str | None = None) -> None:
        """Set the number of images done, and a short note behind the bar."""
        self._progress.update(self._task, completed=done)
        if note is not None:
            self._progress.update(self._task, note=one_line(note))
        now = time.monotonic()
        if note is not None or now - self._told[0] >= min(max(10.0, (now - self._begun[0]) / 5), 600.0):
            self._tell(note or "")

    def _tell(self, text: str) -> None:
        """A line where no bar is drawn."""
        if self._drawn or self._silent:
            return
        (task,) = self._progress.tasks
        parts = [f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}"]
        if speed := task.finished_speed or task.speed:
            parts.append(f"{speed:,.1f}/s")
        if task.time_remaining:
            parts.append(f"{timedelta(seconds=task.time_remaining)} left")
        note(", ".join([*parts, *filter(None, [text])]), "dim")
        self._told = (time.monotonic(), int(task.completed))


def counted(title: str, total: int, items: Iterable[T], count: Callable[[Any], int] = len) -> Iterator[T]:
    """The same items, with a bar of how much is done: `count` of each, out of `total`."""
    done = 0
    with ProgressBar(title, total) as bar:
        for item in items:
            yield item
            done += count(item)
            bar.update(done)

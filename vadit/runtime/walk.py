"""Walking folders of data: one rule of what is left out, and of links, for everything that is read from folders."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vadit.runtime.errors import UsageError
from vadit.runtime.reading import patiently, readable

T = TypeVar("T")
_SYSTEM = {
    *("__macosx", "__pycache__", "network trash folder", "temporary items", "lost+found"),
    *("$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
}
"""What Windows, macOS and file servers put beside the files of their users, in lower case."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is nobody's data: it begins with a dot, or a system has put it there."""
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


@dataclass
class Tree:
    """What lies below a folder, without what is hidden. Paths are relative to it, "" is the folder itself."""

    folders: dict[str, list[str]] = field(default_factory=dict)
    """Each real folder, once -> the names of its files, sorted."""
    again: dict[str, str] = field(default_factory=dict)
    """Links to folders that were not entered -> the path by which that folder was; ".." for one above."""

    def files(self) -> list[str]:
        """Paths of all files, sorted."""
        return sorted(os.path.join(folder, name) for folder, names in self.folders.items() for name in names)


def walk(root: Path, endings: tuple[str, ...]) -> Tree:
    """The files below a folder whose names end so (in lower case), links followed, and each real folder entered once.

    Where a folder can be entered by itself and by links, it is by itself. UsageError for what cannot be read, and for a
    link that leads nowhere, unless it is named like such a file: whoever reads that will name it.
    """
    tree, waiting = Tree(), [""]
    links: list[str] = []
    seen = {_identity(above): ".." for above in Path(os.path.realpath(root)).parents}
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(links.index(min(links)))
        place = os.path.join(root, folder) if folder else str(root)
        identity = _identity(place)
        if identity in seen:
            tree.again[folder] = seen[identity]
            continue
        seen[identity] = folder
        names = tree.folders[folder] = []
        for entry in _entries(place):
            inner = f"{folder}/{entry.name}" if folder else entry.name
            is_file = entry.name.lower().endswith(endings)
            if entry.is_symlink() and _leads_to_folder(entry.path, may_be_broken=is_file):
                links.append(inner)
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(inner)
            elif is_file:
                names.append(entry.name)
    return tree


def visible(folder: Path, ending: str) -> list[Path]:
    """What lies in a folder itself under names with this ending, sorted, without what is hidden."""
    return [folder / entry.name for entry in _entries(folder) if entry.name.endswith(ending)]


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    entries = _read(lambda: list(os.scandir(folder)), folder)
    return sorted((each for each in entries if not is_hidden(each.name)), key=lambda entry: entry.name)


def _identity(place: str | Path) -> tuple[int, int]:
    status = _read(lambda: os.stat(place), place)
    return status.st_dev, status.st_ino


def _read(action: Callable[[], T], place: str | Path) -> T:
    with readable(place, "give read permission, or name another", UsageError):
        return patiently(action, place)


def _leads_to_folder(link: str, *, may_be_broken: bool) -> bool:
    try:
        return stat.S_ISDIR(patiently(lambda: os.stat(link), link).st_mode)
    except OSError as error:
        if may_be_broken:
            return False
        raise UsageError(f"{link} is a link to {os.readlink(link)} ({error.strerror}); mend or remove it") from None

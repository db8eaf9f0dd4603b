"""Files that are whole or not there, and folders that belong to one set of settings."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vadit.runtime.errors import RunError, UsageError, write_fault


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the yielded path: it takes the name `path` when the block ends, and vanishes where the block fails.

    Folders on the way are made. What went wrong is raised as it is: `saved_file` says it in a sentence.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def saved_file(path: Path, advice: str = "free some space or choose another folder") -> Iterator[Path]:
    """`whole_file` whose failure is one sentence: RunError with the path, the reason and what to do about it.

    torch and safetensors raise errors of their own for a full disk; those of vadit pass unchanged.
    """
    try:
        with whole_file(path) as partial:
            yield partial
    except (UsageError, RunError):
        raise
    except Exception as error:
        raise RunError(f"{path} cannot be written ({write_fault(error)}); {advice}") from error


class Difference(NamedTuple):
    """A setting that two sets of settings do not share: its dotted name, and the value on each side."""

    name: str
    old: Any
    new: Any


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Difference | None:
    """The first setting, in depth, that differs between two nested mappings; None counts as missing."""
    for name in (*old, *(name for name in new if name not in old)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if (inner := first_difference(before, after, f"{prefix}{name}.")) is not None:
                return inner
        elif before != after:
            return Difference(prefix + name, before, after)
    return None


def refuse_other_settings(place: Path, what: str, old: Any, new: Mapping[str, Any], remedy: str) -> None:
    """UsageError where `place` holds `what` ("a run", "samples") that was made with other settings; names the first.

    old: what was kept, as read from JSON. new: the settings of now, compared as JSON would hold them.
    """
    if not isinstance(old, dict):
        raise RunError(f"{place} does not say how its {what} came about (damaged); delete it or choose another folder")
    if (found := first_difference(old, json.loads(json.dumps(new)))) is not None:
        raise UsageError(
            f"{place} holds {what} made with {found.name} {found.old!r}, this command says {found.new!r}; {remedy}"
        )

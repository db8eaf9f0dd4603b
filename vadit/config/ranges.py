"""What a setting may be, said once with its type: `depth: Annotated[int, Range(1, 256)]`, `out: PathName`.

`Checked` refuses everything else wherever its settings come from (command line, config.json, Python), and `--help`
shows the ranges. Upper limits lie far above what anybody trains: they keep a slip from hanging or filling the memory.
"""

import functools
import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Annotated, Any

from vadit.runtime.errors import UsageError, short


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; NaN and infinities lie in none."""

    low: float
    high: float
    above: bool = False  # `low` itself lies outside
    below: bool = False  # `high` itself lies outside
    or_zero: bool = False  # 0, which switches off, lies inside, too

    def __contains__(self, value: float) -> bool:
        inside = self.low <= value <= self.high and not (self.above and value == self.low)
        return (inside and not (self.below and value == self.high)) or (self.or_zero and value == 0)

    def __str__(self) -> str:
        low, high = (f"{end:,}" if abs(end) < 10**7 else f"{end:g}".replace("+", "") for end in (self.low, self.high))
        ends = f"{'above' if self.above else 'at least'} {low} and {'below' if self.below else 'at most'} {high}"
        return f"0, or {ends}" if self.or_zero else ends

    def __get_pydantic_core_schema__(self, kind: Any, schema_of: Any) -> Any:
        """In JSON, numbers alone: neither true nor "5"."""
        return {**schema_of(kind), "strict": True}


PATH = object()
PathName = Annotated[str, PATH]  # a path as users write it: a leading ~ or ~user becomes the home folder

Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0, 1_000_000)]  # of a loss
Margin = Annotated[float, Range(0, 2)]
Factor = Annotated[float, Range(0, 1_000_000, above=True)]
Seed = Annotated[int, Range(-(10**30), 10**30)]
Blocks = Annotated[int, Range(1, 256)]
Width = Annotated[int, Range(1, 65_536)]  # channels, attention heads, hidden units
Side = Annotated[int, Range(1, 16_384)]  # pixels or positions
Batch = Annotated[int, Range(1, 65_536)]
Count = Annotated[int, Range(1, 10**9)]
Images = Annotated[int, Range(1, 10**15)]  # a length or a distance of a run, in images
AnyImages = Annotated[int, Range(0, 10**15)]
Seeds = Annotated[int, Range(1, 10_000)]  # how many seeds
Workers = Annotated[int, Range(1, 1_024)]


class Checked:
    """Base of the dataclasses of settings; those of one group name it: `class DiTSpec(Checked, group="model")`."""

    _prefix = ""

    def __init_subclass__(cls, group: str = "") -> None:
        cls._prefix = f"{group}." if group else ""

    def __post_init__(self) -> None:
        own: Any = type(self)
        for name, kind, note in notes(own):
            value = getattr(self, name)
            each_of = value if isinstance(value, (tuple, list)) else (value,)
            if note is PATH:
                whole = tuple(self._expanded(name, each) for each in each_of)
                object.__setattr__(self, name, whole if each_of is value else whole[0])
                continue
            for each in (each for each in each_of if each is not None):
                right_kind = isinstance(each, Integral if kind is int else Real) and not isinstance(each, bool)
                if not right_kind or each not in note:
                    kinds = "" if right_kind else "a whole number, " if kind is int else "a number, "
                    subject = "every one" if each_of is value else "it"
                    raise UsageError(f"{self._prefix}{name} is {short(value)}; {subject} must be {kinds}{note}")

    def _expanded(self, name: str, path: Any) -> Any:
        if not isinstance(path, str) or not path.startswith("~"):
            return path
        if (whole := os.path.expanduser(path)) == path:
            raise UsageError(
                f"{self._prefix}{name} is {path}, but {path.split('/')[0]} is nobody's home; write ./{path}"
            )
        return whole


@functools.cache
def notes(kind: Any) -> tuple[tuple[str, type, Any], ...]:
    """(setting, type that is annotated, `Range` or mark of a path) for each such setting of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple((each.name, *found) for each in fields(kind) for found in _annotated(hints[each.name]))


def _annotated(hint: Any) -> Iterator[tuple[type, Any]]:
    for note in getattr(hint, "__metadata__", ()):
        if note is PATH or isinstance(note, Range):
            yield typing.get_args(hint)[0], note
    for part in typing.get_args(hint):
        yield from _annotated(part)

"""JSON of any origin: read whole and checked against a type, or one sentence with the file's name and what is wrong."""

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from vadit.runtime.errors import RunError, first_line, short
from vadit.runtime.reading import read_file

MAX_BYTES = 32 << 20  # of one file: a hundred times the largest that we write
MAX_DEPTH = 64  # objects and arrays inside each other
MAX_DIGITS = 100  # of an integer

T = TypeVar("T")


class Limits:
    """Beside a type in `Annotated`: what its values may be, by pydantic's names. A machine may lack pydantic itself."""

    def __init__(self, **limits: Any) -> None:
        self.limits = limits

    def __get_pydantic_core_schema__(self, kind: Any, schema_of: Any) -> Any:
        return {**schema_of(kind), **self.limits}


Count = Annotated[int, Limits(strict=True, ge=0, lt=1 << 63)]  # a number of things, or a place among them


def read_json(
    path: str | Path, kind: type[T], *, remedy: str = "", error: type[Exception] = RunError, allow_nan: bool = False
) -> T:
    """What a JSON file holds, as `kind`: a dataclass, `dict[str, int]`, whatever pydantic takes.

    `error`, with `remedy` at its end, where it cannot be read, has more than MAX_BYTES, is no JSON in UTF-8 (with or
    without a mark at its start), has a key twice, is nested too deep, holds a number too long or, but for `allow_nan`,
    one that is not finite, or is no `kind`.
    """
    try:
        text = read_file(path, MAX_BYTES + 1)
    except OSError as found:
        raise error(_sentence(f"{path} cannot be read ({found.strerror or found})", remedy)) from None
    return parse_json(text, kind, str(path), remedy=remedy, error=error, allow_nan=allow_nan)


def parse_json(
    text: bytes | str,
    kind: type[T],
    origin: str,
    *,
    remedy: str = "",
    error: type[Exception] = RunError,
    allow_nan: bool = False,
) -> T:
    """`read_json` of a text that comes from `origin`."""
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        words = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        constant = float if allow_nan else _finite
        values = json.loads(
            words, object_pairs_hook=_object, parse_int=_integer, parse_float=_finite, parse_constant=constant
        )
        level = [values]
        for _ in range(MAX_DEPTH + 1):
            level = [child for each in level for child in _children(each)]
        if level:
            raise RecursionError
    except RecursionError:
        raise error(_sentence(f"{origin} is nested deeper than {MAX_DEPTH}", remedy)) from None
    except ValueError as found:
        raise error(_sentence(f"{origin} is not valid JSON ({first_line(found)})", remedy)) from None
    return checked(kind, values, origin, remedy=remedy, error=error)


def checked(kind: type[T], values: Any, origin: str, *, remedy: str = "", error: type[Exception] = RunError) -> T:
    """Plain values as `kind`; `error` names the first one that is of another type or out of range."""
    from pydantic import ValidationError

    try:
        return cast(T, _adapter(kind).validate_python(values))  # type: ignore[arg-type]
    except ValidationError as found:
        first = found.errors()[0]
        if refused := first.get("ctx", {}).get("error"):  # by a Spec itself, which names the setting
            raise error(_sentence(f"{origin}: {refused}", remedy)) from None
        where = ".".join(str(part) for part in first["loc"])
        what = f"{first['msg']} (found {short(first['input'])})"
        raise error(_sentence(f"{origin}: {where}: {what}" if where else f"{origin}: {what}", remedy)) from None
    except (ArithmeticError, TypeError) as found:  # a Spec that computes with a number beyond any use
        raise error(_sentence(f"{origin}: {first_line(found)}", remedy)) from None


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _sentence(problem: str, remedy: str) -> str:
    return f"{problem}; {remedy}" if remedy else problem


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {short(twice)} is there twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is no finite number")
    return value

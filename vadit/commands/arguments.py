"""Settings from the command line: tyro reads them, this module turns every refusal into one sentence.

Each settings dataclass gives a flag per field (`--optimizer.lr`), its doc the help and its default the default.
"""

import contextlib
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from vadit.config.ranges import Range, notes
from vadit.runtime import launcher
from vadit.runtime.errors import UsageError, leave_for_torchrun

T = TypeVar("T")
_recipe_known = True  # see `parse`


def parse(
    kind: type[T], arguments: Sequence[str], *, command: str, default: T | None = None, description: str = ""
) -> T:
    """Settings of type `kind` for `vadit COMMAND`, over `default` where one is given; --help prints and exits.

    Without, defaults of settings in groups are a recipe's that is not known yet.
    """
    options: dict[str, Any] = {} if default is None else {"default": default}
    _show_ranges(typing.cast(Any, kind))
    global _recipe_known
    _recipe_known = default is not None
    with reported_once(), _one_sentence(kind):
        about = description or kind.__doc__
        try:
            return tyro.cli(kind, prog=f"vadit {command}", description=about, args=list(arguments), **options)
        except UsageError as error:
            raise UsageError(_with_flag(kind, str(error))) from None


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Let only the first process of each machine print a mistake that all of them see, started by one command."""
    try:
        yield
    except UsageError as error:
        if launcher.place().local_rank:
            leave_for_torchrun(f"error: {error}")
            raise SystemExit(2) from None
        raise


@contextlib.contextmanager
def _one_sentence(kind: type) -> Iterator[None]:
    """Raise a UsageError where tyro would print a box and exit; under a tyro without that hook the box stays."""
    try:
        from tyro import _errors as events
    except ImportError:
        yield
        return

    def refuse(event: Any) -> None:
        argument: Any = getattr(event, "argument", None)
        flag = "" if argument is None else argument.lowered.name_or_flags[-1]
        match event:
            case events.UnrecognizedArgs():
                raise UsageError(_unknown(kind, event.tokens[0], event.prog))
            case events.MissingArgs():
                names = ", ".join(each.arg.lowered.name_or_flags[-1] for each in event.missing_arguments)
                raise UsageError(f"{event.prog} needs {names}; `{event.prog} --help` explains")
            case events.InvalidChoice():
                near = difflib.get_close_matches(event.value, event.choices, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"{flag} is {event.value!r}; it must be one of {', '.join(event.choices)}{hint}")
            case events.BadValue():
                raise UsageError(f"{flag} needs {argument.lowered.metavar} after it; `{event.prog} --help` explains")
            case events.InstantiationFailure():
                raise UsageError(
                    f"{flag}: {_misread(event.message, argument.lowered.metavar)}" if flag else event.message
                )

    with events.on_parse_error(refuse):
        yield


@functools.cache
def _show_ranges(kind: Any) -> None:
    """Have --help say the range of each setting beside its default."""
    hints = typing.get_type_hints(kind, include_extras=True)
    ranges = {name: f" ({limits})" for name, _, limits in notes(kind) if isinstance(limits, Range)}
    plain = {each.name: "" for each in dataclasses.fields(kind) if each.default is not dataclasses.MISSING}
    for name, limits in (plain | ranges).items():
        words = functools.partial(_words, getattr(kind, "_prefix", ""), limits)
        kind.__annotations__[name] = Annotated[hints[name], tyro.conf.arg(help_behavior_hint=words)]
    for hint in typing.get_type_hints(kind).values():
        for part in filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint))):
            _show_ranges(part)  # type: ignore[arg-type]


def _words(group: str, limits: str, default: str) -> str:
    shown = "recipe's" if group and not _recipe_known else default
    return f"(default: {shown}){limits}"


def _misread(message: str, metavar: str) -> str:
    """Python's or tyro's words on a text that is no value of its setting, in words for people."""
    if message.startswith("Exceeds the limit"):
        return "a number of so many digits is none that could be meant"
    found = re.search(r"(?:base 10: |to float: |\[)('.*?')(?:$|\])", message)
    return f"{found[1]} is not {metavar}" if found else message


def _with_flag(kind: type, message: str) -> str:
    """A message of a Spec, which begins with the setting's name, with the flag that sets it here."""
    name, _, rest = message.partition(" ")
    if name.startswith("-"):
        return message
    flags = list(flags_of(kind))
    flag = f"--{name.replace('_', '-')}"
    # Specs do not know where they stand: `vadit sample` takes those of the sampler without their group.
    known = next((each for each in (flag, f"--{flag.rpartition('.')[2]}") if each in flags), name)
    return f"{known} {rest}"


def _unknown(kind: type, token: str, prog: str) -> str:
    if not token.startswith("-"):
        return f"unexpected argument {token!r}; write settings as --name value (`{prog} --help` lists them)"
    given = token.split("=")[0].replace("_", "-")
    if given.startswith("--no-") and "." in given:  # as other programs have it; here the no stands before the last part
        group, _, last = given.removeprefix("--no-").rpartition(".")
        given = f"--{group}.no-{last}"
    flags = list(flags_of(kind))
    # Someone who writes --lr means --optimizer.lr: the last part counts before the spelling of the whole.
    same_end = [flag for flag in flags if flag.rsplit(".", 1)[-1].lstrip("-") == given.rsplit(".", 1)[-1].lstrip("-")]
    near = [given] if given in flags else same_end or difflib.get_close_matches(given, flags, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown setting {token.split('=')[0]}; {hint}`{prog} --help` lists them"


def given_flags(arguments: Sequence[str]) -> set[str]:
    """The flags among the words of a command, spelled as `flags_of` gives them."""
    return {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}


def flags_of(kind: Any, prefix: str = "") -> Iterator[str]:
    """Every flag that the fields of dataclass `kind` give."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for setting, plain in typing.get_type_hints(kind).items():
        metadata = getattr(hints[setting], "__metadata__", ())
        if tyro.conf.Positional in metadata:
            continue
        unnamed = any(getattr(note, "name", None) == "" for note in metadata)
        name = setting.replace("_", "-")
        parts = [part for part in typing.get_args(plain) if dataclasses.is_dataclass(part)]
        if dataclasses.is_dataclass(plain):
            yield from flags_of(plain, prefix if unnamed else f"{prefix}{name}.")
        elif parts:
            yield from flags_of(parts[0], f"{prefix}{name}.0.")
        else:
            yield from (f"--{prefix}{name}", f"--{prefix}no-{name}") if plain is bool else (f"--{prefix}{name}",)

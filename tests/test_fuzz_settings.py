"""Every number that the command line takes, with values that cannot be meant: one sentence, or a run that trains."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_messages import OPTIONS

from vadit import cli
from vadit.commands.arguments import flags_of
from vadit.config import DiTConfig, TokenizerConfig, vary
from vadit.config.ranges import Range, notes
from vadit.recipes import get_recipe
from vadit.runtime.errors import UsageError

RECIPES = ("lightningdit-b-debug", "vae-f16d16-50ep-debug")
VALUES = (math.nan, math.inf, -math.inf, -1, 0, 1e30, -1e30, 2**63, 10**400)


def numbers(config: Any) -> Iterator[tuple[str, str, type]]:
    """(group, setting, int or float) of each number of a trainer."""
    for group in dataclasses.fields(config):
        spec = getattr(config, group.name)
        if dataclasses.is_dataclass(spec):
            for name, kind, note in notes(type(spec)):
                if isinstance(note, Range):
                    yield group.name, name, kind


def count(config: Any, group: str, name: str) -> int:
    """Numbers of a setting that takes several, else 0."""
    old = getattr(getattr(config, group), name)
    return max(len(old), 1) if isinstance(old, tuple) else 0


def changed(config: Any, group: str, name: str, value: Any) -> Any:
    several = count(config, group, name)
    return vary(config, **{group: {name: (value,) * several if several else value}})


def test_every_number_of_every_command_has_its_range() -> None:
    def missing(kind: Any) -> Iterator[str]:
        known = {name for name, _, note in notes(kind) if isinstance(note, Range)}
        for name, hint in typing.get_type_hints(kind).items():
            parts = {hint, *typing.get_args(hint)}
            for part in parts:
                if dataclasses.is_dataclass(part):
                    yield from missing(part)
            if parts & {int, float} and name not in known:
                yield f"{kind.__name__}.{name}"

    assert [name for kind in (*OPTIONS, DiTConfig, TokenizerConfig) for name in missing(kind)] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_number_that_cannot_be_meant_is_refused_by_name(recipe: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """All values by the Specs, which read config.json, too; one of each kind by the command line as well."""
    monkeypatch.chdir(tmp_path)
    config, typed = get_recipe(recipe), set()
    settings = list(dict.fromkeys(numbers(config)))
    assert len(settings) > 40 and ("optimizer", "betas", float) in settings
    for group, name, kind in settings:
        refused = []
        for value in VALUES:
            try:
                changed(config, group, name, value)
            except UsageError as error:
                assert str(error).startswith(f"{group}.{name} is"), error
                refused.append(value)
        # No number is unlimited. (Seeds take the most.)
        assert {*VALUES[:3], 1e30, -1e30, 10**400} - {math.nan} <= {*refused} and refused[0] is math.nan
        several = count(config, group, name)
        if (group, kind, several) in typed:
            continue
        typed.add((group, kind, several))
        value = next(each for each in refused[3:] if kind is float or isinstance(each, int))
        flag = f"--{group}.{name.replace('_', '-')}"
        assert cli.main(["train", recipe, flag, *[str(value)[:99]] * max(several, 1)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {flag}") and said.count("\n") == 1, said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_zero_that_is_taken_trains(recipe: str, tmp_path: Path) -> None:
    config, zeros = get_recipe(recipe), []
    for group, name, _ in numbers(config):
        try:
            config = changed(config, group, name, 0)
            zeros.append(f"{group}.{name}")
        except UsageError:
            pass
    assert len(zeros) > 15 and "optimizer.lr" in zeros
    flags = []
    for name in zeros:
        value = getattr(getattr(config, name.split(".")[0]), name.split(".")[1])
        flags += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else ["0"])]
    assert set(flags[::2]) & set(flags_of(type(config)))
    assert cli.main(["train", recipe, "--run.out", str(tmp_path / "run"), *flags]) == 0

"""Configs on disk: JSON written whole or not at all, read with every unknown key and wrong type named."""

import contextlib
import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

from vadit.config import Config, DiTConfig, TokenizerConfig
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError
from vadit.runtime.files import save_json
from vadit.runtime.json_files import checked, read_json

T = TypeVar("T")


def save_config(config: Any, path: str | Path) -> None:
    """Write a config as JSON, whole or not at all."""
    save_json(Path(path), dataclasses.asdict(config))


def from_dict(kind: type[T], values: dict[str, Any], *, origin: str) -> T:
    """A config of type `kind` from plain values; unknown keys and wrong types are named, together with `origin`."""
    _refuse_unknown(kind, values, origin, prefix="")
    return checked(kind, values, origin, error=UsageError)


def load_config(kind: type[T], path: str | Path) -> T:
    """Read what `save_config` wrote."""
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a folder that holds {path.name}")
    return from_dict(kind, read_json(path, dict[str, Any], error=UsageError), origin=str(path))


def load_run_config(run: str | Path, *, stages: bool = True) -> Config:
    """The config of a run folder, tokenizer or generator.

    Where its file is lost or damaged, that of a checkpoint serves, the newest that is sound; with `stages` also one of
    the last stage's: its networks are those of the run.
    """
    folder, file = Path(run), "config.json"
    try:
        return _read_run_config(folder / file)
    except UsageError as error:
        copies = sorted(folder.glob(f"checkpoints/step-*[0-9]/{file}"), reverse=True)
        if stages:
            copies += sorted(folder.glob(f"stage-*/checkpoints/step-*[0-9]/{file}"), reverse=True)
        for copy in copies:
            with contextlib.suppress(UsageError):
                config = _read_run_config(copy)
                note_once(f"{error}; taking {copy} instead")
                return config
        raise


def _read_run_config(path: Path) -> Config:
    if not path.is_file():
        raise UsageError(f"{path.parent} is no run folder: {path} does not exist")
    values = read_json(path, dict[str, Any], error=UsageError)
    if (name := values.get("kind")) not in ("tokenizer", "dit"):
        raise UsageError(f"{path}: kind is {name!r}; needed: tokenizer or dit")
    kind: type[Config] = TokenizerConfig if name == "tokenizer" else DiTConfig
    return from_dict(kind, values, origin=str(path))


def _refuse_unknown(kind: Any, values: Any, origin: str, prefix: str) -> None:
    if not dataclasses.is_dataclass(kind) or not isinstance(values, dict):
        return
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(hints)}"
            raise UsageError(f"{origin}: unknown setting {prefix}{key}{hint}")
        _refuse_unknown(hints[key], value, origin, prefix=f"{prefix}{key}.")

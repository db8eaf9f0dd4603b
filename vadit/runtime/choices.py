"""What a run computes with where several could: chosen at start-up, kept in its folder, reported where a wish failed.

Choices are made by trying, on small tensors of the run's device: a package that imports may still not run.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from vadit.kernels import backends, reasons
from vadit.kernels.self_check import self_check
from vadit.runtime import distributed
from vadit.runtime.console import note
from vadit.runtime.errors import RunError
from vadit.runtime.files import save_json
from vadit.runtime.json_files import read_json

FILE = "backends.json"


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen."""

    setting: str  # the setting that asks for it
    name: str  # what runs
    reason: str  # why it is this one
    refused: str = ""  # where the setting asked for something else: what, and why it cannot be had here
    left_out: str = ""  # what of the network it does not reach


def kernels(device: torch.device) -> list[Choice]:
    """The backend of each op on this device; on a GPU tried against plain torch first. See kernels/README.md."""
    failures = self_check(device) if device.type == "cuda" else {}
    return [
        Choice(f"VADIT_KERNELS {op}", name, reasons(device.type)[op], refused=failures.get(op, ""))
        for op, name in backends(device.type).items()
    ]


def report(choice: Choice) -> None:
    """One line on the main process where something else runs than was asked for, or not everywhere; else silence."""
    line = f"{choice.refused}; using {choice.name} instead" if choice.refused else choice.left_out
    if line and distributed.is_main():
        note(f"{choice.setting}: {line}")


def recorded(folder: Path, setting: str) -> str | None:
    """What a run wrote down for a setting when it last started; None where it did not."""
    try:
        return read_json(folder / FILE, dict[str, dict[str, str]])[setting]["name"]
    except (RunError, KeyError):
        return None


def save(folder: Path, choices: list[Choice]) -> None:
    """Write the choices of a run into its folder: for one process of a run."""
    values = [dataclasses.asdict(choice) for choice in choices]
    save_json(folder / FILE, {value.pop("setting"): value for value in values})

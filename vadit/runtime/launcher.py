"""Which of how many processes this is, and where they meet: the launcher's environment, read once.

torch's names alone count, as torchrun, deepspeed and launch/ set them. SLURM_* and OMPI_* do not: they are there, too,
where one process of a job works alone. What DeepSpeed or torch put into the environment later changes nothing here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from vadit.runtime.errors import UsageError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""All of them, or none. LOCAL_WORLD_SIZE may come with them."""


@dataclass(frozen=True)
class Place:
    """A process among `world_size`; by default one that is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Index among the processes of its machine: that of its GPU."""
    address: str = ""
    """Host name or address of rank 0, empty without a launcher; and the port that it listens on."""
    port: int = 0


_place: Place | None = None


def place() -> Place:
    """Of this process; read when first asked for. UsageError where the environment makes no sense."""
    return _place or read()


def known() -> Place:
    """What has been read; of a process alone where nothing has, for the report of an environment at fault."""
    return _place or Place()


def read() -> Place:
    """Read the environment, as every command does at its start."""
    global _place
    _place = None
    found = {name: os.environ[name] for name in (*NAMES, "LOCAL_WORLD_SIZE") if name in os.environ}
    if not found:
        _place = Place()
        return _place
    if missing := [name for name in NAMES if name not in found]:
        raise UsageError(
            f"{', '.join(f'{name}={value!r}' for name, value in found.items())} is a part of a launcher's environment; "
            f"set {', '.join(missing)}, too, or none of them for a process alone (launch/README.md)"
        )
    address = found.pop("MASTER_ADDR")
    for name, value in found.items():
        if not re.fullmatch("[0-9]{1,9}", value):
            raise UsageError(f"the launcher's {name} is {value!r}; it must be a whole number of at most nine digits")
    number = {name: int(value) for name, value in found.items()}
    near = number.get("LOCAL_WORLD_SIZE", number["WORLD_SIZE"])
    ranges = {
        "WORLD_SIZE": (1, 10**9, ""),
        "LOCAL_WORLD_SIZE": (1, number["WORLD_SIZE"] + 1, f" (WORLD_SIZE is {number['WORLD_SIZE']})"),
        "RANK": (0, number["WORLD_SIZE"], f" (WORLD_SIZE is {number['WORLD_SIZE']})"),
        "LOCAL_RANK": (0, near, f" ({near} processes)"),
        "MASTER_PORT": (1, 2**16, ""),
    }
    for name, (least, end, why) in ranges.items():
        if not least <= number.get(name, least) < end:
            raise UsageError(f"the launcher's {name} is {number[name]}; it must be from {least} to {end - 1}{why}")
    if not re.fullmatch(r"[\w.:%-]+", address):
        raise UsageError(f"the launcher's MASTER_ADDR is {address!r}; it must be a host name or an address")
    _place = Place(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], address, number["MASTER_PORT"])
    return _place

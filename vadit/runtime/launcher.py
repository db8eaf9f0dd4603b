"""Which of how many processes this is, and where they meet: the launcher's environment, read once.

torch's names alone count, as torchrun, deepspeed and launch/ set them. SLURM_* and OMPI_* do not: they are there, too,
where one process of a job works alone. What DeepSpeed or torch put into the environment later changes nothing here.
"""

import os
import re
from dataclasses import dataclass

from vadit.runtime.errors import UsageError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""All of them, or none. LOCAL_WORLD_SIZE may come with them."""
LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


@dataclass(frozen=True)
class Place:
    """A process among `world_size`, the `local_rank`-th of its machine; rank 0 listens at `address` and `port`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    one_machine: bool = True  # whether all are known to be on one
    local_size: int = 1  # processes on this machine; all of them where that is not known


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
    listed = ", ".join(f"{name}={value!r}" for name, value in found.items())
    if missing := ", ".join(name for name in NAMES if name not in found):
        raise UsageError(
            f"{listed} is a part of a launcher's environment; set {missing}, too, or none of them for a process alone "
            "(launch/README.md)"
        )
    for name, value in found.items():
        pattern = r"[\w.:%-]+" if name == "MASTER_ADDR" else "[0-9]{1,9}"
        if not re.fullmatch(pattern, value):
            needed = "a host name or an address" if name == "MASTER_ADDR" else "a whole number of at most nine digits"
            raise UsageError(f"the launcher's {name} is {value!r}; it must be {needed}")
    rank, size, local, port = (int(found[name]) for name in NAMES if name != "MASTER_ADDR")
    near, address = int(found.get("LOCAL_WORLD_SIZE", size)), found["MASTER_ADDR"]
    if not (rank < size and local < near <= size and 0 < port < 2**16):
        raise UsageError(
            f"the launcher's {listed} do not fit together; needed are RANK < WORLD_SIZE, LOCAL_RANK < LOCAL_WORLD_SIZE "
            "<= WORLD_SIZE and a MASTER_PORT from 1 to 65535"
        )
    one_machine = LOOPBACK.fullmatch(address) is not None or ("LOCAL_WORLD_SIZE" in found and near == size)
    _place = Place(rank, size, local, address, port, one_machine, near)
    return _place

"""How much memory a device has left."""

import contextlib
import re
from pathlib import Path

import torch

MEMINFO, OWN_GROUPS, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a control group, versions 2 and 1: its limit, what it takes, and the part of that which is cache."""


def free_bytes(device: torch.device) -> int:
    """Bytes that are free: of a GPU; else of the machine and of the control groups (containers) of this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = 2**62
    with contextlib.suppress(OSError, TypeError):
        free = 1024 * int(re.search(r"MemAvailable: *(\d+) kB", MEMINFO.read_text())[1])  # type: ignore[index]
    with contextlib.suppress(OSError):
        for line in OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                place = GROUPS / controllers / path.lstrip("/")
                free = min(
                    free, *(_left(group) for group in (place, *place.parents) if GROUPS in (group, *group.parents))
                )
    return max(free, 0)


def _left(group: Path) -> int:
    """What a control group may still take; without end where it has no limit, or is not to be seen from here."""
    for limit, taken, cache in _FILES:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            idle = re.search(rf"^{cache} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            most, now = (int((group / name).read_text()) for name in (limit, taken))
            return most - now + int(idle[1] if idle else 0)
    return 2**62

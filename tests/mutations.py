"""Seeded changes of files for the fuzz tests, and what may come of them.

Each case changes a whole file in one way, a function of its name alone. What then may happen is that the reader refuses
with an error that names the file, or that every sample is what it was.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vadit.runtime.errors import RunError, UsageError

NUM_CASES = {"png": 60, "latents": 200, "authors": 100, "payload": 80, "tar": 200}
NUM_NATIVE_CASES = {"dali": 100, "ffcv": 100}  # Of JPEGs for the decoders that may be missing.
BLOCK = 20
SECONDS_PER_BLOCK = 900  # Far more than a block takes; what is slower hangs.

Region = tuple[str, int, int]  # Name, start and stop.


@dataclass(frozen=True)
class Case:
    """A file and what was done to it."""

    name: str
    data: bytes
    change: str


def blocks(kind: str) -> pytest.MarkDecorator:
    """The cases of a kind as parameters `start`, a block each."""
    starts = range(0, NUM_CASES[kind], BLOCK)
    return pytest.mark.parametrize("start", starts, ids=[f"{kind}-block{start // BLOCK}" for start in starts])


def cases(kind: str, start: int, data: bytes, regions: list[Region]) -> Iterator[Case]:
    """A block of cases; the region that is changed goes round."""
    for number in range(start, start + BLOCK):
        draw = random.Random(f"{kind} {number}")
        region = regions[number % len(regions)]
        changed, change = mutate(data, draw, region)
        while changed == data:
            changed, change = mutate(data, draw, region)
        yield Case(f"{kind}-{number}", changed, f"{change} in {region[0]}")


def mutate(data: bytes, draw: random.Random, region: Region) -> tuple[bytes, str]:
    """One change inside [start, stop) of the file."""
    _, start, stop = region
    place = draw.randrange(start, stop)
    size = min(draw.choice((1, 2, 4, 8, 32, 200)), stop - place)
    change = draw.choice(("bits", "bytes", "number", "zeros", "cut", "insert", "remove", "twice", "swap"))
    changed = bytearray(data)
    if change == "bits":
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            changed[draw.randrange(start, stop)] ^= 1 << draw.randrange(8)
    elif change == "bytes":
        changed[place : place + size] = draw.randbytes(size)
    elif change == "number":
        width = draw.choice((1, 2, 4, 8))
        value = draw.choice((0, 1, 2, 127, 128, 255, 256, 65535, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1))
        changed[place : place + width] = (value % (1 << 8 * width)).to_bytes(width, draw.choice(("little", "big")))
    elif change == "zeros":
        changed[place : place + size] = bytes(size)
    elif change == "cut":
        del changed[place:]
    elif change == "insert":
        changed[place:place] = draw.randbytes(size)
    elif change == "remove":
        del changed[place : place + size]
    elif change == "twice":
        changed[place:place] = data[place : place + size]
    else:
        other = draw.randrange(start, stop - size + 1)
        changed[place : place + size], changed[other : other + size] = (
            data[other : other + size],
            data[place : place + size],
        )
    return bytes(changed), f"{change} at byte {place}, {size} bytes,"


def check(found: Iterator[Case], path: Path, read: Callable[[], dict[str, Any]], original: dict[str, Any]) -> None:
    """Every case at `path`: refused with the file's (or folder's) name, or nothing has changed."""
    num_refused = 0
    for case in found:
        path.write_bytes(case.data)
        try:
            content = read()
        except (RunError, UsageError) as error:
            assert path.name in str(error) or str(path.parent) in str(error), f"{case.name}: {error}"
            num_refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{case.name} ({case.change}): {type(error).__name__}: {error}") from error
        assert content == original, f"{case.name} ({case.change}): a sample changed in silence"
    assert num_refused > 0

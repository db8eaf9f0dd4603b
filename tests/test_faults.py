"""Whole runs of two processes that meet faults and end as if they had not: tests/faults/run.py, in small."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from launched import environment

RUNNER = Path(__file__).parent / "faults" / "run.py"
FAULTS = {
    # of the table; what --only calls them
    "NaN loss on one rank": "bad-steps",
    "NaN gradient on one rank": "bad-steps",
    "spike": "bad-steps",
    "checkpoint file truncated": "truncated",
    "a bit of a checkpoint flipped": "flipped",
    "disk full during saves": "full-disk",
    "SIGTERM to one rank": "sigterm",
    "a rank hangs": "hang",
    "unreadable shard in mid-epoch": "bad-shard",
}


def table(folder: Path, *arguments: str) -> dict[str, tuple[int, int]]:
    """What the runner finds: (tries, survived) by kind of fault."""
    path = folder / "table.csv"
    command = [sys.executable, str(RUNNER), "--lanes", "1", "--csv", str(path), "--folder", str(folder), *arguments]
    done = subprocess.run(command, env=environment(PYTHONSAFEPATH=""), capture_output=True, text=True, timeout=3600)
    assert path.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    with path.open() as file:
        rows = {row["fault"]: (int(row["tries"]), int(row["survived"])) for row in csv.DictReader(file)}
    assert done.returncode == int(any(tries > survived for tries, survived in rows.values()))
    assert not done.returncode, done.stdout
    return rows


def test_a_process_killed_in_a_save_costs_nothing_but_steps(tmp_path: Path) -> None:
    found = table(tmp_path, "--only", "kills", "--kills", "1", "--moments", "writing", "--variants", "0")
    assert found["kill -9 while a checkpoint is written"] == (1, 1)
    assert found["kill -9: all runs"] == (1, 1)


@pytest.mark.faults
def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path: Path) -> None:
    found = table(tmp_path, "--only", "kills", "--kills", "6", "--variants", "1", "4", "--seed", "1")
    assert found.pop("kill -9: all runs") == (6, 6)
    assert sum(tries for tries, _ in found.values()) == 7  # one of them twice


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The table of all single faults."""
    return table(tmp_path_factory.mktemp("faults"), "--only", *dict.fromkeys(FAULTS.values()))


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived(fault: str, faults: dict[str, tuple[int, int]]) -> None:
    if faults[fault] == (0, 0):
        pytest.skip("mounting a small disk needs rights that this process lacks")
    assert faults[fault] == (1, 1)

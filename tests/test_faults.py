"""Whole runs of two processes that meet faults and end as if they had not: tests/faults/run.py, in small."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from launched import environment

RUNNER = Path(__file__).parent / "faults" / "run.py"
SINGLE = ["bad-steps", "truncated", "flipped", "full-disk", "sigterm", "hang", "bad-shard"]


def table(folder: Path, *arguments: str) -> dict[str, tuple[int, int]]:
    """What the runner finds: (tries, survived) by kind of fault."""
    path = folder / "table.csv"
    command = [sys.executable, str(RUNNER), "--lanes", "1", "--csv", str(path), "--folder", str(folder), *arguments]
    done = subprocess.run(command, env=environment(PYTHONSAFEPATH=""), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with path.open() as file:
        return {row["fault"]: (int(row["tries"]), int(row["survived"])) for row in csv.DictReader(file)}


def test_a_process_killed_in_a_save_costs_nothing_but_steps(tmp_path: Path) -> None:
    found = table(tmp_path, "--only", "kills", "--kills", "1", "--moments", "writing", "--variants", "0")
    assert found["kill -9 while a checkpoint is written"] == (1, 1)
    assert found["kill -9: all runs"] == (1, 1)


@pytest.mark.faults
def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path: Path) -> None:
    found = table(tmp_path, "--only", "kills", "--kills", "6", "--variants", "1", "4", "--seed", "1")
    assert found.pop("kill -9: all runs") == (6, 6)
    assert sum(tries for tries, _ in found.values()) == 7  # one of them twice


@pytest.mark.faults
def test_single_faults_are_survived(tmp_path: Path) -> None:
    found = table(tmp_path, "--only", *SINGLE)
    untried = {"disk full during saves"} if found["disk full during saves"] == (0, 0) else set()  # needs rights
    assert len(found) == 9 and {fault for fault, tries in found.items() if tries != (1, 1)} == untried

"""Test files that run as scripts in a process of their own, once for all their tests in all of pytest's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from launched import LIMIT_S


def outcomes(
    script: str, factory: pytest.TempPathFactory, environment: dict[str, str], *arguments: str
) -> dict[str, Any]:
    """What `python script FILE ARGUMENTS` writes into FILE, as JSON."""
    base = factory.getbasetemp()
    path = (
        base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    ) / f"{'-'.join([Path(script).stem, *arguments])}.json"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            command = [sys.executable, script, str(path), *arguments]
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
            assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())

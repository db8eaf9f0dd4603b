"""What the tests of the guards share."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vadit.train import dit, runs


def events(folder: Path) -> list[dict[str, Any]]:
    """What the guard has told of."""
    path = folder / "guard.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(folder: Path) -> dict[str, Tensor]:
    """Whole weights of a run's newest checkpoint."""
    return runs.read_weights(folder)[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def faulty(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Let the loss of some calls, counted from 1, be NaN."""
    original, calls = dit.flow.loss, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = original(*args, **kwargs)
        return dataclasses.replace(loss, total=loss.total * math.nan) if bad(calls) else loss

    monkeypatch.setattr(dit.flow, "loss", broken)

"""What the tests of the guards share."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit.train import dit, runs


def events(folder: Path) -> list[dict[str, Any]]:
    """What the guard has recorded."""
    path = folder / "guard.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(folder: Path) -> dict[str, Tensor]:
    """Whole weights of a run's newest checkpoint."""
    return runs.read_weights(folder)[0]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal, bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def counted(
    original: Callable[..., Any],
    before: Callable[[int], None] = lambda number: None,
    after: Callable[[int, Any], Any] = lambda number, result: result,
) -> Callable[..., Any]:
    """`original` with something done before a call of it, by its number from 1, or with what it returns."""
    numbers = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        before(number)
        return after(number, original(*args, **kwargs))

    return call


def spoiled(loss: Any, factor: float = math.nan) -> Any:
    """A loss of training, times a factor."""
    return loss | {"loss": loss["loss"] * factor}


def faulty(monkeypatch, bad: Callable[[int], bool]) -> None:
    """Let the loss of some calls, counted from 1, be NaN."""
    broken = counted(dit.flow.loss, after=lambda number, loss: spoiled(loss) if bad(number) else loss)
    monkeypatch.setattr(dit.flow, "loss", broken)

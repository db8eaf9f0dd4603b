"""What the tests start as processes of their own: `training_worker.py TASK OUT`, `ranks` under a launcher."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit.train import dit, engine, tokenizer


def ranks(out: Path) -> None:
    """Both networks at ZeRO 1, 2, 3, in the same processes."""
    for zero_stage in (1, 2, 3):
        dit.train(tiny_dit(out / f"dit-{zero_stage}", zero_stage=zero_stage))
        tokenizer.train(tiny_tokenizer(out / f"tokenizer-{zero_stage}", steps=2, zero_stage=zero_stage))
    engine.finish()


TWO_STEPS = {"save_every_images": 2 * BATCH}


def crash(out: Path) -> None:
    """Train straight on in OUT/straight; in OUT/killed be killed in the fourth step, between checkpoints."""
    dit.train(tiny_dit(out / "straight", run=TWO_STEPS))
    original, calls = dit.train_step, 0

    def step(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    dit.train_step = step
    dit.train(tiny_dit(out / "killed", run=TWO_STEPS))


def resume(out: Path) -> None:
    """Give the command of the killed run once more."""
    dit.train(tiny_dit(out / "killed", run=TWO_STEPS))


if __name__ == "__main__":
    {"ranks": ranks, "crash": crash, "resume": resume}[sys.argv[1]](Path(sys.argv[2]))

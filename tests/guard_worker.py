"""What the tests of the guards start as two processes: `guard_worker.py OUT`, under a launcher."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from training_plain import BATCH, tiny_dit

from vadit import cli
from vadit.config import GuardSpec
from vadit.runtime import distributed
from vadit.runtime.errors import RunError
from vadit.train import dit, engine, loop

EVERY_STEP = {"save_every_images": BATCH, "keep_checkpoints": 9}


def skips(out: Path) -> None:
    """In each stage: a NaN loss in the third step of rank 1, a NaN gradient in its fourth, a spike in its fifth."""
    original = dit.flow.loss

    for zero_stage in (0, 1, 2, 3):
        calls = 0

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            loss = original(*args, **kwargs)
            total = loss.total
            if distributed.rank() == 1:
                if calls == 12:
                    total = total + total.detach() * math.nan
                elif calls == 13:
                    total = total + (total - total).sqrt()
                elif calls == 14:
                    total = total * 1e6
            return dataclasses.replace(loss, total=total)

        dit.flow.loss = broken
        config = tiny_dit(out / f"dit-{zero_stage}", steps=13, zero_stage=zero_stage, run=EVERY_STEP)
        dit.train(dataclasses.replace(config, guard=GuardSpec(spike_window=8)))
    dit.flow.loss = original


def rollback(out: Path) -> None:
    """Rank 1 fails in its fourth and fifth step."""
    original, calls = dit.flow.loss, 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = original(*args, **kwargs)
        bad = calls in (4, 5) and distributed.rank() == 1
        return dataclasses.replace(loss, total=loss.total * math.nan) if bad else loss

    dit.flow.loss = broken
    config = tiny_dit(out / "rollback", run={"save_every_images": 2 * BATCH})
    dit.train(dataclasses.replace(config, guard=GuardSpec(max_skips_in_row=2)))
    dit.flow.loss = original


def stop(out: Path) -> None:
    """Rank 1 gets SIGTERM twice in its third step."""
    original, calls = dit.train_step, 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    dit.train_step = step  # type: ignore[assignment]
    try:
        dit.train(tiny_dit(out / "stop", steps=1000))
    except loop.Stopped as stopped:
        code = cli._report(stopped, debug=False)
        (out / f"stop-{distributed.rank()}").write_text(f"{code} {stopped}")
    dit.train_step = original


def damage(out: Path) -> None:
    """Rank 1 cannot read its third batch."""
    original, calls = dit.train_step, 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and distributed.rank() == 1:
            raise RunError("the shard latents-00007.safetensors is damaged")
        return original(*args)

    dit.train_step = step  # type: ignore[assignment]
    dit.train(tiny_dit(out / "damage", steps=1000, run=EVERY_STEP))


def main() -> int:
    """Everything in one launch; ends with the exit code of the damaged run."""
    out = Path(sys.argv[1])
    for task in (skips, rollback, stop):
        task(out)
    try:
        damage(out)
    except BaseException as error:
        return cli._report(error, debug=False)
    finally:
        engine.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the tests of the guards start as two processes: `guard_worker.py OUT`, under a launcher."""

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from guard_help import counted, spoiled
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

    def broken(number: int, loss: Any) -> Any:
        if distributed.rank() == 0 or number not in (12, 13, 14):
            return loss
        bad_gradient = loss | {"loss": loss["loss"] + (loss["loss"] - loss["loss"]).sqrt()}
        return bad_gradient if number == 13 else spoiled(loss, math.nan if number == 12 else 1e6)

    for zero_stage in (0, 1, 2, 3):
        dit.flow.loss = counted(original, after=broken)
        config = tiny_dit(out / f"dit-{zero_stage}", steps=13, zero_stage=zero_stage, run=EVERY_STEP)
        dit.train(dataclasses.replace(config, guard=GuardSpec(spike_window=8)))
    dit.flow.loss = original


def rollback(out: Path) -> None:
    """Rank 1 fails in its fourth and fifth step."""
    original, failing = dit.flow.loss, (4, 5) if distributed.rank() == 1 else ()
    dit.flow.loss = counted(original, after=lambda number, loss: spoiled(loss) if number in failing else loss)
    config = tiny_dit(out / "rollback", run={"save_every_images": 2 * BATCH})
    dit.train(dataclasses.replace(config, guard=GuardSpec(max_skips_in_row=2)))
    dit.flow.loss = original


def stop(out: Path) -> None:
    """Rank 1 gets SIGTERM twice in its third step."""
    original = dit.train_step

    def twice(number: int) -> None:
        for _ in range(2 if number == 3 and distributed.rank() == 1 else 0):
            os.kill(os.getpid(), signal.SIGTERM)

    dit.train_step = counted(original, twice)  # type: ignore[assignment]
    try:
        dit.train(tiny_dit(out / "stop", steps=1000))
    except loop.Stopped as stopped:
        code = cli._report(stopped, debug=False)
        (out / f"stop-{distributed.rank()}").write_text(f"{code} {stopped}")
    dit.train_step = original


def damage(out: Path) -> None:
    """Rank 1 cannot read its third batch."""

    def unreadable(number: int) -> None:
        if number == 3 and distributed.rank() == 1:
            raise RunError("the shard latents-00007.safetensors is damaged")

    dit.train_step = counted(dit.train_step, unreadable)  # type: ignore[assignment]
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

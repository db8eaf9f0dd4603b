"""What the tests start as processes of their own: `training_worker.py TASK OUT`, `ranks` under a launcher."""

import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from guard_help import counted
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit.config import EvaluationSpec, StageSpec
from vadit.train import dit, engine, tokenizer


def ranks(out: Path) -> None:
    """Both networks at ZeRO 1, 2, 3, in the same processes; the generator is looked at in the end."""
    for zero_stage in (1, 2, 3):
        tokenizer.train(tiny_tokenizer(out / f"tokenizer-{zero_stage}", steps=2, zero_stage=zero_stage))
        looked_at = dataclasses.replace(LOOK, tokenizer=str(out / f"tokenizer-{zero_stage}"))
        config = tiny_dit(out / f"dit-{zero_stage}", zero_stage=zero_stage)
        dit.train(dataclasses.replace(config, evaluation=looked_at))
        with mock.patch.object(engine, "MAX_BUCKET", 5_000):  # a step takes many of them, some hold one weight
            dit.train(tiny_dit(out / f"dit-{zero_stage}-buckets", zero_stage=zero_stage))
    for network, stage, precision in RESUMED:
        killed_and_resumed(network, out / f"{network}-resumed", zero_stage=stage, precision=precision)
    engine.finish()


LOOK = EvaluationSpec(every_images=1 << 30, tokenizer="its path", grid_images=70, steps=2)
"""At the end of a run, and at more samples than one process draws together."""


class Killed(Exception):
    """The end of a run, played."""


def killed_and_resumed(network: str, folder: Path, **settings: Any) -> None:
    """A run straight on in FOLDER/straight; in FOLDER/killed one that ends in its fourth step and begins again."""
    module, make = {"dit": (dit, tiny_dit), "tokenizer": (tokenizer, tiny_tokenizer)}[network]
    every = {"save_every_images": 2 * BATCH}
    module.train(make(folder / "straight", steps=4, run=every, **settings))
    config = make(folder / "killed", steps=4, run=every, **settings)
    original = module.train_step

    def die(step: int) -> None:
        if step == 4:
            raise Killed

    module.train_step = counted(original, die)
    with contextlib.suppress(Killed):
        module.train(config)
    module.train_step = original
    module.train(config)


def dies_between_stages(out: Path) -> None:
    """A tokenizer in stages, whose second process is killed while it builds the networks of the second stage."""
    config = dataclasses.replace(
        tiny_tokenizer(out / "run"), stages=tuple(StageSpec(total_images=2 * BATCH) for _ in range(2))
    )

    def die(stage: int) -> None:
        if stage == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(tokenizer, "_build", counted(tokenizer._build, die)):
        tokenizer.train(config)


RESUMED = [("dit", 2, "bf16"), ("tokenizer", 1, "fp32")]


if __name__ == "__main__":
    tasks = {task.__name__: task for task in (ranks, dies_between_stages)}
    tasks[sys.argv[1]](Path(sys.argv[2]))

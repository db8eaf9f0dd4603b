"""What the tests start as processes of their own: `training_worker.py TASK OUT`, `ranks` under a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
import torch
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
    original, calls = module.train_step, 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return original(*args)

    module.train_step = step
    with contextlib.suppress(Killed):
        module.train(config)
    module.train_step = original
    module.train(config)


def dies_between_stages(out: Path) -> None:
    """A tokenizer in stages, whose second process is killed while it builds the networks of the second stage."""
    config = dataclasses.replace(
        tiny_tokenizer(out / "run"), stages=tuple(StageSpec(total_images=2 * BATCH) for _ in range(2))
    )
    build, calls = tokenizer._build, 0

    def build_once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return build(*args)

    with mock.patch.object(tokenizer, "_build", build_once):
        tokenizer.train(config)


RESUMED = [("dit", 2, "bf16"), ("tokenizer", 1, "fp32")]


TWO_STEPS = {"save_every_images": 2 * BATCH, "background_saves": False}  # a kill at step 4 finds step 2 on disk


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
    tasks = {task.__name__: task for task in (ranks, dies_between_stages, crash, resume)}
    tasks[sys.argv[1]](Path(sys.argv[2]))

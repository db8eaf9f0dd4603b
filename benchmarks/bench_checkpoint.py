"""What checkpoints cost a run: python benchmarks/bench_checkpoint.py [--device cpu|cuda] [--rounds 7] [--folder DIR].

A generator trains in rounds of equally many steps, in turns without and with a save at their beginning, in the
background as a run does it. The cost of a save is what its round takes longer than the mean of the two beside it: the
stall (the search for weights that are not finite, the copy to host memory) and what the writer takes from the steps
after it (hashing, the disk). A round is long enough for the writer to end within it; the row has how long it wrote.

share: the cost over the time of as many steps as the recipe has between two saves, at the speed of the step here.
Rows: benchmarks/results/checkpoints-HARDWARE.csv.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import harness
import torch
from bench_guard import MODELS, Training, arguments

from vadit.recipes import get_recipe
from vadit.train.checkpoint.checkpoints import Checkpoints, Position
from vadit.train.guard import not_finite
from vadit.train.loop import weight_sums

RECIPE = "lightningdit-xl-64ep"  # Whose distance between two saves the share is for.
ROUND_OF_WRITER = 1.5  # A round takes so many times as long as the writer.


class Run:
    """A generator in training, and its checkpoints."""

    def __init__(self, training: Training, folder: Path) -> None:
        self.training, self.engines, self._done = training, {"model": training.engine}, 0
        self.checkpoints = Checkpoints(folder / "checkpoints", engines=self.engines, ema=training.ema)
        self.checkpoints.restore()

    def steps(self, count: int, *, save: bool = False) -> float:
        """Seconds of `count` steps, with a save before them or without; the device has ended them."""
        begin = time.perf_counter()
        if save:
            assert not_finite(weight_sums(self.engines, self.training.engine.device)) is None, "weights are finite"
            self.checkpoints.save(Position(self._done, self._done), {}, self.training.guard.state_dict())
        for _ in range(count):
            self.training()
            self._done += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def ended(self) -> dict[str, float]:
        """Wait for the writer: save_stall_ms and save_write_ms of the last save."""
        self.checkpoints._settle()
        return self.checkpoints.log_values()


def measure(run: Run, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of steps, costs, stalls and writing, a value per round with a save; `count`: steps of a round."""
    run.steps(2)
    once = statistics.median(run.steps(1) for _ in range(3))
    for _ in range(2):  # the first one makes the host's copies
        run.steps(1, save=True)
        written = run.ended()["save_write_ms"] / 1e3
    count = max(3, round(ROUND_OF_WRITER * written / once))
    found: dict[str, list[float]] = {"step": [], "cost": [], "stall": [], "write": [], "count": [count]}
    before = run.steps(count)
    for _ in range(rounds):
        with_save, costs, after = run.steps(count, save=True), run.ended(), run.steps(count)
        found["step"].append((before + after) / 2 / count * 1e3)
        found["cost"].append((with_save - (before + after) / 2) * 1e3)
        found["stall"].append(costs["save_stall_ms"])
        found["write"].append(costs["save_write_ms"])
        before = after
    return found


def main() -> None:
    """Measure, print, save."""
    options = arguments(__doc__, rounds=7, stages=[1])
    recipe = get_recipe(RECIPE).run
    between = recipe.save_every_images // recipe.batch_size
    stamp = harness.stamp(options.device, ("../vadit", "../benchmarks/*.py"), "deepspeed")
    stamp["threads"] = options.threads
    rows = []
    for name in MODELS[options.device]:
        for zero_stage in options.stages:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                training = Training(torch.device(options.device), name, zero_stage, Path(folder))
                found = measure(Run(training, Path(folder)), options.rounds)
                size = sum(file.stat().st_size for file in next(Path(folder).glob("checkpoints/step-*")).iterdir())
            step, cost, stall, write = (statistics.median(found[part]) for part in ("step", "cost", "stall", "write"))
            q1, _, q3 = statistics.quantiles(found["cost"], n=4)
            rows.append(stamp | {
                "model": name, "zero_stage": zero_stage, "batch": training.batch, "megabytes": round(size / 1e6, 1),
                "step_ms": round(step, 1), "stall_ms": round(stall, 1), "write_ms": round(write, 1),
                "cost_ms": round(cost, 1), "q1_ms": round(q1, 1), "q3_ms": round(q3, 1), "steps_between": between,
                "share": round(cost / (between * step), 6), "steps_for_1_percent": round(cost / (0.01 * step)),
                "rounds": options.rounds, "steps_per_round": int(found["count"][0]),
            })  # fmt: skip
            print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ", flush=True)
    if not options.no_save:
        harness.append(harness.RESULTS / f"checkpoints-{stamp['hardware']}.csv", rows)


if __name__ == "__main__":
    main()

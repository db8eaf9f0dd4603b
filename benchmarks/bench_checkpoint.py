"""What checkpoints cost a run: python benchmarks/bench_checkpoint.py [--device cpu|cuda] [--rounds 7] [--folder DIR].

A generator trains in rounds of equally many steps, in turns without and with a save at their beginning, in the
background as a run does it. The cost of a save is what its round takes longer than the mean of the two beside it: the
stall (the search for weights that are not finite, the copy to host memory) and what the writer takes from the steps
after it (hashing, the disk). A round is long enough for the writer to end within it; the row tells how long it wrote.

share: the cost over the time of as many steps as the recipe has between two saves, at the speed of the step here.
Rows: benchmarks/results/checkpoints-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import harness
import torch
from bench_guard import MODELS

from vadit.config import DiTSpec, EngineSpec, FlowSpec, GuardSpec, OptimizerSpec
from vadit.models.dit import LightningDiT
from vadit.objectives import flow
from vadit.recipes import get_recipe
from vadit.train.checkpoint.checkpoints import Checkpoints, Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine
from vadit.train.guard import Guard, not_finite
from vadit.train.loop import weight_sums

RECIPE = "lightningdit-xl-64ep"
"""Whose distance between two saves the share is for."""
ROUND_OF_WRITER = 1.5
"""A round takes so many times as long as the writer."""


@dataclass(frozen=True)
class Row(harness.Stamp):
    """One line of the CSV; medians over rounds, times in milliseconds."""

    threads: int
    model: str
    zero_stage: int
    batch: int
    megabytes: float
    step_ms: float
    stall_ms: float
    write_ms: float
    cost_ms: float
    q1_ms: float
    q3_ms: float
    steps_between: int
    share: float
    steps_for_1_percent: int
    rounds: int
    steps_per_round: int


class Run:
    """A generator in training, with an average and guards, and its checkpoints."""

    def __init__(self, device: torch.device, model: DiTSpec, batch: int, zero_stage: int, folder: Path) -> None:
        torch.manual_seed(0)
        precision = "autocast" if device.type == "cuda" else "fp32"
        self.device = device
        self.engine = Engine(
            LightningDiT(model).to(device).train(),
            optimizer=OptimizerSpec(lr=1e-5),
            spec=EngineSpec(zero_stage=zero_stage, precision=precision),  # type: ignore[arg-type]
            global_batch=batch,
            device=device,
        )
        self.ema, self.guard = ShardedEMA(self.engine, (0.9999,)), Guard(GuardSpec(), folder)
        self.checkpoints = Checkpoints(folder / "checkpoints", engines={"model": self.engine}, ema=self.ema, keep=2)
        self.checkpoints.restore()
        self._latents = torch.randn(batch, model.in_channels, model.input_size, model.input_size, device=device)
        self._labels = torch.randint(0, model.num_classes, (batch,), device=device)
        self._done = 0

    def steps(self, count: int, *, save: bool = False) -> float:
        """Seconds of `count` steps, with a save before them or without; the device has ended them."""
        begin = time.perf_counter()
        if save:
            assert not_finite(weight_sums({"model": self.engine}, self.device)) is None, "the weights are finite"
            self.checkpoints.save(Position(self._done, self._done), {}, self.guard.state_dict())
        for _ in range(count):
            self.engine.begin_step(1e-5)

            def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return self.engine(x, t, y).float()

            loss = flow.training_loss(FlowSpec(), network, self._latents, self._labels, images_seen=0).total
            self.engine.backward(loss)
            if self.guard.step({"model": self.engine}):
                self.ema.update()
            self._done += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def ended(self) -> dict[str, float]:
        """Wait for the writer: save_stall_ms and save_write_ms of the last save."""
        self.checkpoints._settle()
        return self.checkpoints.log_values()


def measure(run: Run, rounds: int) -> dict[str, list[float]]:
    """Seconds of steps, costs, stalls and writing, a value per round with a save."""
    run.steps(2)
    once = statistics.median(run.steps(1) for _ in range(3))
    for _ in range(2):  # the first one makes the host's copies
        run.steps(1, save=True)
        written = run.ended()["save_write_ms"] / 1e3
    count = max(3, round(ROUND_OF_WRITER * written / once))
    found: dict[str, list[float]] = {"step": [], "cost": [], "stall": [], "write": [], "count": [count]}
    before = run.steps(count)
    for _ in range(rounds):
        with_save = run.steps(count, save=True)
        told = run.ended()
        after = run.steps(count)
        found["step"].append((before + after) / 2 / count)
        found["cost"].append(with_save - (before + after) / 2)
        found["stall"].append(told["save_stall_ms"] / 1e3)
        found["write"].append(told["save_write_ms"] / 1e3)
        before = after
    return found


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="saves that are measured")
    parser.add_argument("--stages", type=int, nargs="*", default=[1])
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, recipe = torch.device(options.device), get_recipe(RECIPE).run
    between = recipe.save_every_images // recipe.batch_size
    rows = []
    for name, (depth, width, heads, side, batch) in MODELS[options.device].items():
        model = DiTSpec(depth=depth, hidden_size=width, num_heads=heads, patch_size=1, in_channels=32, input_size=side)
        for zero_stage in options.stages:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                run = Run(device, model, batch, zero_stage, Path(folder))
                found = measure(run, options.rounds)
                size = sum(file.stat().st_size for file in next(Path(folder).glob("checkpoints/step-*")).iterdir())
            step, cost = statistics.median(found["step"]), statistics.median(found["cost"])
            q1, _, q3 = statistics.quantiles(found["cost"], n=4)
            row = Row(
                date=datetime.date.today().isoformat(),
                commit=harness.commit("../vadit", "../benchmarks/*.py"),
                hardware=harness.hardware(options.device),
                versions=harness.versions(options.device, "deepspeed"),
                threads=options.threads,
                model=name,
                zero_stage=zero_stage,
                batch=batch,
                megabytes=round(size / 1e6, 1),
                step_ms=round(step * 1e3, 1),
                stall_ms=round(statistics.median(found["stall"]) * 1e3, 1),
                write_ms=round(statistics.median(found["write"]) * 1e3, 1),
                cost_ms=round(cost * 1e3, 1),
                q1_ms=round(q1 * 1e3, 1),
                q3_ms=round(q3 * 1e3, 1),
                steps_between=between,
                share=round(cost / (between * step), 6),
                steps_for_1_percent=round(cost / (0.01 * step)),
                rounds=options.rounds,
                steps_per_round=int(found["count"][0]),
            )
            rows.append(row)
            print(
                f"{name} ZeRO {zero_stage}: {row.megabytes:,.0f} MB, step {row.step_ms:,.0f} ms; a save stalls "
                f"{row.stall_ms:,.0f} ms, writes for {row.write_ms:,.0f} ms and costs {row.cost_ms:,.0f} ms "
                f"({row.q1_ms:,.0f}-{row.q3_ms:,.0f}): {row.share:.3%} at {between:,} steps between two saves, 1% at "
                f"{row.steps_for_1_percent:,}",
                flush=True,
            )
    if not options.no_save:
        path = harness.RESULTS / f"checkpoints-{harness.hardware(options.device)}.csv"
        harness.append(path, rows)
        print(f"rows written to {path}")


if __name__ == "__main__":
    main()

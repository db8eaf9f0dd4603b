"""What the guards and the averages cost a training step: python benchmarks/bench_guard.py [--device cpu|cuda].

One generator is trained four ways in turns: as DeepSpeed does it, with the guards, with an average of the weights
(EMA), with both. Each way has an engine of its own, over equal weights and the same batch; that of the ways without
guards is given DeepSpeed's own methods back. A CPU's times are those of the process, which other work on the machine
disturbs less than the clock; a GPU's are of events. Ratios are taken within a round. What a step takes more is far
below the noise of a step, so the parts are timed alone, too: `alone_ms` is the verdict on one step (the check of the
loss, the quantile, the veto, the window), or one update of the average. Rows: benchmarks/results/guard-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch

from vadit.config import DiTSpec, EngineSpec, FlowSpec, GuardSpec, OptimizerSpec
from vadit.models.dit import LightningDiT
from vadit.objectives import flow
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine
from vadit.train.guard import Guard

MODELS = {
    # depth, width, heads, latents' side, batch
    "cpu": {"S": (6, 384, 6, 16, 4)},
    "cuda": {"B": (12, 768, 12, 16, 64), "XL": (28, 1152, 16, 16, 32)},
}
WAYS = {"plain": (False, False), "guard": (True, False), "ema": (False, True), "guard+ema": (True, True)}


def step(
    device: torch.device, model: DiTSpec, batch: int, zero_stage: int, *, guarded: bool, averaged: bool
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """One training step of a new network, and the guard's or the average's part of it alone."""
    torch.manual_seed(0)
    spec = EngineSpec(zero_stage=zero_stage, precision="autocast" if device.type == "cuda" else "fp32")  # type: ignore[arg-type]
    engine = Engine(
        LightningDiT(model).to(device).train(),
        optimizer=OptimizerSpec(lr=1e-5),
        spec=spec,
        global_batch=batch,
        device=device,
    )
    if not guarded:
        for owner in (engine._engine, engine._engine.optimizer):
            for name in ("clip_fp32_gradients", "scaled_global_norm", "check_overflow", "_get_norm_groups", "step"):
                owner.__dict__.pop(name, None)
    ema = ShardedEMA(engine, (0.9999,) if averaged else ())
    guard = Guard(GuardSpec(), Path(tempfile.gettempdir()))
    latents = torch.randn(batch, model.in_channels, model.input_size, model.input_size, device=device)
    labels = torch.randint(0, model.num_classes, (batch,), device=device)

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return engine(x, t, y).float()

    def one() -> None:
        engine.begin_step(1e-5)
        loss = flow.training_loss(FlowSpec(), network, latents, labels, images_seen=0).total
        if guarded:
            engine.backward(loss)
            applied = guard.step({"model": engine})
        else:
            engine._engine.backward(loss)
            engine._engine.step()
            applied = engine._engine.was_step_applied()
        if applied:
            ema.update()

    def verdict() -> None:
        loss * torch.where(torch.isfinite(loss), 1.0, math.nan)
        torch.where(guard._judge({"model": norm}), math.inf, norm)

    loss, norm = torch.ones((), device=device, requires_grad=True), torch.ones((), device=device)
    return one, verdict if guarded and not averaged else ema.update if averaged and not guarded else None


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Time of one call."""
    if device.type == "cuda":
        return harness.Clock("cuda")(call, repeats)
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats * 1e3


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--stages", type=int, nargs="*", default=[0, 1, 3])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = []
    for name, (depth, width, heads, side, batch) in MODELS[options.device].items():
        model = DiTSpec(depth=depth, hidden_size=width, num_heads=heads, patch_size=1, in_channels=32, input_size=side)
        for zero_stage in options.stages:
            steps = {
                way: step(device, model, batch, zero_stage, guarded=guarded, averaged=averaged)
                for way, (guarded, averaged) in WAYS.items()
            }
            alone = {way: part for way, (_, part) in steps.items() if part is not None}
            parts = {
                way: statistics.median(milliseconds(part, device, 50) for _ in range(9)) for way, part in alone.items()
            }
            calls = {way: call for way, (call, _) in steps.items()}
            for call in calls.values():
                call()
            times: dict[str, list[float]] = {way: [] for way in calls}
            for _ in range(options.rounds):
                for way, call in calls.items():
                    times[way].append(milliseconds(call, device))
            plain = statistics.median(times["plain"])
            for way, values in times.items():
                q1, median, q3 = statistics.quantiles(values, n=4)
                # Of the rounds' own ratios: what slows a round down slows all of its ways down.
                ratio = statistics.median(value / base for value, base in zip(values, times["plain"], strict=True))
                row = {
                    "model": name,
                    "batch": batch,
                    "zero_stage": zero_stage,
                    "way": way,
                    "median_ms": round(median, 3),
                    "q1_ms": round(q1, 3),
                    "q3_ms": round(q3, 3),
                    "ratio_of_medians": round(median / plain, 4),
                    "median_of_ratios": round(ratio, 4),
                    "alone_ms": round(parts[way], 4) if way in parts else "",
                    "alone_share": round(parts[way] / plain, 6) if way in parts else "",
                    "rounds": options.rounds,
                    "threads": options.threads,
                    "hardware": harness.hardware(options.device),
                }
                rows.append(row)
                print(*row.values(), flush=True)
    if not options.no_save:
        path = harness.RESULTS / f"guard-{harness.hardware(options.device)}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(f"rows written to {path}")


if __name__ == "__main__":
    main()

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
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
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


class Training:
    """A new generator, its guard and its average; call it for one training step. `way`: of WAYS."""

    def __init__(self, device: torch.device, name: str, zero_stage: int, folder: Path, way: str = "guard+ema") -> None:
        self.guarded, averaged = WAYS[way]
        torch.manual_seed(0)
        depth, width, heads, side, self.batch = MODELS[device.type][name]
        model = DiTSpec(depth=depth, hidden_size=width, num_heads=heads, patch_size=1, in_channels=32, input_size=side)
        precision = "autocast" if device.type == "cuda" else "fp32"
        self.engine = Engine(
            LightningDiT(model).to(device).train(),
            optimizer=OptimizerSpec(lr=1e-5),
            spec=EngineSpec(zero_stage=zero_stage, precision=precision, max_grad_norm=0.0),  # type: ignore[arg-type]
            global_batch=self.batch,
            device=device,
        )
        if not self.guarded:
            deepspeed = self.engine._engine
            ours = ("clip_fp32_gradients", "scaled_global_norm", "check_overflow", "_get_norm_groups", "step")
            for owner in (deepspeed, deepspeed.optimizer):
                for method in ours:
                    owner.__dict__.pop(method, None)
        self.ema = ShardedEMA(self.engine, (0.9999,) if averaged else ())
        self.guard = Guard(GuardSpec(), folder)
        self.latents = torch.randn(self.batch, model.in_channels, side, side, device=device)
        self.labels = torch.randint(0, model.num_classes, (self.batch,), device=device)

    def __call__(self) -> None:
        self.engine.begin_step(1e-5)
        self.ema.begin_step(0)
        drawn = flow.draw(FlowSpec(), self.latents, images_seen=0)
        loss = flow.loss(FlowSpec(), drawn, self.engine(drawn.x_t, drawn.t, self.labels).float())["loss"]
        if self.guarded:
            self.engine.backward(loss)
            applied = self.guard.step({"model": self.engine})
        else:
            self.engine._engine.backward(loss)
            self.engine._engine.step()
            applied = self.engine._engine.was_step_applied()
        if applied:
            self.ema.update(0)

    def verdict(self) -> None:
        """The guard's part of a step alone."""
        loss = torch.ones((), device=self.latents.device, requires_grad=True)
        loss * torch.where(torch.isfinite(loss), 1.0, math.nan)
        norm = loss.detach()
        torch.where(self.guard._judge({"model": norm}), math.inf, norm)


def arguments(description: str | None, *, rounds: int, stages: list[int]) -> argparse.Namespace:
    """The command line of both benchmarks of a run."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--stages", type=int, nargs="*", default=stages)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Time of one call."""
    if device.type == "cuda":
        return harness.Clock("cuda")(call, repeats)
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats * 1e3


def rows(device: torch.device, name: str, zero_stage: int, rounds: int, folder: Path) -> Iterator[dict[str, object]]:
    """A row per way."""
    calls = {way: Training(device, name, zero_stage, folder, way) for way in WAYS}
    parts = {"guard": calls["guard"].verdict, "ema": lambda: calls["ema"].ema.update(0)}
    alone = {way: statistics.median(milliseconds(part, device, 50) for _ in range(9)) for way, part in parts.items()}
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            times[way].append(milliseconds(call, device))
    plain = statistics.median(times["plain"])
    for way, values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4)
        yield {
            "model": name, "batch": calls[way].batch, "zero_stage": zero_stage, "way": way,
            "median_ms": round(median, 3), "q1_ms": round(q1, 3), "q3_ms": round(q3, 3),
            "ratio_of_medians": round(median / plain, 4),
            # Of the rounds' own ratios: what slows a round down slows all of its ways down.
            "median_of_ratios": round(statistics.median(v / b for v, b in zip(values, times["plain"], strict=True)), 4),
            "alone_ms": round(alone[way], 4) if way in alone else "",
            "alone_share": round(alone[way] / plain, 6) if way in alone else "",
            "rounds": rounds,
        }  # fmt: skip


def main() -> None:
    """Measure, print, save."""
    options = arguments(__doc__, rounds=25, stages=[0, 1, 3])
    what = {"threads": options.threads, "hardware": harness.hardware(options.device)}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS[options.device]:
            for zero_stage in options.stages:
                for row in rows(torch.device(options.device), name, zero_stage, options.rounds, Path(folder)):
                    found.append(row | what)
                    print(*found[-1].values(), flush=True)
    if not options.no_save:
        harness.write(harness.RESULTS / f"guard-{what['hardware']}.csv", found)


if __name__ == "__main__":
    main()

"""What of the scaling model can be checked on one machine: `python benchmarks/scaling.py --validate`.

Bytes: two real processes train a small LightningDiT over gloo under every ZeRO stage; every collective of a step is
counted where torch hands it to the process group, whoever calls it, and compared with `scaling.messages`. Time: the
step of a process that sends nothing, beside another such one, and gloo's latency and bandwidth measured here, predict
the step of two processes. The two wait for each other in every step, which the prediction leaves out.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scaling import PERSISTENT, Message, messages

from vadit.config import DiTSpec, EngineSpec, OptimizerSpec
from vadit.runtime import distributed

SPEC = DiTSpec(input_size=8, patch_size=1, in_channels=8, hidden_size=192, depth=3, num_heads=4)
BATCH = 4
"""Images per process and micro-batch."""
ROUNDS, STEPS = 5, 18
"""Starts of the processes, in turns, and steps of each, for times."""
SMALL = 4096
"""Bytes of a collective below which it is housekeeping: norms, flags, barriers."""
KINDS = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
}
"""Methods of torch's process groups, of this release and those before, by what they send."""


class Counter:
    """Bytes and number of collectives by kind: whole tensors, as `scaling.Message` counts them."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        for name, kind in KINDS.items():
            if hasattr(dist.ProcessGroup, name):
                setattr(dist.ProcessGroup, name, self._wrapped(getattr(dist.ProcessGroup, name), kind))

    def _wrapped(self, original: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            size = max(_size(argument) for argument in [*arguments, *options.values()])
            if size > SMALL:
                self.bytes[kind] = self.bytes.get(kind, 0) + size
                self.calls[kind] = self.calls.get(kind, 0) + 1
            return original(group, *arguments, **options)

        return call

    def clear(self) -> None:
        self.bytes.clear()
        self.calls.clear()


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def worker(stage: int, precision: str, accumulation: int, steps: int, gloo: bool = True) -> dict[str, Any]:
    """Train `steps` steps; bytes of the last one, the median time of a step, and the sizes of what was trained."""
    torch.set_num_threads(1)
    from vadit.models.dit import LightningDiT
    from vadit.train.engine import Engine, finish, start

    device = torch.device("cpu")
    start(device)
    counter = Counter()
    spec = EngineSpec(zero_stage=stage, precision=precision, gradient_accumulation=accumulation)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = LightningDiT(SPEC).train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numels = [weight.numel() for weight in weights]
    batch = BATCH * distributed.world_size() * accumulation
    engine = Engine(model, optimizer=OptimizerSpec(), spec=spec, global_batch=batch, device=device)
    x = torch.randn(BATCH, SPEC.in_channels, SPEC.input_size, SPEC.input_size).to(engine.compute_dtype())
    t, y = torch.rand(BATCH), torch.zeros(BATCH, dtype=torch.long)
    times = []
    for _ in range(steps):
        counter.clear()
        distributed.barrier()
        begin = time.perf_counter()
        engine.begin_step(1e-4)
        for _ in range(accumulation):
            engine.backward(engine(x, t, y).float().square().mean())
            engine.step()
        times.append(time.perf_counter() - begin)
    found = {
        "numels": numels,
        "bytes": dict(counter.bytes),
        "calls": dict(counter.calls),
        "step_ms": 1e3 * statistics.median(times[len(times) // 3 :]),
    }
    if gloo and distributed.world_size() > 1 and stage == 1:
        found["gloo"] = _gloo()
    finish()
    return found


def _gloo() -> dict[str, list[float]]:
    """(seconds of latency, bytes per second of payload) of each collective, from two sizes."""
    world = distributed.world_size()
    found = {}
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        medians = []
        sizes = (2**14, 2**24)
        for size in sizes:
            whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // world)
            calls: dict[str, Callable[[], object]] = {
                "all_reduce": partial(dist.all_reduce, whole),
                "all_gather": partial(dist.all_gather_into_tensor, whole, part),
                "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole),
            }
            times = []
            for _ in range(15):
                dist.barrier()
                begin = time.perf_counter()
                calls[kind]()
                times.append(time.perf_counter() - begin)
            medians.append(statistics.median(times))
        speed = (sizes[1] - sizes[0]) / max(medians[1] - medians[0], 1e-9)
        found[kind] = [max(medians[0] - sizes[0] / speed, 0.0), speed]
    return found


def launch(world: int, *, groups: int = 1, **settings: Any) -> dict[str, Any]:
    """What `worker` tells in the first of `world` processes; of several such groups side by side, in the first."""
    processes = []
    for _ in range(groups):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONSAFEPATH": "",  # this script imports what lies beside it
            }
            command = [sys.executable, __file__, json.dumps(settings)]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (_, error) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"a process of {settings} ended with {process.returncode}:\n{error[-3000:]}")
    found: dict[str, Any] = json.loads(outputs[0][0].strip().splitlines()[-1])
    return found


def expected(stage: int, precision: str, accumulation: int, numels: list[int]) -> list[Message]:
    """The formula for a network whose trained weights have `numels` elements."""
    number, whole = 2 if precision == "bf16" else 4, sum(n for n in numels if n <= PERSISTENT)
    return messages(stage, sum(numels), number=number, accumulation=accumulation, whole=whole)


def compare(stage: int, precision: str, accumulation: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of formula against count, one per kind of collective, counted kinds that the formula lacks included."""
    formula = {message.kind: message for message in expected(stage, precision, accumulation, found["numels"])}
    rows = []
    for kind in sorted({*formula, *found["bytes"]}):
        predicted, counted = formula.get(kind, Message(kind, 0)).num_bytes, found["bytes"].get(kind, 0)
        row = {"stage": stage, "precision": precision, "accumulation": accumulation, "what": f"bytes of {kind}"}
        rows.append(
            row | {"formula": round(predicted), "measured": counted, "ratio": round(predicted / max(counted, 1), 4)}
        )
    return rows


def main(path: Path) -> None:
    """Print and save the table."""
    rows: list[dict[str, Any]] = []
    gloo: list[dict[str, list[float]]] = []
    cases = [
        (0, "fp32", 1),
        (1, "fp32", 1),
        (2, "fp32", 1),
        (3, "fp32", 1),
        (3, "bf16", 1),
        (2, "fp32", 2),
        (3, "fp32", 2),
    ]
    for stage, precision, accumulation in cases:
        two = launch(2, stage=stage, precision=precision, accumulation=accumulation, steps=2)
        rows += compare(stage, precision, accumulation, two)
    measured: dict[int, list[float]] = {stage: [] for stage in range(4)}
    alone: dict[int, list[float]] = {stage: [] for stage in range(4)}
    calls: dict[int, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for stage in range(4):
            settings = {"stage": stage, "precision": "fp32", "accumulation": 1, "steps": STEPS}
            calls[stage] = launch(2, **settings)
            measured[stage].append(calls[stage]["step_ms"])
            # Arithmetic alone, while another process has the other core: memory and clock are shared, nothing is sent.
            alone[stage].append(launch(1, groups=2, **settings)["step_ms"])
            gloo += [calls[stage]["gloo"]] if "gloo" in calls[stage] else []
    for stage, two in calls.items():
        predicted = statistics.median(alone[stage])
        for message in expected(stage, "fp32", 1, two["numels"]):
            latency, speed = (statistics.median(each[message.kind][i] for each in gloo) for i in range(2))
            predicted += 1e3 * (two["calls"].get(message.kind, 1) * latency + message.num_bytes / speed)
        found = statistics.median(measured[stage])
        row = {"stage": stage, "precision": "fp32", "accumulation": 1, "what": "ms per step of two processes"}
        rows.append(
            row | {"formula": round(predicted, 1), "measured": round(found, 1), "ratio": round(predicted / found, 3)}
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print("  ".join(f"{value!s:>14}" for value in row.values()))


if __name__ == "__main__":
    print("\n" + json.dumps(worker(**json.loads(sys.argv[1]))), flush=True)
    # DeepSpeed keeps groups of gloo alive after they were destroyed, and with them their threads. One that lets go of a
    # message's tensor while the interpreter ends cannot have its lock, and takes the process down ("terminate called
    # without an active exception"): all is told, so leave without that end.
    os._exit(0)

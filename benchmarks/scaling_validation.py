"""The bytes of the scaling model against two real processes: python benchmarks/scaling_validation.py

They train a small LightningDiT over gloo under every ZeRO stage; every collective of a step is counted where torch
hands it to the process group, whoever calls it, and compared with `scaling.messages`. How long messages take on GPUs
cannot be checked here. Writes benchmarks/results/scaling-validation.csv.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
from typing import Any

import harness
import torch
from scaling import PERSISTENT, messages
from torch.utils._python_dispatch import TorchDispatchMode

from vadit.config import DiTSpec, EngineSpec, OptimizerSpec
from vadit.runtime import distributed

SPEC = DiTSpec(input_size=8, patch_size=1, in_channels=8, hidden_size=192, depth=3, num_heads=4)
BATCH = 4  # Images per process and micro-batch.
SMALL = 4096  # Bytes of a collective below which it is housekeeping: norms, flags, barriers.
KINDS = {"allreduce": "all_reduce", "allgather": "all_gather", "all_gather": "all_gather",
         "reduce_scatter": "reduce_scatter"}  # fmt: skip
"""Parts of the names of torch's ops on process groups, by what they send."""
CASES = ((0, "fp32", 1), (1, "fp32", 1), (2, "fp32", 1), (3, "fp32", 1), (3, "bf16", 1), (2, "fp32", 2), (3, "fp32", 2))


class Counter(TorchDispatchMode):
    """Bytes of collectives by kind: whole tensors, as `scaling.Message` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (size := max(map(_size, args))) > SMALL:
            name = func.name()
            kind = next((kind for part, kind in KINDS.items() if part in name), name)
            self.bytes[kind] += size
        return func(*args, **(kwargs or {}))


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, (list, tuple)) else 0


def worker(stage: int, precision: str, accumulation: int) -> dict[str, Any]:
    """Train a step, and count what the next one sends; with it, the sizes of what is trained."""
    torch.set_num_threads(1)
    from vadit.models.dit import LightningDiT
    from vadit.train.engine import Engine, finish, start

    device = torch.device("cpu")
    start(device)
    spec = EngineSpec(zero_stage=stage, precision=precision, gradient_accumulation=accumulation)  # type: ignore[arg-type]
    model = LightningDiT(SPEC).train()
    numels = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    batch = BATCH * distributed.world_size() * accumulation
    engine = Engine(model, optimizer=OptimizerSpec(), spec=spec, global_batch=batch, device=device)
    x = torch.randn(BATCH, SPEC.in_channels, SPEC.input_size, SPEC.input_size).to(engine.compute_dtype())
    t, y = torch.rand(BATCH), torch.zeros(BATCH, dtype=torch.long)
    counter = Counter()
    for counting in (contextlib.nullcontext(), counter):
        with counting:
            engine.begin_step(1e-4)
            for _ in range(accumulation):
                engine.backward(engine(x, t, y).float().square().mean())
                engine.step()
    finish()
    return {"numels": numels, "bytes": dict(counter.bytes)}


def launch(**settings: Any) -> dict[str, Any]:
    """What `worker` finds in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    # this script imports what lies beside it
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [*command, json.dumps(settings)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{settings} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compare(stage: int, precision: str, accumulation: int) -> list[dict[str, Any]]:
    """Rows of formula against count, one per kind of collective, counted kinds that the formula lacks included."""
    case = {"stage": stage, "precision": precision, "accumulation": accumulation}
    found = launch(**case)
    whole = sum(numel for numel in found["numels"] if numel <= PERSISTENT)
    number = 2 if precision == "bf16" else 4
    sent = messages(stage, sum(found["numels"]), number=number, accumulation=accumulation, whole=whole)
    formula, counted = {message.kind: round(message.num_bytes) for message in sent}, found["bytes"]
    return [
        case | {"what": f"bytes of {kind}", "formula": formula.get(kind, 0), "measured": counted.get(kind, 0),
                "ratio": round(formula.get(kind, 0) / max(counted.get(kind, 0), 1), 4)}
        for kind in sorted({*formula, *counted})
    ]  # fmt: skip


def main() -> None:
    """Print and save the table."""
    rows = [row for case in CASES for row in compare(*case)]
    harness.write(harness.RESULTS / "scaling-validation.csv", rows)
    for row in rows:
        print("  ".join(f"{value!s:>14}" for value in row.values()))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        found = worker(**json.loads(sys.argv[1]))
        if distributed.is_main():
            print("\n" + json.dumps(found), flush=True)
        # DeepSpeed keeps groups of gloo alive after they were destroyed, and with them their threads. One that lets go
        # of a message's tensor while the interpreter ends cannot have its lock, and takes the process down ("terminate
        # called without an active exception"): all is said, so leave without that end.
        os._exit(0)

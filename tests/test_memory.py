"""The memory that --dry-run tells, against what processes really allocate: within 15% at the fullest moment of a step.

Each case trains a LightningDiT of some ten million weights in processes of its own. Torch's profiler tells of every
allocation and release of the CPU allocator, temporaries in backward and optimizer included: the peak of their sum is
what torch.cuda.max_memory_allocated tells on a GPU. (Resident memory rises alike, but with the libraries' own.)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vadit import memory
from vadit.config import DiTConfig, DiTSpec
from vadit.recipes import get_recipe

TOLERANCE = 0.15


@dataclass(frozen=True)
class Case:
    zero_stage: Literal[0, 1, 2, 3]
    batch: int
    processes: int = 1
    precision: Literal["fp32", "bf16", "autocast"] = "fp32"
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1

    @property
    def config(self) -> DiTConfig:
        config = get_recipe("lightningdit-b")
        assert isinstance(config, DiTConfig)
        spec = DiTSpec(input_size=16, in_channels=32, patch_size=1, hidden_size=384, depth=3, num_heads=6)
        images = self.batch * self.processes * self.gradient_accumulation
        engine = replace(
            config.engine,
            zero_stage=self.zero_stage,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            gradient_accumulation=self.gradient_accumulation,
        )
        return replace(config, model=spec, engine=engine, run=replace(config.run, device="cpu", batch_size=images))


SHORT = [
    Case(0, batch=4),
    Case(3, batch=2, processes=2),
]
LONG = [
    Case(2, batch=1, gradient_checkpointing=True),
    Case(1, batch=4),
    Case(1, batch=2, processes=2),
    Case(1, batch=1, gradient_accumulation=2),
    Case(2, batch=2, processes=2),
    Case(3, batch=4),
    Case(0, batch=1, precision="autocast", gradient_checkpointing=True),
    Case(1, batch=1, precision="bf16"),
    Case(2, batch=2, precision="autocast"),
    Case(3, batch=1, precision="bf16", processes=2),
    Case(3, batch=1, precision="autocast", gradient_checkpointing=True),
]


@pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(case, marks=pytest.mark.faults, id=str(case)) for case in LONG)], ids=str
)
def test_estimate_is_what_processes_hold(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    held = measured(case)
    monkeypatch.setenv("WORLD_SIZE", str(case.processes))
    stage = memory.estimate(case.config, case.processes).stages[case.zero_stage]
    assert stage.total == pytest.approx(held, rel=TOLERANCE), (stage.peak.name, stage.total / held)


def test_moments_of_a_step_differ_by_stage() -> None:
    networks, activations = memory.count(Case(1, batch=1).config)
    none = replace(activations, per_image=0.0, fixed=0.0)
    trained = networks[0].num_trained
    cuda = replace(Case(1, batch=1).config.run, device="cuda")
    config = replace(Case(1, batch=1).config, run=cuda)
    rows = memory.stages(config, networks, none, 64, 1)
    # Without activations ZeRO 1 is fullest once its whole gradients lie beside the bucket that they go to.
    assert rows[1].peak.name == "backward" and rows[1].peak.total == 2 * 4 * trained
    assert rows[2].peak.total == 2 * 4 * trained and rows[2].peak.name == "reduction"
    # ZeRO 3 gathers all weights of a small network, and those to come once more.
    assert rows[3].peak.total == pytest.approx(3 * 4 * trained, rel=0.02)
    assert [row.optimizer for row in rows] == [8 * trained, *[12 * trained / 64] * 3]


# ------------------------------------------------------------------------------------------------ in own processes


def measured(case: Case) -> int:
    """Bytes at the peak, in the first of the case's processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    workers = []
    for rank in range(case.processes):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.processes)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, json.dumps(vars(case))]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    told = [worker.communicate(timeout=900) for worker in workers]
    for worker, (_, error) in zip(workers, told, strict=True):
        assert worker.returncode == 0, error.decode()
    return int(told[0][0].split()[-1])


def train(case: Case) -> int:
    """Train two steps (Adam's moments come in the first) as the trainer does; bytes allocated at the peak."""
    from vadit.models.dit import LightningDiT
    from vadit.train import engine as engines
    from vadit.train.ema import ShardedEMA

    torch.set_num_threads(1)
    config, device = case.config, torch.device("cpu")
    engines.start(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = engines.Engine(
            LightningDiT(config.model, gradient_checkpointing=case.gradient_checkpointing).train(),
            optimizer=config.optimizer,
            spec=config.engine,
            global_batch=config.run.batch_size,
            device=device,
        )
        ema = ShardedEMA(engine, config.engine.ema_decays)
        x = torch.randn(case.batch, 32, 16, 16).to(engine.compute_dtype())
        t, y = torch.rand(case.batch), torch.zeros(case.batch, dtype=torch.long)
        for _ in range(2):
            engine.begin_step(1e-4)
            for _ in range(case.gradient_accumulation):
                engine.backward(engine(x, t, y, with_variance=False).float().square().mean())
                engine.step()
            ema.update()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    engines.finish()
    return peak


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    print(train(Case(**json.loads(sys.argv[1]))))

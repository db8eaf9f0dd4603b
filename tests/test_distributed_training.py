"""Two processes under DeepSpeed's launcher, on the CPU, against one plain process that plays both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_plain import logged, plain_dit, plain_tokenizer, tiny_dit, tiny_tokenizer

from vadit.train import checkpoint

WORKER = Path(__file__).parent / "training_worker.py"
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders dit-K and tokenizer-K of two processes at ZeRO K, from one launch."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in alone}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--no_local_rank"]
    command = [*launcher, "--master_port", str(port), str(WORKER), "ranks", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.mark.parametrize("zero_stage", STAGES)
def test_generator_on_two_processes_is_one_of_the_same_batch(zero_stage: int, runs: Path) -> None:
    expected, weights = plain_dit(tiny_dit(runs), world_size=2)
    assert logged(runs / f"dit-{zero_stage}") == pytest.approx(expected, rel=1e-5)
    path = checkpoint.newest(runs / f"dit-{zero_stage}" / "checkpoints")
    assert path is not None and len(list(path.glob("random-*.pt"))) == 2
    state = load_file(path / "model.safetensors")
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", STAGES)
def test_tokenizer_on_two_processes_is_one_of_the_same_batch(zero_stage: int, runs: Path) -> None:
    expected, expected_disc = plain_tokenizer(tiny_tokenizer(runs, steps=2), world_size=2)
    folder = runs / f"tokenizer-{zero_stage}"
    assert logged(folder) == pytest.approx(expected, rel=1e-4)
    assert logged(folder, "step") == [1, 2]  # one log, by the main process
    last = (folder / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["disc"] == pytest.approx(expected_disc[0], rel=1e-4)


@pytest.mark.parametrize("network", ["dit", "tokenizer"])
def test_zero_stages_agree(network: str, runs: Path) -> None:
    curves = [logged(runs / f"{network}-{zero_stage}") for zero_stage in STAGES]
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)
    assert curves[2] == pytest.approx(curves[0], rel=1e-6)

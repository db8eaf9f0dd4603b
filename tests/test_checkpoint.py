"""Runs that stop, are killed, lose a file or a disk: the same command goes on, to the bit, or says why it cannot."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit.config import OptimizerSpec
from vadit.errors import RunError, UsageError
from vadit.train import checkpoint, dit, loop, tokenizer
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine

EVERY_STEP = {"save_every_images": BATCH, "keep_checkpoints": 3}
WORKER = Path(__file__).parent / "training_worker.py"


def log(folder: Path) -> list[dict[str, float]]:
    """The log points, without the clock's part."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def assert_same_end(found: Path, expected: Path) -> None:
    """Two runs logged the same losses and have the same last weights, averages and position: bit by bit."""
    assert log(found) == log(expected)
    ends = [checkpoint.newest(folder / "checkpoints") for folder in (found, expected)]
    assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
    names = sorted(path.name for path in ends[1].glob("*.safetensors"))
    assert names == sorted(path.name for path in ends[0].glob("*.safetensors"))
    for name in names:
        one, other = load_file(ends[0] / name), load_file(ends[1] / name)
        assert one.keys() == other.keys()
        assert [key for key in one if not torch.equal(one[key], other[key])] == [], name


def stop_in_step(module: Any, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM arrive in the middle of a step."""
    original, calls = module.train_step, 0

    def step(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, "train_step", step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_generator_goes_on_after_a_stop(zero_stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = dit.train(tiny_dit(tmp_path / "straight", zero_stage=zero_stage))
    config = tiny_dit(tmp_path / "stopped", zero_stage=zero_stage)
    with monkeypatch.context() as patch:
        stop_in_step(dit, 2, patch)
        with pytest.raises(loop.Stopped, match="stopped after 8 images and saved; the same command goes on"):
            dit.train(config)
    assert names(tmp_path / "stopped") == ["step-00000002"]
    assert_same_end(dit.train(config), straight)
    before = log(straight)
    dit.train(config)  # a run at its end has nothing to do
    assert log(tmp_path / "stopped") == before


def test_tokenizer_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = tokenizer.train(tiny_tokenizer(tmp_path / "straight", steps=4, ema_decays=(0.9,)))
    config = tiny_tokenizer(tmp_path / "stopped", steps=4, ema_decays=(0.9,))
    with monkeypatch.context() as patch:
        stop_in_step(tokenizer, 3, patch)  # the discriminator has taken steps, too
        with pytest.raises(loop.Stopped):
            tokenizer.train(config)
    assert_same_end(tokenizer.train(config), straight)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    # In processes of their own: after a run at ZeRO 3, DeepSpeed's F.linear stays in a process, and rounds otherwise.
    alone = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in alone}
    for task, code in (("crash", -signal.SIGKILL), ("resume", 0)):
        command = [sys.executable, str(WORKER), task, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == code, done.stderr
        if task == "crash":
            assert len(log(tmp_path / "killed")) == 3 and names(tmp_path / "killed") == ["step-00000002"]
    assert_same_end(tmp_path / "killed", tmp_path / "straight")


# ------------------------------------------------------------------------------------------------ damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_dit(tmp_path / "run", run=EVERY_STEP)
    dit.train(config)
    assert names(tmp_path / "run") == ["step-00000002", "step-00000003", "step-00000004"]  # keep_checkpoints 3
    before = log(tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-00000004/model.safetensors"
    weights = {name: value.clone() for name, value in load_file(file).items()}  # load_file maps the file itself
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    capsys.readouterr()
    dit.train(config)
    told = "".join(capsys.readouterr().err.split())
    assert "step-00000004isdamaged" in told and "model.safetensorshaschanged" in told
    assert log(tmp_path / "run") == before
    again = load_file(file)
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "state.json").write_text("{}"), "state.json has 2 bytes instead of"),
        (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest.json"),
    ],
)
def test_every_damage_has_its_words(
    damage: Any, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dit.train(tiny_dit(tmp_path, steps=2, run=EVERY_STEP))
    folder = tmp_path / "checkpoints"
    assert checkpoint.newest(folder) == folder / "step-00000002"
    damage(folder / "step-00000002")
    capsys.readouterr()
    assert checkpoint.newest(folder) == folder / "step-00000001"
    assert fault.replace(" ", "") in "".join(capsys.readouterr().err.split())  # rich folds lines anywhere


def test_a_partial_folder_does_not_count(tmp_path: Path) -> None:
    config = tiny_dit(tmp_path, steps=2, run=EVERY_STEP)
    partial = tmp_path / "checkpoints" / "step-00000001.partial"
    partial.mkdir(parents=True)
    (partial / "junk").write_text("half a checkpoint")
    assert checkpoint.newest(tmp_path / "checkpoints") is None
    dit.train(config)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "checkpoints/step-00000001/junk").exists()


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = dit.train(tiny_dit(tmp_path / "straight", run=EVERY_STEP))
    config = tiny_dit(tmp_path / "full", run=EVERY_STEP)
    original, calls = Engine.save, 0

    def save(engine: Engine, folder: Path, name: str) -> None:
        nonlocal calls
        calls += 1
        original(engine, folder, name)
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "save", save)
        with pytest.raises(RunError, match=r"step-00000002 could not be written .*No space left on device.*free some"):
            dit.train(config)
    assert names(tmp_path / "full") == ["step-00000001"]
    assert_same_end(dit.train(config), straight)


# ------------------------------------------------------------------------------------------------ refusals


def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    dit.train(tiny_dit(tmp_path, steps=1))
    with pytest.raises(UsageError, match=r"engine\.zero_stage 1, this command says 3; give --engine\.zero-stage 1"):
        dit.train(tiny_dit(tmp_path, steps=1, zero_stage=3))
    with pytest.raises(UsageError, match=r"run\.total_images 4, this command says 8"):
        dit.train(tiny_dit(tmp_path, steps=2))
    # What only says when to tell and keep may change.
    dit.train(tiny_dit(tmp_path, steps=1, run={"log_every_images": 100, "keep_checkpoints": 7}))


def test_another_sharding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dit.train(tiny_dit(tmp_path, steps=1))
    folder = tmp_path / "checkpoints"

    def fresh(zero_stage: int) -> dict[str, Any]:
        config = tiny_dit(tmp_path, zero_stage=zero_stage)
        network = torch.nn.Linear(2, 2)
        engine = Engine(
            network, optimizer=OptimizerSpec(), spec=config.engine, global_batch=BATCH, device=torch.device("cpu")
        )
        return {"engines": {"model": engine}, "ema": ShardedEMA(engine, ())}

    with pytest.raises(UsageError, match=r"written by 1 processes with engine\.zero_stage 1, this run has 1 and 2"):
        checkpoint.restore(folder, **fresh(2))
    same = fresh(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.distributed, "world_size", lambda: 2)
        with pytest.raises(UsageError, match=r"written by 1 processes .* this run has 2 and 1"):
            checkpoint.restore(folder, **same)
    with pytest.raises(UsageError, match="does not fit this run's config"):  # another network altogether
        checkpoint.restore(folder, **same)
    assert checkpoint.restore(tmp_path / "nothing", **same) is None

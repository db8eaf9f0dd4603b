"""Runs that stop, are killed, lose a file or a disk: the same command goes on, to the bit, or says why it cannot."""

import json
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint_worker as worker
import pytest
import torch
from checkpoint_worker import SHARE, assert_same_end, flip, log, names, printed
from guard_help import counted
from training_plain import BATCH, tiny_dit, tiny_tokenizer

from vadit.config import OptimizerSpec
from vadit.runtime.errors import RunError, UsageError
from vadit.train import dit, loop, runs, tokenizer
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.checkpoints import Checkpoints
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine


def stop_in_step(module: ModuleType, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SIGTERM arrive in the middle of a step."""
    stop = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == number else None  # noqa: E731
    monkeypatch.setattr(module, "train_step", counted(module.train_step, stop))


# --- going on
OFFLOADED = {"offload_optimizer": True, "precision": "bf16"}
SHORT: list[tuple[str, dict[str, Any]]] = [
    ("dit", {"zero_stage": 0}),
    ("dit", {"zero_stage": 1, "precision": "bf16"}),
    ("dit", {"zero_stage": 3}),
    ("tokenizer", {"zero_stage": 1, "precision": "autocast"}),
    ("tokenizer", {"zero_stage": 2, "precision": "bf16"}),
]
# All of ZeRO 1 to 3 in fp32 and bf16 go through test_training.py, on two processes.
LONG: list[tuple[str, dict[str, Any]]] = [
    ("dit", {"zero_stage": 0, "precision": "autocast"}),
    ("dit", {"zero_stage": 3, "precision": "bf16"}),
    ("dit", {"zero_stage": 1, **OFFLOADED}),
    ("dit", {"zero_stage": 3, "offload_weights": True, **OFFLOADED}),
    ("tokenizer", {"zero_stage": 0}),
    ("tokenizer", {"zero_stage": 3}),
    ("tokenizer", {"zero_stage": 3, "precision": "autocast"}),
    ("tokenizer", {"zero_stage": 2, **OFFLOADED}),
    ("tokenizer", {"zero_stage": 3, "offload_weights": True, **OFFLOADED}),
]


@pytest.mark.parametrize(
    ("network", "engine"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.faults) for case in LONG)]
)
def test_a_run_goes_on_after_a_stop(
    network: str, engine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is stopped in its third step and one that is not are the same in the end."""
    trainers: dict[str, Any] = {"dit": (dit, tiny_dit), "tokenizer": (tokenizer, tiny_tokenizer)}
    module, make = trainers[network]
    engine = {"ema_decays": (0.9, 0.5), "precision": "fp32", **engine}
    straight = module.train(make(tmp_path / "straight", steps=4, **engine))
    config = make(tmp_path / "stopped", steps=4, **engine)
    with monkeypatch.context() as patch:
        stop_in_step(module, 3, patch)  # a discriminator has taken steps, too
        pytest.raises(loop.Stopped, module.train, config).match("stopped after 12 images and saved")
    assert names(tmp_path / "stopped") == ["step-00000002", "step-00000003"]
    assert_same_end(module.train(config), straight)
    before = log(straight)
    module.train(config)  # a run at its end has nothing to do
    assert log(tmp_path / "stopped") == before


# --- damage
def rewrite_state(path: Path, **changes: Any) -> None:
    """Change what a state.json says, and the manifest with it."""
    state = json.loads((path / "state.json").read_text()) | changes
    entry = publish.write_text(path / "state.json", json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"state.json": entry}))


DAMAGE: list[tuple[Any, str]] = [
    (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    (lambda path: (path / "state.json").write_text("{}"), "state.json has 2 bytes instead of"),
    (lambda path: (path / "manifest.json").write_text("{"), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").unlink(), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_text('{"state.json": {"bites": 3}}'), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_bytes(b"[" * 100_000), "no readable manifest.json"),
    (lambda path: (path / "manifest.json").write_text("{}"), "state.json is missing"),
    (lambda path: rewrite_state(path, images_seen=-5), "greater than or equal to 0 (found -5)"),
    (lambda path: rewrite_state(path, world_size="many"), "world_size: Input should be a valid integer"),
    (lambda path: rewrite_state(path, step=None), "step: Input should be a valid integer"),
    (lambda path: os.truncate(path / SHARE, 1000), f"{SHARE} has 1000 bytes instead of"),
    (lambda path: (path / SHARE).unlink(), f"{SHARE} is missing"),
    (lambda path: flip(path / SHARE), f"{SHARE} has changed"),
    (lambda path: flip(path / SHARE.replace("model", "critic")), "critic-00000-of-00001.safetensors has changed"),
]


@pytest.mark.parametrize(("damage", "fault"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    damage: Any, fault: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish.newest(folder) == folder / "step-00000003"
    damage(folder / "step-00000003")
    capsys.readouterr()
    assert publish.newest(folder) == folder / "step-00000002"
    text = printed(capsys)
    assert fault.replace(" ", "") in text and "step-00000003isdamaged" in text and text.count("isdamaged") == 1


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_goes_on_from_the_one_before(stage: int, folder: Path) -> None:
    straight = worker.plain(4)[0]
    flip(folder / "step-00000003" / SHARE)
    run = worker.Run(folder, stage)
    run.restore()
    assert run.step == 2 and run.train(4) == pytest.approx(straight[2:], rel=1e-5)
    # Where it restores once more, nothing of what it did since is left.
    run.restore()
    assert run.step == 2 and run.train(4) == pytest.approx(straight[2:], rel=1e-5)


def test_where_all_are_damaged_nothing_starts_anew(folder: Path) -> None:
    for path in folder.iterdir():
        flip(path / SHARE)
    with pytest.raises(RunError, match=r"none of the 3 checkpoints in .* is whole; put a copy .* or delete them"):
        worker.Run(folder, 1).restore()


def test_files_are_hashed_once_and_only_to_restore(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []

    def digest(path: Path) -> str:
        hashed.append(path)
        return publish._digest_of(path, -1)

    monkeypatch.setattr(publish, "_digest", digest)
    assert runs.has_checkpoint(folder.parent) and hashed == []
    run = worker.Run(folder, 1)
    run.restore()
    assert sorted(hashed) == sorted(
        path for path in (folder / "step-00000003").iterdir() if path.name != "manifest.json"
    )
    run.train(4)
    run.save(wait=True)
    assert len(hashed) == 3


def test_what_interrupted_saves_left_is_cleared_up(folder: Path) -> None:
    (folder / "step-00000004.partial").mkdir()
    (folder / "step-00000004.partial" / "junk").write_text("half a checkpoint")
    (folder / "step-00000001.old.partial").mkdir()
    (folder / "step-00000005.partial").symlink_to(folder / "elsewhere")
    # Killed between the two renames that replace a checkpoint: the old one counts.
    os.replace(folder / "step-00000003", folder / "step-00000003.replaced.partial")
    assert publish.newest(folder) == folder / "step-00000002"
    run = worker.Run(folder, 1)
    run.restore()
    assert run.step == 3
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{number}" for number in (1, 2, 3)]
    run.train(4)
    run.save(wait=True)
    assert not (folder / "step-00000004" / "junk").exists()


# --- refusals
def test_another_config_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    dit.train(tiny_dit(tmp_path, steps=1))
    with pytest.raises(
        UsageError, match=r"engine\.precision 'fp32', this command says 'bf16'; give --engine\.precision"
    ):
        dit.train(tiny_dit(tmp_path, steps=1, precision="bf16"))
    with pytest.raises(UsageError, match=r"run\.seed \d+, this command says 77"):
        dit.train(tiny_dit(tmp_path, steps=1, run={"seed": 77}))
    # What only says when to tell and keep, or how the work is spread, may change.
    dit.train(tiny_dit(tmp_path, steps=1, run={"log_every_images": 100, "keep_checkpoints": 7}))
    dit.train(tiny_dit(tmp_path, steps=1, zero_stage=3))


def test_another_network_is_refused(tmp_path: Path) -> None:
    dit.train(tiny_dit(tmp_path, steps=1))
    folder, spec = tmp_path / "checkpoints", tiny_dit(tmp_path).engine

    def fresh(decays: tuple[float, ...] = (), name: str = "model") -> Checkpoints:
        network = torch.nn.Linear(2, 2)
        engine = Engine(network, optimizer=OptimizerSpec(), spec=spec, global_batch=BATCH, device=torch.device("cpu"))
        return Checkpoints(folder, engines={name: engine}, ema=ShardedEMA(engine, decays), keep=1)

    with pytest.raises(UsageError, match=r"does not fit this run's config \(bias is missing there and \(2,\) here\)"):
        fresh().restore()
    with pytest.raises(UsageError, match="holds no network called critic"):
        fresh(name="critic").restore()
    assert publish.newest(tmp_path / "nothing") is None


def test_an_average_that_was_not_kept_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DECAYS", (0.9, 0.25))
    with pytest.raises(UsageError, match=r"has no average with decay 0\.25"):
        worker.Run(folder, 1).restore()

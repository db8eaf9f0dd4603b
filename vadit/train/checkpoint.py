"""Checkpoints that are whole or not there.

A checkpoint is written into `step-N.partial` by every process, listed with sizes and hashes in `manifest.json`, and
renamed to `step-N`: the rename is the moment it exists. Inside: DeepSpeed's shards per network, the whole fp32
weights and averages as safetensors (what `vadit export` reads, without a cluster), the position, and each process's
random state. Resuming takes the newest checkpoint whose manifest holds, and says which ones do not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vadit import distributed
from vadit.errors import RunError, UsageError, write_fault
from vadit.metrics import console
from vadit.models.pretrained import save_tensors
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine

MODEL_FILE = "model.safetensors"
"""Whole weights of the network called `model`: every task's first."""


def ema_file(decay: float) -> str:
    """Name of the file that holds the average with this decay."""
    return f"ema-{decay:g}.safetensors"


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    step: int = 0
    images_seen: int = 0


def save(
    folder: Path,
    *,
    position: Position,
    engines: dict[str, Engine],
    ema: ShardedEMA,
    loader_state: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of `engines` (the first is the network that is exported) under `folder`. Collective."""
    final = folder / f"step-{position.step:08d}"
    partial = folder / (final.name + ".partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
    distributed.barrier()
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for name, engine in engines.items():
            engine.save(partial, name)
        torch.save(_random_state(), partial / f"random-{distributed.rank():05d}.pt")
        main_engine = next(iter(engines.values()))
        states = {f"{name}.safetensors": engine.full_state() for name, engine in engines.items()}
        states |= {ema_file(decay): ema.full_state(decay) for decay in ema.shards}
        if distributed.is_main():
            for name, state in states.items():
                save_tensors(state, partial / name)
            values = {
                **dataclasses.asdict(position),
                "world_size": distributed.world_size(),
                "zero_stage": main_engine.spec.zero_stage,
                "optimizer": main_engine.optimizer.name,
                "loader": loader_state,
                "torch": torch.__version__,
            }
            (partial / "state.json").write_text(json.dumps(values, indent=2))
        distributed.barrier()
        if distributed.is_main():
            _publish(partial, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        if distributed.is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"the checkpoint {final} could not be written ({write_fault(error)}); earlier checkpoints in {folder} "
            "are whole: free some disk space and give the same command again"
        ) from error
    distributed.barrier()
    if distributed.is_main():
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None; damaged ones are named on the way."""
    for path in _checkpoints(folder):
        fault = _fault(path)
        if fault is None:
            return path
        if distributed.is_main():
            console.print(f"[yellow]checkpoint {path} is damaged ({fault}); taking the one before it[/yellow]")
    return None


def restore(folder: Path, *, engines: dict[str, Engine], ema: ShardedEMA) -> tuple[Position, dict[str, Any]] | None:
    """Load the newest whole checkpoint: its position and the loader's state; None where there is none. Collective."""
    path = newest(folder)
    if path is None:
        return None
    values = json.loads((path / "state.json").read_text())
    main_engine = next(iter(engines.values()))
    found = (values["world_size"], values["zero_stage"])
    needed = (distributed.world_size(), main_engine.spec.zero_stage)
    if found != needed:
        raise UsageError(
            f"{path} was written by {found[0]} processes with engine.zero_stage {found[1]}, this run has {needed[0]} "
            f"and {needed[1]}; use the former, or start anew with --run.init-from and another --run.out"
        )
    kind, choice = values.get("optimizer", "adamw"), main_engine.optimizer  # early checkpoints are all torch's
    if kind != choice.name:
        why = choice.refused or f"optimizer.kind is {choice.name}"
        raise UsageError(
            f"{path} holds the state of optimizer.kind {kind}, which {choice.name} cannot go on from: {why}; "
            f"make {kind} available, or start anew with --run.init-from and another --run.out"
        )
    try:
        for name, engine in engines.items():
            engine.load(path, name)
        for decay in ema.shards:
            ema.load_full_state(decay, load_file(path / ema_file(decay)))
        random = torch.load(path / f"random-{distributed.rank():05d}.pt", weights_only=True)
    except (RuntimeError, KeyError, FileNotFoundError) as error:
        raise UsageError(f"{path} does not fit this run's config ({error}); use another --run.out") from error
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    return Position(step=values["step"], images_seen=values["images_seen"]), values["loader"]


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".partial"), reverse=True)


def _publish(partial: Path, final: Path) -> None:
    """List, flush and rename: only now does the checkpoint exist."""
    manifest = {}
    for path in sorted(partial.rglob("*")):
        if path.is_file():
            manifest[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*partial.rglob("*"), partial):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, *_state: int) -> str:
    """Once per state of the file: a start asks for the newest whole checkpoint several times, of many gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return "no readable manifest.json"
    for name, entry in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if _digest(file) != entry["sha256"]:
            return f"{name} has changed"
    return None

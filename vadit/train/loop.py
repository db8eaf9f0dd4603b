"""The training loop of both networks, top to bottom: restore, step, log, save, stop when asked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vadit import distributed
from vadit.config import OptimizerSpec, RunSpec
from vadit.metrics import ProgressBar, RunLog, console
from vadit.train import checkpoint
from vadit.train.checkpoint import Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine
from vadit.train.guard import StopRequest, check_finite


class Loader(Protocol):
    """What the loop needs of a loader."""

    def stream(self) -> Iterator[Any]:
        """Full batches for ever."""

    def state_dict(self) -> dict[str, Any]:
        """Position of what was handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


@dataclass(frozen=True)
class Task:
    """What differs between the two trainers."""

    title: str
    engines: dict[str, Engine]
    """Every network that is trained; the first is the one that is exported and averaged."""
    ema: ShardedEMA
    loader: Loader
    step: Callable[[Iterator[Any], Position], dict[str, torch.Tensor]]
    """Take batches, update weights; returns the terms of the loss as scalars on the device."""


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says how to continue."""


def learning_rate(spec: OptimizerSpec, *, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that starts at `images_seen`."""
    done = images_seen / total_images
    if spec.schedule == "one_cycle":  # Smith & Topin 2019: cosine up from 1/25 over 30%, cosine down to nothing
        if done < 0.3:
            return spec.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / 0.3)) / 2)
        return spec.lr * (1 + math.cos(math.pi * min((done - 0.3) / 0.7, 1.0))) / 2
    warmup = min((images_seen + 1) / spec.warmup_images, 1.0) if spec.warmup_images else 1.0
    return spec.lr * warmup * (1 - done if spec.schedule == "linear" else 1.0)


def run(task: Task, *, spec: RunSpec, optimizer: OptimizerSpec, folder: Path, device: torch.device) -> None:
    """Train `task` to `spec.total_images`, going on from the newest checkpoint under `folder`.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RunError: a loss term is not finite, or a checkpoint cannot be written.
    """
    # ---- where were we?
    position = Position()
    restored = checkpoint.restore(folder / "checkpoints", engines=task.engines, ema=task.ema)
    if restored is not None:
        position, loader_state = restored
        task.loader.load_state_dict(loader_state)
    if position.images_seen >= spec.total_images:
        return
    log = RunLog(folder, images_seen=position.images_seen)
    meter = _Meter(device)
    stream = task.loader.stream()

    def save() -> None:
        checkpoint.save(
            folder / "checkpoints",
            position=position,
            engines=task.engines,
            ema=task.ema,
            loader_state=task.loader.state_dict(),
            keep=spec.keep_checkpoints,
        )

    with StopRequest() as stop, ProgressBar(task.title, spec.total_images, done=position.images_seen) as bar:
        while position.images_seen < spec.total_images:
            # ---- one optimizer step
            lr = learning_rate(optimizer, images_seen=position.images_seen, total_images=spec.total_images)
            for engine in task.engines.values():
                engine.set_lr(lr)
            meter.add(task.step(stream, position))
            before = position.images_seen
            position = Position(step=position.step + 1, images_seen=before + spec.batch_size)
            bar.update(position.images_seen)
            last = position.images_seen >= spec.total_images
            # ---- tell
            if last or _crossed(before, position.images_seen, spec.log_every_images):
                values = meter.read(spec.batch_size) | {"lr": lr}
                norm = next(iter(task.engines.values())).grad_norm()
                values |= {} if norm is None else {"grad_norm": norm}
                check_finite(values, images=position.images_seen, folder=str(folder / "checkpoints"))
                log.write(images=position.images_seen, step=position.step, values=values)
                bar.update(position.images_seen, note=f"loss {values['loss']:.4g}")
            # ---- keep
            # Processes agree on a stop every eighth step only: agreeing waits for the device.
            asked = (distributed.world_size() == 1 or position.step % 8 == 0) and distributed.any_rank(
                stop.requested, device
            )
            if last or asked or _crossed(before, position.images_seen, spec.save_every_images):
                sound = meter.peek() | _weights(task.engines, device)
                check_finite(sound, images=position.images_seen, folder=str(folder / "checkpoints"))
                save()
            if asked and not last:
                log.close()
                raise Stopped(
                    f"stopped after {position.images_seen:,} images and saved; the same command goes on from there"
                )
    log.close()
    if distributed.is_main():
        console.print(f"  [dim]run folder {folder}[/dim]")


def _weights(engines: dict[str, Engine], device: torch.device) -> dict[str, float]:
    """One number per network that is finite where all its weights are, on all processes: a loss can hide a NaN."""
    sums = [torch.stack([shard.abs().sum() for shard in engine.masters()]).sum() for engine in engines.values()]
    means = distributed.all_mean(torch.stack([value.to(device) for value in sums]))  # offloaded ones are on the host
    return dict(zip((f"a weight of the {name}" for name in engines), means.tolist(), strict=True))


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


class _Meter:
    """Means of the loss terms since the last log point, summed on the device so that no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0
        self._start = time.perf_counter()

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        for name, value in terms.items():
            self._sums[name] = (
                self._sums[name] + value.detach().float() if name in self._sums else value.detach().float()
            )
        self._steps += 1

    def peek(self) -> dict[str, float]:
        """Means over steps and processes since the last log point; waits for the device."""
        if not self._steps:
            return {}
        means = distributed.all_mean(torch.stack(list(self._sums.values())) / self._steps)
        return dict(zip(self._sums, means.tolist(), strict=True))

    def read(self, batch_size: int) -> dict[str, float]:
        """The means and the throughput, and a fresh start."""
        values = self.peek()
        seconds = time.perf_counter() - self._start
        values["images_per_s"] = self._steps * batch_size / seconds
        self._sums, self._steps, self._start = {}, 0, time.perf_counter()
        return values

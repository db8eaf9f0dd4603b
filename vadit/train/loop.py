"""The training loop of both networks, top to bottom: restore, step, log, save, go back when lost, stop when asked."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vadit.config import OptimizerSpec, RunSpec
from vadit.runtime import distributed
from vadit.runtime.console import ProgressBar, console
from vadit.runtime.errors import RunError
from vadit.runtime.run_log import RunLog
from vadit.train.checkpoint.checkpoints import Checkpoints, Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine, communication_backend
from vadit.train.guard import Guard, StopRequest, not_finite
from vadit.train.optimizers import learning_rate
from vadit.train.tracker import Tracker, timed_collectives
from vadit.train.watchdog import Watchdog


class Loader(Protocol):
    """What the loop needs of a loader."""

    def stream(self) -> Generator[Any, None, None]:
        """Full batches for ever."""

    def state_dict(self) -> dict[str, Any]:
        """Position of what was handed out."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""

    def ids_between(self, before: dict[str, Any], after: dict[str, Any]) -> list[int]:
        """The samples of all processes that were handed out between two positions."""


class Evaluation(Protocol):
    """A look at the network on the way (`vadit.train.evaluation`)."""

    failures: int
    """Looks that failed: the run goes on without them."""

    def due(self, before: int, after: int, *, last: bool) -> bool:
        """Whether there is to be one between two numbers of images, or at the end."""

    def run(self, position: Position, log: RunLog, beat: Callable[[], None]) -> None:
        """Look, and log what was seen. Collective; `beat` is called now and then."""


@dataclass(frozen=True)
class Task:
    """What differs between the two trainers."""

    title: str
    engines: dict[str, Engine]
    """Every network that is trained; the first is the one that is exported and averaged."""
    ema: ShardedEMA
    guard: Guard
    loader: Loader
    step: Callable[[Iterator[Any], Position], dict[str, torch.Tensor]]
    """Take batches, step through the guard; returns the terms of the loss as scalars on the device."""
    flops_per_image: float | None = None
    """Of a step (`vadit.estimate.flops.training_flops`)."""
    peak_flops: float | None = None
    """Of one GPU, per second (`vadit.estimate.flops.peak_flops`); None where nobody knows it."""
    evaluation: Evaluation | None = None


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says how to continue."""

    def __init__(self, message: str, *, interrupted: bool) -> None:
        super().__init__(message)
        self.interrupted = interrupted
        """Whether Ctrl-C asked for it, rather than a scheduler."""


def run(
    task: Task,
    *,
    spec: RunSpec,
    optimizer: OptimizerSpec,
    folder: Path,
    device: torch.device,
    watchdog: Watchdog | None = None,
) -> None:
    """Train `task` to `spec.total_images`, going on from the newest checkpoint under `folder`.

    A step that the guard leaves out does not count: `position` counts what was trained, the loader what was read.
    `watchdog`: one that already watches, and goes on to; else one for this loop.

    Raises:
        Stopped: a signal asked for it; the state is saved.
        RunError: going back to the last checkpoint did not help, or the last checkpoint cannot be written.
    """
    # ---- where were we?
    checkpoints = Checkpoints(
        folder / "checkpoints",
        engines=task.engines,
        ema=task.ema,
        keep=spec.keep_checkpoints,
        keep_every_images=spec.keep_every_images,
        background=spec.background_saves,
        seed=spec.seed,
    )
    guard, position = task.guard, Position()
    if (restored := checkpoints.restore()) is not None:
        position, loader_state, guard_state = restored
        task.loader.load_state_dict(loader_state)
        guard.load_state_dict(guard_state)
    if position.images_seen >= spec.total_images:
        return
    log = _open_log(folder, position)
    tracker = _tracker(task, spec, device)
    distributed.set_collective_timeout(spec.hang_timeout_s)
    with (
        contextlib.closing(task.loader.stream()) as stream,
        timed_collectives(communication_backend(), tracker.communication),
        StopRequest() as stop,
        contextlib.nullcontext(watchdog) if watchdog else Watchdog(spec.hang_timeout_s) as watchdog,
        ProgressBar(task.title, spec.total_images, done=position.images_seen) as bar,
        contextlib.closing(checkpoints),
    ):
        watchdog.beat(position.step)
        batches = tracker.batches(stream)
        while position.images_seen < spec.total_images:
            # ---- one optimizer step, or a bad one left out
            rate = learning_rate(optimizer, images_seen=position.images_seen, total_images=spec.total_images)
            rate *= guard.lr_factor
            for engine in task.engines.values():
                engine.begin_step(rate)
            data_before, before, trouble = task.loader.state_dict(), position.images_seen, None
            terms = task.step(batches, position)
            if guard.applied:
                tracker.add(terms)
                position = Position(step=position.step + 1, images_seen=before + spec.batch_size)
                bar.update(position.images_seen)
            else:
                ids = task.loader.ids_between(data_before, task.loader.state_dict())
                trouble = guard.tell_skip(step=position.step + 1, images=before, image_ids=ids)
            watchdog.beat(position.step)
            last = position.images_seen >= spec.total_images
            # ---- tell
            if last or _crossed(before, position.images_seen, spec.log_every_images):
                values = tracker.read(position.images_seen) | {"lr": rate, "skipped": guard.skipped}
                norm = next(iter(task.engines.values())).grad_norm()
                values |= {} if norm is None else {"grad_norm": norm}
                trouble = guard.check_loss(values)
                if trouble is None:
                    values |= checkpoints.log_values() | _failures(task.evaluation)
                    log.write(images=position.images_seen, step=position.step, values=values)
                    bar.update(position.images_seen, note=f"loss {values['loss']:.4g}")
            # ---- keep
            # Processes agree on a stop every eighth step only: agreeing waits for the device.
            asked = (distributed.world_size() == 1 or position.step % 8 == 0) and distributed.any_rank(
                stop.requested, device
            )
            due = last or asked or _crossed(before, position.images_seen, spec.save_every_images)
            if due and trouble is None:
                trouble = not_finite(weight_sums(task.engines, device))
            if due and trouble is None:
                watchdog.beat(position.step, doing="saving")
                with tracker.pause():
                    checkpoints.save(position, task.loader.state_dict(), guard.state_dict(), wait=last or asked)
                if not checkpoints.failures:  # a background save that failed is known at the next one
                    guard.saved()
                watchdog.beat(position.step)
            if asked and not last and trouble is None:
                log.close()
                raise Stopped(
                    f"stopped after {position.images_seen:,} images and saved; resume with the same command",
                    interrupted=stop.interrupted,
                )
            # ---- look
            look = task.evaluation
            if look is not None and trouble is None and look.due(before, position.images_seen, last=last):
                beat = functools.partial(watchdog.beat, position.step, doing="evaluating")
                beat()
                with tracker.pause():
                    look.run(position, log, beat)
                watchdog.beat(position.step)
            # ---- go back
            if trouble is not None:
                watchdog.beat(position.step, doing="going back to a checkpoint")
                guard.go_back(trouble, step=position.step, images=position.images_seen)
                if (restored := checkpoints.restore()) is None:
                    raise RunError(f"{trouble}, and there is no checkpoint to go back to; {guard.remedies()}")
                position, _, guard_state = restored  # the loader stays where it is: past the data that led here
                guard.load_state_dict(guard_state, rollback=True)
                log.close()
                log = _open_log(folder, position)
                tracker.restart()
                bar.update(position.images_seen)
                watchdog.beat(position.step)
    log.close()
    if distributed.is_main():
        console.print(f"  [dim]run folder {folder}[/dim]")


def _open_log(folder: Path, position: Position) -> RunLog:
    """The main process's log; where it cannot be opened, no process waits for another. Collective."""
    return distributed.main_first(lambda: RunLog(folder, images_seen=position.images_seen))


def _tracker(task: Task, spec: RunSpec, device: torch.device) -> Tracker:
    engine = next(iter(task.engines.values()))
    return Tracker(
        device,
        batch_size=spec.batch_size,
        total_images=spec.total_images,
        num_samples=task.loader.state_dict().get("num_samples"),
        flops_per_image=task.flops_per_image,
        peak_flops=task.peak_flops,
        # On a stream beside the arithmetic a collective's time is not what the run waits for.
        communication_known=not (device.type == "cuda" and engine.spec.overlap_comm and distributed.world_size() > 1),
    )


def _failures(evaluation: Evaluation | None) -> dict[str, float]:
    return {"evaluations_failed": evaluation.failures} if evaluation is not None and evaluation.failures else {}


def weight_sums(engines: dict[str, Engine], device: torch.device) -> dict[str, float]:
    """One number per network that is finite where all its weights are, on all processes: a loss can hide a NaN."""
    sums = [torch.stack([shard.abs().sum() for shard in engine.masters()]).sum() for engine in engines.values()]
    means = distributed.all_mean(torch.stack([value.to(device) for value in sums]))  # offloaded ones are on the host
    return dict(zip((f"a weight of the {name}" for name in engines), means.tolist(), strict=True))


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every

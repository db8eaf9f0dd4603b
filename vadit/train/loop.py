"""The training loop of both networks: step, log, save, evaluate, roll back when lost, stop when asked."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vadit.config import DiTConfig, TokenizerConfig
from vadit.estimate import flops
from vadit.runtime import distributed
from vadit.runtime.console import ProgressBar, note_once
from vadit.runtime.errors import RunError
from vadit.runtime.run_log import RunLog
from vadit.runtime.stream import PositionedLoader
from vadit.train.checkpoint.checkpoints import Checkpoints, Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine, communication_backend
from vadit.train.evaluation import Evaluation
from vadit.train.guard import Guard, StopRequest, not_finite
from vadit.train.oom import explaining_oom
from vadit.train.optimizers import learning_rate
from vadit.train.tracker import Tracker, timed_collectives
from vadit.train.watchdog import Watchdog


@dataclass(frozen=True)
class Task:
    """What differs between the two trainers."""

    title: str
    engines: dict[str, Engine]  # every network that is trained; the first is the one that is exported and averaged
    ema: ShardedEMA
    guard: Guard
    loader: PositionedLoader[Any]
    step: Callable[[Iterator[Any], Position], dict[str, torch.Tensor]]
    """Take batches, step through the guard; returns the terms of the loss as scalars on the device."""
    save_start: Callable[[], None]
    """Write what the run folder says of this start, which nothing refuses any more. Collective."""
    evaluation: Evaluation | None = None

    @property
    def engine(self) -> Engine:
        """Of the network that is exported and averaged."""
        return next(iter(self.engines.values()))


class Stopped(Exception):
    """The run was asked to stop and has saved; the message says how to continue."""

    def __init__(self, message: str, interrupted: bool) -> None:
        super().__init__(message)
        self.interrupted = interrupted  # whether Ctrl-C asked for it, rather than a scheduler


class Lost(Exception):
    """Why the weights of now must not be kept: the run goes back to its last checkpoint."""


def run(task: Task, *, config: DiTConfig | TokenizerConfig, watchdog: Watchdog | None = None) -> None:
    """Train `task` to `run.total_images`, going on from the newest checkpoint of the run's folder.

    A step that the guard leaves out does not count: `position` counts what was trained, the loader what was read.
    `watchdog`: one that already watches, and goes on to; else one for this loop. Stopped: a signal asked for it; the
    state is saved. RunError: going back to the last checkpoint did not help, or the last one cannot be written.
    """
    this = _Run(task, config)
    spec = config.run
    if this.last:
        note_once(f"  {this.folder} has been trained to its end, run.total_images {spec.total_images:,}", "dim")
        return
    distributed.set_collective_timeout(spec.hang_timeout_s)
    with (
        contextlib.closing(task.loader.stream()) as stream,
        timed_collectives(communication_backend(), this.tracker.communication),
        StopRequest() as stop,
        contextlib.nullcontext(watchdog) if watchdog else Watchdog(spec.hang_timeout_s) as watchdog,
        explaining_oom(this.folder, lambda: watchdog.position),
        ProgressBar(task.title, spec.total_images, done=this.position.images_seen) as bar,
        contextlib.closing(this.checkpoints),
    ):
        this.begin(stream, watchdog, bar)
        while not this.last:
            try:
                this.step()
                if this.due(spec.log_every_images):
                    this.log()
                asked = this.asked_to_stop(stop)
                if asked or this.due(spec.save_every_images):
                    this.save(wait=asked or this.last)
                if asked and not this.last:
                    this.writer.close()
                    images = f"{this.position.images_seen:,} images"
                    raise Stopped(f"stopped after {images} and saved; resume with the same command", stop.interrupted)
                if task.evaluation is not None and this.due(task.evaluation.every_images):
                    this.evaluate(task.evaluation)
            except Lost as lost:
                this.roll_back(str(lost))
    this.writer.close()
    note_once(f"  run folder {this.folder}", "dim")


class _Run:
    """One start of a run: where it stands, and what it can do."""

    def __init__(self, task: Task, config: DiTConfig | TokenizerConfig) -> None:
        """Restore what there is. Collective."""
        spec = config.run
        self.task, self.spec, self.optimizer = task, spec, config.optimizer
        self.folder, self.device = Path(spec.out), task.engine.device
        self.checkpoints = Checkpoints(self.folder / "checkpoints", engines=task.engines, ema=task.ema, spec=spec)
        self.position = Position()
        if (restored := self.checkpoints.restore()) is not None:
            self.position, loader_state, guard_state = restored
            task.loader.load_state_dict(loader_state)
            task.guard.load_state_dict(guard_state)
        task.save_start()
        self.checkpoints.read_config()
        self.before = self.position.images_seen  # images at the start of the step
        overlaps = self.device.type == "cuda" and task.engine.spec.overlap_comm and distributed.world_size() > 1
        counts = spec.batch_size, spec.total_images, task.loader.num_samples
        work = flops.tracked_flops(config), flops.peak_flops(config, self.device)
        # On a stream beside the arithmetic a collective's time is not what the run waits for.
        self.tracker = Tracker(self.device, *counts, *work, communication_known=not overlaps)

    def begin(self, stream: Iterator[Any], watchdog: Watchdog, bar: ProgressBar) -> None:
        """Before the first step. Collective."""
        self.batches, self.watchdog, self.bar = self.tracker.batches(stream), watchdog, bar
        self.writer = self._open_log()
        watchdog.beat(self.position.step)

    @property
    def last(self) -> bool:
        return self.position.images_seen >= self.spec.total_images

    def due(self, every_images: int) -> bool:
        """Whether the last step has crossed a multiple of `every_images`, or the run is at its end."""
        return self.last or self.before // every_images != self.position.images_seen // every_images

    def step(self) -> None:
        """One optimizer step, or a bad one left out."""
        task, guard, self.before = self.task, self.task.guard, self.position.images_seen
        rate = learning_rate(self.optimizer, images_seen=self.before, total_images=self.spec.total_images)
        self.rate = rate * guard.lr_factor
        for engine in task.engines.values():
            engine.begin_step(self.rate)
        task.ema.begin_step(self.position.step)
        read = task.loader.state_dict()
        terms = task.step(self.batches, self.position)
        if guard.applied:
            self.tracker.add(terms)
            self.position = Position(step=self.position.step + 1, images_seen=self.before + self.spec.batch_size)
            self._compare(read["images_seen"], task.loader.state_dict()["images_seen"])
            self.bar.update(self.position.images_seen)
            self.watchdog.beat(self.position.step)
        else:
            self.watchdog.beat(self.position.step)
            ids = task.loader.ids_between(read, task.loader.state_dict())
            _keep(guard.report_skip(step=self.position.step + 1, images=self.before, image_ids=ids))

    def _compare(self, before: int, now: int) -> None:
        """Whether loader and position count the same in a step that counts, skipped steps being the loader's alone."""
        if now - before != self.spec.batch_size or now < self.position.images_seen:
            raise RunError(
                f"the position went from {self.before:,} to {self.position.images_seen:,} images and the loader's own "
                f"from {before:,} to {now:,}; they must agree, so one of them or the checkpoint is at fault"
            )

    def log(self) -> None:
        """A line of the log, of steps that went well."""
        task, images = self.task, self.position.images_seen
        values = self.tracker.read(images) | {"lr": self.rate, "skipped": task.guard.skipped}
        if (norm := task.engine.grad_norm()) is not None:
            values["grad_norm"] = norm
        _keep(not_finite(values))
        values |= self.checkpoints.log_values()
        if task.evaluation is not None and task.evaluation.failures:
            values["evaluations_failed"] = task.evaluation.failures
        self.writer.write(images=images, step=self.position.step, values=values)
        self.bar.update(images, note=f"loss {values['loss']:.4g}")

    def asked_to_stop(self, stop: StopRequest) -> bool:
        """Whether any process was; processes agree in every eighth step only, for that waits for the device."""
        here = distributed.world_size() == 1 or self.position.step % 8 == 0
        return here and distributed.any_rank(stop.requested, self.device)

    def save(self, *, wait: bool) -> None:
        """A checkpoint, if the weights are sound."""
        task = self.task
        _keep(not_finite(weight_sums(task.engines, self.device)))
        self.watchdog.beat(self.position.step, doing="saving")
        with self.tracker.pause():
            self.checkpoints.save(self.position, task.loader.state_dict(), task.guard.state_dict(), wait=wait)
        if not self.checkpoints.failures:  # a background save that failed is known at the next one
            task.guard.rollbacks = 0  # what the run went back for is behind it
        self.watchdog.beat(self.position.step)

    def evaluate(self, evaluation: Evaluation) -> None:
        """Samples or reconstructions, and their numbers."""

        def beat() -> None:
            self.watchdog.beat(self.position.step, doing="evaluating")

        beat()
        with self.tracker.pause():
            evaluation.run(self.position, self.writer, beat)
        self.watchdog.beat(self.position.step)

    def roll_back(self, why: str) -> None:
        """To the last checkpoint; the loader stays where it is, past the data that led here."""
        guard, position = self.task.guard, self.position
        self.watchdog.beat(position.step, doing="going back to a checkpoint")
        guard.go_back(why, step=position.step, images=position.images_seen)
        if (restored := self.checkpoints.restore()) is None:
            raise RunError(f"{why}, and there is no checkpoint to go back to; {guard.remedies()}")
        self.position, _, guard_state = restored
        guard.load_state_dict(guard_state, rollback=True)
        self.writer.close()
        self.writer = self._open_log()
        self.tracker.restart()
        self.bar.update(self.position.images_seen)
        self.watchdog.beat(self.position.step)

    def _open_log(self) -> RunLog:
        """The main process's log; where it cannot be opened, no process waits for another. Collective."""
        return distributed.main_first(lambda: RunLog(self.folder, images_seen=self.position.images_seen))


def _keep(trouble: str | None) -> None:
    """Go on where there is no trouble."""
    if trouble is not None:
        raise Lost(trouble)


def weight_sums(engines: dict[str, Engine], device: torch.device) -> dict[str, float]:
    """One number per network that is finite where all its weights are, on all processes: a loss can hide a NaN."""
    sums = [torch.stack([shard.abs().sum() for shard in engine.masters()]).sum() for engine in engines.values()]
    means = distributed.all_mean(torch.stack([value.to(device) for value in sums]))  # offloaded ones are on the host
    return dict(zip((f"a weight of the {name}" for name in engines), means.tolist(), strict=True))

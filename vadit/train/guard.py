"""What keeps a run from being lost: steps that would harm the weights are left out, and a stop request is heard.

Every optimizer step is judged by its gradient norm, on the device, before it changes anything. The norm is one for
all processes, and a loss that is not finite makes it so (`Engine.backward`): they all skip, or none does. Networks
that train together skip together.
"""

import json
import math
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
from torch import Tensor

from vadit.config import GuardSpec
from vadit.runtime import distributed
from vadit.runtime.console import note, note_once
from vadit.runtime.errors import RunError, write_fault
from vadit.runtime.files import open_log
from vadit.runtime.json_files import Count, Limits, checked
from vadit.train.engine import Engine

QUANTILE = 0.9  # Of the norms of the last good steps: what a spike is measured against. Healthy norms are heavy-tailed.


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint keeps of a guard."""

    skipped: Count
    in_row: Count
    lr_factor: Annotated[float, Limits(gt=0, le=1)]
    norms: dict[str, list[float]]


class Guard:
    """Judges steps, counts what it leaves out, and says when a run should go back to its last checkpoint."""

    def __init__(self, spec: GuardSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.applied = True  # whether the last step changed weights
        self.skipped = 0
        self.in_row = 0
        self.rollbacks = 0  # times that the run went back since it last saved
        self.lr_factor = 1.0
        self._windows: dict[str, Tensor] = {}
        self._judged: tuple[list[str], Tensor, Tensor] | None = None

    def step(self, engines: dict[str, Engine]) -> bool:
        """Step all `engines`, or at a bad gradient none; returns whether weights changed. Collective.

        To be called after every backward pass: before the last micro-batch of a step the engines only count.
        """
        if not all(engine.at_boundary() for engine in engines.values()):
            for engine in engines.values():
                engine.step()
            return False
        veto = self._judge({name: engine.gradient_norm() for name, engine in engines.items()})
        stepped = [engine.step(veto) for engine in engines.values()]
        self.applied = all(stepped)
        self.in_row = 0 if self.applied else self.in_row + 1
        self.skipped += not self.applied
        return self.applied

    def _judge(self, norms: dict[str, Tensor]) -> Tensor:
        """Whether the step with these gradient norms is bad, () bool on their device; good ones enter the windows.

        A window starts filled with infinity. So nothing is a spike before nine tenths of it are from real steps, and
        the huge first norms of a network whose output starts at zero are soon outnumbered.
        """
        names = list(norms)
        found = torch.stack([norm.detach().float() for norm in norms.values()])
        size = self.spec.spike_window
        empty = torch.full((size,), math.inf, device=found.device)
        windows = torch.stack([self._windows.get(name, empty).to(found.device) for name in names])
        limits = torch.full_like(found, math.inf)
        if self.spec.spike_factor:
            limits = windows.sort(dim=1).values[:, math.ceil(QUANTILE * size) - 1] * self.spec.spike_factor
        veto = (~found.isfinite() | (found > limits)).any()
        moved = torch.cat([windows[:, 1:], found[:, None]], dim=1)
        self._windows |= zip(names, torch.where(veto, windows, moved), strict=True)
        self._judged = (names, found, limits)
        return veto

    def report_skip(self, *, step: int, images: int, image_ids: list[int]) -> str | None:
        """Report the step that was just left out; returns why the run should go back, once it should.

        RunError: guard.skip_nonfinite is off and the loss or a gradient was not finite.
        """
        reason = self._reason()
        self._record("skipped", step=step, images=images, reason=reason, image_ids=image_ids)
        line = f"step {step} left out: {reason}; its image ids are in {self.folder / 'guard.jsonl'}"
        note_once(line)
        if not self.spec.skip_nonfinite and "not finite" in reason:
            raise RunError(f"{line}; the last checkpoint is sound. {self.remedies()}")
        if self.in_row < self.spec.max_skips_in_row:
            return None
        return f"{self.in_row} steps in a row were left out, the last because {reason}"

    def _reason(self) -> str:
        assert self._judged is not None
        names, norms, limits = self._judged
        for name, norm, limit in zip(names, norms.tolist(), limits.tolist(), strict=True):
            if not math.isfinite(norm):
                return f"the loss or a gradient of the {name} is not finite"
            if norm > limit:
                usual = f"nine in ten lately are below {limit / self.spec.spike_factor:.4g}"
                return f"the gradient norm of the {name}, {norm:.4g}, is a spike ({usual})"
        raise AssertionError("a step was left out that nothing spoke against")

    def go_back(self, why: str, *, step: int, images: int) -> None:
        """Count a rollback and lower the rate; RunError for one too many."""
        if self.rollbacks >= self.spec.max_rollbacks:
            tried = f"; going back {self.rollbacks} time(s) did not help" if self.rollbacks else ""
            raise RunError(
                f"{why} after {images:,} images (step {step}){tried}. The last checkpoint in "
                f"{self.folder / 'checkpoints'} is sound. {self.remedies()}"
            )
        self.rollbacks += 1
        self.in_row = 0
        self.lr_factor *= self.spec.rollback_lr_factor
        self._record("rollback", step=step, images=images, reason=why, lr_factor=self.lr_factor)
        note_once(
            f"{why}: going back to the last checkpoint (rollback {self.rollbacks} of {self.spec.max_rollbacks}), on "
            "with the data that comes next"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; waits for the device."""
        return {
            "skipped": self.skipped,
            "in_row": self.in_row,
            "lr_factor": self.lr_factor,
            "norms": {name: window[window.isfinite()].tolist() for name, window in self._windows.items()},
        }

    def load_state_dict(self, state: dict[str, Any], *, rollback: bool = False) -> None:
        """Go on from a saved state; in a rollback what was counted since then stays counted."""
        saved = checked(_Saved, state, "the guard's state in the checkpoint", remedy="take another checkpoint")
        if not rollback:
            self.skipped, self.in_row, self.lr_factor = saved.skipped, saved.in_row, saved.lr_factor
        size = self.spec.spike_window
        self._windows = {
            name: torch.tensor([math.inf] * max(size - len(norms), 0) + norms[-size:])
            for name, norms in saved.norms.items()
        }

    def _record(self, event: str, **values: Any) -> None:
        if not distributed.is_main():
            return
        try:
            with open_log(self.folder / "guard.jsonl") as file:
                file.write(json.dumps({"event": event, **values}) + "\n")
        except OSError as error:  # a full disk is no reason to end a run that gets over a bad step
            note(f"{self.folder / 'guard.jsonl'} could not be written: {write_fault(error)}")

    def remedies(self) -> str:
        """What a user can try."""
        return (
            "Give the same command with --guard.rollback-lr-factor 0.5, or where these were spikes with a larger "
            f"--guard.spike-factor (now {self.spec.spike_factor:g}, 0 for none); or start from these weights with "
            "another --run.out, --run.init-from this run and --engine.max-grad-norm 1, a lower --optimizer.lr or "
            "--model.qk-norm"
        )


def not_finite(values: dict[str, float]) -> str | None:
    """Which of `values` are NaN or infinite, as the start of a sentence."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return f"{', '.join(bad)} is not finite" if bad else None


class StopRequest:
    """Set by SIGTERM, SIGUSR1 (preemption, time limit) or the first Ctrl-C: the loop saves and ends after its step.

    A second Ctrl-C interrupts at once; further signals of the other kinds change nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False  # whether it was Ctrl-C: a person at a terminal, to whom code 0 would say all is well
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        self.requested = True

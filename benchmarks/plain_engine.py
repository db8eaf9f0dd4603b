"""A training step without DeepSpeed: what its engine is to `vadit.train.engine.Engine` at ZeRO 0, in plain torch.

For `bench_step.py` on machines that have torch and no DeepSpeed, and to see what DeepSpeed costs. One process, nothing
sharded, AdamW in one pass as at ZeRO 0; it neither saves nor resumes: nothing is trained with it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vadit.runtime import distributed
from vadit.runtime.errors import UsageError
from vadit.train import engine


class Plain:
    """Call it, then `backward(loss)`, then `step()`."""

    def __init__(self, model: nn.Module, optimizer: Any, config: dict[str, Any]) -> None:
        self.module, self.optimizer, self.micro = model, optimizer, 0
        self.accumulation: int = config["gradient_accumulation_steps"]
        self.autocast = "torch_autocast" in config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return self.micro + 1 == self.accumulation

    def step(self) -> None:
        """`Engine` has given the optimizer a step that leaves out what is vetoed."""
        self.applied = False
        if boundary := self.is_gradient_accumulation_boundary():
            self.optimizer.step()
            self.module.zero_grad()
            self.applied = not self.optimizer.overflow
        self.micro = 0 if boundary else self.micro + 1

    def was_step_applied(self) -> bool:
        return self.applied


@contextlib.contextmanager
def without_deepspeed() -> Iterator[None]:
    """Engines that are made meanwhile are in plain torch; they take engine.zero_stage 0."""
    if distributed.world_size() > 1:
        raise UsageError("a step in plain torch is of one process; install deepspeed for more")

    def initialize(*, model: nn.Module, model_parameters: Any, optimizer: Any, config: dict[str, Any]) -> tuple[Plain]:
        return (Plain(model, optimizer, config),)

    stand_in = SimpleNamespace(initialize=initialize)
    with mock.patch.dict(sys.modules, deepspeed=stand_in), mock.patch.object(engine, "start", lambda device: None):
        yield

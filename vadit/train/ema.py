"""Exponential moving average of the weights, sharded as the optimizer's fp32 weights are.

ema <- decay * ema + (1 - decay) * weights, on this process's share only: no communication, 4 bytes per weight and
decay over the number of processes. With engine.ema_warmup the decay of update n is at most (1 + n) / (10 + n) (as in
TensorFlow, LDM and diffusers), so that the weights of the start are soon forgotten. The network's bf16 copies are
never the source: their rounding would swallow steps of 1e-4. Checkpoints keep each process's share as it is;
`vadit.train.checkpoint.shares` puts them together.
"""

import torch

from vadit.train.engine import Engine


def decay_of(update: int, decay: float, warmup: bool) -> float:
    """What update number `update`, counted from 1, multiplies an average with."""
    return min(decay, (1 + update) / (10 + update)) if warmup else decay


def start_share(updates: int, decay: float, warmup: bool) -> float:
    """Share that the weights of the start still have in an average: the product of its decays so far."""
    if not warmup:
        return decay**updates
    share, update = 1.0, 0
    while update < updates and share > 1e-9:
        update += 1
        share *= decay_of(update, decay, warmup)
    return share


class ShardedEMA:
    """One average per decay over the weights of one engine."""

    def __init__(self, engine: Engine, decays: tuple[float, ...]) -> None:
        self.engine = engine
        self.shards = {decay: [master.clone() for master in engine.masters()] for decay in decays}
        self._along = False  # whether the optimizer's step moves them

    def begin_step(self, step: int) -> None:
        """Before an optimizer step, `step` having been made: where it can, it moves the averages in its own pass."""
        self._along = self.engine.average_along(self.shards, self._rates(step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One step of every average, unless it is made; after each optimizer step that changed weights."""
        if not self._along:
            for shards, rate in zip(self.shards.values(), self._rates(step), strict=True):
                torch._foreach_lerp_(shards, self.engine.masters(), rate)
        self._along = False

    def _rates(self, step: int) -> tuple[float, ...]:
        return tuple(1 - decay_of(step + 1, decay, self.engine.spec.ema_warmup) for decay in self.shards)

"""Exponential moving average of the weights, sharded as the optimizer's fp32 weights are.

ema <- decay * ema + (1 - decay) * weights, on this process's share only: no communication, 4 bytes per weight and
decay over the number of processes. The network's bf16 copies are never the source: their rounding would swallow
steps of 1e-4.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from vadit.train.engine import Engine


class ShardedEMA:
    """One average per decay over the weights of one engine."""

    def __init__(self, engine: Engine, decays: tuple[float, ...]) -> None:
        self.engine = engine
        self.shards = {decay: [master.clone() for master in engine.masters()] for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """One step of every average; call it after each optimizer step that changed weights."""
        masters = self.engine.masters()
        for decay, shards in self.shards.items():
            torch._foreach_lerp_(shards, masters, 1 - decay)

    @contextlib.contextmanager
    def _in_place_of_masters(self, shards: list[torch.Tensor]) -> Iterator[None]:
        """Let the engine's fp32 weights be `shards` for a moment: its own gather and scatter then serve the EMA."""
        masters = self.engine.masters()
        kept = [master.clone() for master in masters]
        for master, shard in zip(masters, shards, strict=True):
            master.copy_(shard)
        try:
            yield
        finally:
            for master, shard, original in zip(masters, shards, kept, strict=True):
                shard.copy_(master)
                master.copy_(original)

    @torch.no_grad()
    def full_state(self, decay: float) -> dict[str, torch.Tensor]:
        """The whole averaged weights on the main process (empty elsewhere). Collective."""
        with self._in_place_of_masters(self.shards[decay]):
            return self.engine.full_state()

    @torch.no_grad()
    def load_full_state(self, decay: float, state: dict[str, torch.Tensor]) -> None:
        """Set an average from whole weights (the same mapping on every process). Collective."""
        with self._in_place_of_masters(self.shards[decay]):
            self.engine.load_masters(state)

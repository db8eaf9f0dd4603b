"""Exponential moving average of the weights, sharded as the optimizer's fp32 weights are.

ema <- decay * ema + (1 - decay) * weights, on this process's share only: no communication, 4 bytes per weight and
decay over the number of processes. The network's bf16 copies are never the source: their rounding would swallow
steps of 1e-4. Checkpoints keep each process's share as it is; `vadit.train.checkpoint.shares` puts them together.
"""

from __future__ import annotations

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

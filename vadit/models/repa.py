"""A generator with REPA's projector (Yu et al. 2024): three linear layers from a block's tokens to features.

The projector trains with the network and serves training alone: an exported network, and one that samples, has none.
"""

from typing import Any

from torch import nn

from vadit.config import DiTConfig, DiTSpec, RepaSpec
from vadit.models.dit import DiTOutput, LightningDiT
from vadit.models.masked import build_generator


class AlignedDiT(LightningDiT):
    """LightningDiT whose output of block `repa.block` goes through the projector to (B, N, F), where it is tapped."""

    def __init__(self, spec: DiTSpec, repa: RepaSpec, feature_dim: int, gradient_checkpointing: bool = False) -> None:
        super().__init__(spec, gradient_checkpointing)
        width = repa.projector_width
        self.aligned_block = repa.block
        self.projector = nn.Sequential(
            nn.Linear(spec.hidden_size, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, feature_dim),
        )
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward_features(self, *arguments: Any, **options: Any) -> DiTOutput:
        """As LightningDiT's; where the aligned block is among the taps, with its projection."""
        features = super().forward_features(*arguments, **options)
        if self.aligned_block not in features.hidden:
            return features
        return features._replace(projected=self.projector(features.hidden[self.aligned_block]))


def training_network(config: DiTConfig, feature_dim: int | None = None) -> LightningDiT:
    """The generator as it trains: with REPA's projector to features of `feature_dim` channels, where there are any."""
    if feature_dim is not None:
        return AlignedDiT(config.model, config.repa, feature_dim, config.engine.gradient_checkpointing)
    return build_generator(config.model, config.mask, config.engine.gradient_checkpointing)

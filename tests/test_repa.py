"""Which block's output each loss on the inside of a generator gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vadit.config import DiTConfig, RepaSpec
from vadit.models.dit import DiTOutput
from vadit.objectives import regularisers
from vadit.recipes import get_recipe
from vadit.train import dit as trainer


@pytest.mark.parametrize(("aligned", "dispersed"), [(1, 2), (2, 1), (2, 2)])
def test_each_loss_gets_its_own_block(aligned: int, dispersed: int) -> None:
    start = get_recipe("lightningdit-b-debug")
    assert isinstance(start, DiTConfig)
    flow = dataclasses.replace(start.flow, dispersive_weight=0.5)
    model = dataclasses.replace(start.model, depth=4 * dispersed)
    config = dataclasses.replace(start, model=model, flow=flow, repa=RepaSpec(weight=0.25, block=aligned))
    generator = torch.Generator().manual_seed(0)
    outputs = {block: torch.randn(3, 4, 8, generator=generator) for block in (1, 2)}
    projected, features = (torch.randn(3, 4, 6, generator=generator) for _ in range(2))
    features = features.transpose(1, 2).reshape(3, 6, 2, 2)
    hidden = {block: outputs[block] for block in trainer.tapped_blocks(config)}
    terms = trainer._with_regularisers(
        config,
        {"loss": torch.tensor(1.0)},
        DiTOutput(torch.empty(0), hidden, projected),
        [features],
        trainer.Features(6, None),
    )
    dispersive = regularisers.dispersive_loss(outputs[dispersed], 0.5)
    alignment = regularisers.alignment_loss(projected, features)
    assert torch.equal(terms["dispersive"], dispersive) and torch.equal(terms["alignment"], alignment)
    torch.testing.assert_close(terms["loss"], 1 + 0.5 * dispersive + 0.25 * alignment)

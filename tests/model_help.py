"""What the tests of several networks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def randomised(model: Any) -> Any:
    """A model in which no trained weight is zero, so that every path shows in the output; weights of norms near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + one)
    return model.eval()


def assert_recomputing_changes_nothing(model: Any, loss: Callable[[], Tensor]) -> None:
    """Every trained weight has a gradient, the same to the bit where activations are computed twice."""
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        loss().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0 and torch.equal(gradients[1][name], gradient), name

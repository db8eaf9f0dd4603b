"""What the tests of several networks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vadit.config import DiTSpec


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


class SmallNet(nn.Module):
    """Smooth and nonlinear, with two classes; its dropout would show a forgotten eval mode. Records time and rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.num_classes, self.spec = 2, DiTSpec(input_size=2, in_channels=4, num_classes=2)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=generator) * 0.5)
        self.table = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[float, int]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((float(t[0]), len(x)))
        hidden = torch.einsum("bchw,cd->bdhw", x, self.weight) + self.table[labels][:, :, None, None]
        return self.dropout(torch.sin(hidden + 3 * t.reshape(-1, 1, 1, 1)))

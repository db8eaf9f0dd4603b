"""Networks of a few numbers, for the tests of samplers."""

import torch
from torch import Tensor, nn

from vadit.config import DiTSpec


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

"""The demo's two small classifiers: a vision transformer as the foundation model, and an independent judge.

The judge sees no generated picture, shares no weight with the foundation model and is of another kind (a convolutional
network), so its verdict on samples is not the tokenizer's own opinion handed back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vadit.demo.data import DemoData, channels_first
from vadit.images.pixels import to_signed
from vadit.models.pretrained import write_safetensors
from vadit.runtime import rng
from vadit.runtime.safetensors_file import load_tensors
from vadit.train.classifier import train_classifier


class Judge(nn.Module):
    """Images (B, 3, 32, 32) in [-1, 1] to logits; `features` gives the 64 numbers before them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64))
        self.head = nn.Linear(64, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, 64)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.features(x)))

    @torch.no_grad()
    def assess(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 images (N, 32, 32, 3) to features (N, 64) and predicted classes (N,)."""
        self.eval()
        x = to_signed(channels_first(pixels))
        features = torch.cat([self.features(part) for part in x.split(256)])
        return features, self.head(F.relu(features)).argmax(1)


def trained(path: Path, build: Callable[[], nn.Module], data: DemoData, *, title: str, steps: int, seed: int) -> Any:
    """The classifier whose weights lie at `path`; trained on the labels and saved where there are none."""
    torch.manual_seed(rng.fold(seed))
    network = build()
    if path.is_file():
        network.load_state_dict(load_tensors(path))
        return network.eval()
    images, labels = channels_first(data.train_images), torch.from_numpy(data.train_labels)
    train_classifier(network, images, labels, title=title, steps=steps, seed=seed)
    write_safetensors(network.state_dict(), path)
    return network

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

from vadit.config import FoundationSpec
from vadit.demo.data import SIZE, DemoData, channels_first
from vadit.images.pixels import to_signed
from vadit.models.pretrained import write_safetensors
from vadit.runtime import rng
from vadit.runtime.console import ProgressBar
from vadit.runtime.safetensors_file import load_tensors

BATCH = 64
LR = 2e-3
NOISE = 0.1


def foundation_spec(weights: str, num_classes: int) -> FoundationSpec:
    """A ViT of 0.8M weights with 8x8 patches: a 4x4 grid of features, as the demo's latents have."""
    sizes: dict[str, int | float | str | bool] = {
        "img_size": SIZE, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4, "num_classes": num_classes,
    }  # fmt: skip
    return FoundationSpec(name="vit_tiny_patch16_224", weights=weights, model_args=sizes)


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
    """The classifier whose weights lie at `path`; trained on the labels and saved where there are none.

    Images are shifted at random by up to 2 pixels, and get noise.
    """
    torch.manual_seed(rng.fold(seed))
    network = build()
    if path.is_file():
        network.load_state_dict(load_tensors(path))
        return network.eval()
    images, labels = to_signed(channels_first(data.train_images)), torch.from_numpy(data.train_labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    network.train()
    with ProgressBar(title, steps * BATCH) as bar:
        for step in range(steps):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
            x = images[chosen].roll((dy, dx), dims=(2, 3))
            x = x + NOISE * torch.randn(x.shape, generator=generator)
            loss = F.cross_entropy(network(x), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update((step + 1) * BATCH)
    write_safetensors(network.state_dict(), path)
    return network.eval()

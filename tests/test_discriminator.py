"""PatchGAN: pix2pix's layers, names and initialisation."""

from __future__ import annotations

import torch
from torch import nn

from vadit.models.discriminator import PatchDiscriminator


def test_layers_and_names() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator()
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    found = {name: (c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for name, c in convolutions.items()}
    assert found == {
        "main.0": (3, 64, 2, True),
        "main.2": (64, 128, 2, False),
        "main.5": (128, 256, 2, False),
        "main.8": (256, 512, 1, False),
        "main.11": (512, 1, 1, True),
    }
    assert all(c.kernel_size == (4, 4) and c.padding == (1, 1) for c in convolutions.values())
    assert all(abs(c.weight.std() - 0.02) < 0.002 for c in convolutions.values())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = torch.cat([norm.weight for norm in norms])
    assert len(norms) == 3
    assert abs(weights.mean() - 1.0) < 0.005
    assert abs(weights.std() - 0.02) < 0.005
    assert all((norm.bias == 0).all() for norm in norms)
    assert {layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)} == {0.2}
    # pix2pix prints 2.769 M for a pair of images at its input, which takes 3,072 weights more
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633


def test_each_logit_sees_70_pixels() -> None:
    model = PatchDiscriminator(channels=4).eval()
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = model(image)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_width_is_capped_at_eight_times_the_first() -> None:
    model = PatchDiscriminator(in_channels=1, channels=2, layers=5)
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]

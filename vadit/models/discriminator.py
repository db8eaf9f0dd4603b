"""PatchGAN discriminator (Isola et al. 2017, pix2pix), with the names of taming-transformers' NLayerDiscriminator."""

import torch.nn.functional as F
from torch import Tensor, nn

MAX_WIDTH_FACTOR = 8
LEAK = 0.2


class _BatchNorm(nn.BatchNorm2d):
    """BatchNorm in fp32, as its running statistics are, also where the weights and the images are bf16."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None and self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        settings = self.weight.float(), self.bias.float(), self.training, self.momentum, self.eps
        return F.batch_norm(input.float(), self.running_mean, self.running_var, *settings).to(input.dtype)


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) to logits (B, 1, h, w), one per overlapping patch (70 pixels a side with 3 layers)."""

    def __init__(self, in_channels: int = 3, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(LEAK)]
        width = channels
        for index in range(1, layers + 1):
            before, width = width, channels * min(2**index, MAX_WIDTH_FACTOR)
            stride = 1 if index == layers else 2
            # BatchNorm's shift makes a bias of the convolution before it idle
            modules += [
                nn.Conv2d(before, width, 4, stride=stride, padding=1, bias=False),
                _BatchNorm(width),
                nn.LeakyReLU(LEAK),
            ]
        modules.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*modules)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.main(x_BCHW)

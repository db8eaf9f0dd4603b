"""The LDM / VQGAN-KL autoencoder (Rombach et al. 2022), which VA-VAE trains with the VF loss.

State-dict names are LDM's (encoder.down.0.block.0.norm1, decoder.mid.attn_1, quant_conv, ...), so the released
tokenizers load without renaming (`vadit.models.interop`).

Shapes: B batch, C image channels, H W image rows and columns, E features of a level, h w a level's rows and columns,
N = h w, d latent channels.
"""

from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vadit.config import AutoencoderSpec
from vadit.kernels import group_norm_silu
from vadit.models.pretrained import Pretrained
from vadit.runtime.errors import UsageError

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class DiagonalGaussian:
    """The posterior q(z|x) = N(mean, diag(exp(logvar))), in float32; every tensor is (B, d, h, w)."""

    def __init__(self, moments_BEhw: Tensor) -> None:
        self.mean, logvar = moments_BEhw.float().chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The most likely latent: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A latent, by reparameterisation; the noise is drawn on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device).to(self.mean.device)
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over channels and positions: (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def _exact(module: nn.Module, x: Tensor) -> bool:
    """Whether to round exactly as LDM's code does, which released tokenizers were measured with.

    The fused SiLU and attention round otherwise, and depth makes 1e-5 of the largest pixel of it. They need less
    memory for the backward pass, though, so training keeps them.
    """
    return not module.training and x.dtype == torch.float32


def _inner_channels(module: nn.Module, x: Tensor) -> Tensor:
    """x in channels-last memory, which convolutions and the fused norm then keep; as it is where rounding is LDM's."""
    return x if _exact(module, x) else x.contiguous(memory_format=torch.channels_last)


def _norm(norm: nn.GroupNorm, x: Tensor, *, silu: bool = True) -> Tensor:
    """The normalised features, or their SiLU."""
    if not _exact(norm, x) and x.is_contiguous(memory_format=torch.channels_last):
        return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu)
    h = norm(x)
    if not silu:
        return h
    return h * torch.sigmoid(h) if _exact(norm, h) else F.silu(h)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, spec: AutoencoderSpec, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(spec.norm_groups, in_width, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(spec.norm_groups, out_width, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else None

    def forward(self, x_BEhw: Tensor) -> Tensor:
        h = self.conv1(_norm(self.norm1, x_BEhw))
        h = self.conv2(_norm(self.norm2, h))
        return h + (x_BEhw if self.nin_shortcut is None else self.nin_shortcut(x_BEhw))


class AttentionBlock(nn.Module):
    """x + self-attention over all positions, with one head as wide as the level."""

    def __init__(self, spec: AutoencoderSpec, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(spec.norm_groups, width, eps=NORM_EPS)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        B, E, h, w = x_BEhw.shape
        normed = _norm(self.norm, x_BEhw, silu=False)
        q_BEN, k_BEN, v_BEN = (conv(normed).flatten(2) for conv in (self.q, self.k, self.v))
        if _exact(self, normed):
            weights_BNN = (torch.bmm(q_BEN.transpose(1, 2), k_BEN) * E**-0.5).softmax(dim=-1)
            out_BEN = torch.bmm(v_BEN, weights_BNN.transpose(1, 2))
        else:
            q, k, v = (part.transpose(1, 2).unsqueeze(1) for part in (q_BEN, k_BEN, v_BEN))
            out_BEN = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x_BEhw + self.proj_out(out_BEN.reshape(B, E, h, w))


class Downsample(nn.Module):
    """Halves the side: a 3x3 convolution of stride 2 on an image padded at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        return self.conv(F.pad(x_BEhw, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BEhw: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BEhw, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where `attend`, then the change of resolution."""

    def __init__(self, spec: AutoencoderSpec, in_width: int, out_width: int, num_blocks: int, attend: bool) -> None:
        super().__init__()
        widths = [in_width] + [out_width] * num_blocks
        self.block = nn.ModuleList(ResBlock(spec, a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(spec, out_width) for _ in range(num_blocks if attend else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x_BEhw: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x_BEhw = block(x_BEhw)
            if len(self.attn):
                x_BEhw = self.attn[index](x_BEhw)
        resize = self.downsample or self.upsample
        return x_BEhw if resize is None else resize(x_BEhw)


def _middle(spec: AutoencoderSpec, width: int) -> nn.Sequential:
    """Residual block, attention, residual block at the lowest resolution."""
    names = ("block_1", "attn_1", "block_2")
    parts = (ResBlock(spec, width, width), AttentionBlock(spec, width), ResBlock(spec, width, width))
    return nn.Sequential(OrderedDict(zip(names, parts, strict=True)))


def _level_widths(spec: AutoencoderSpec) -> list[int]:
    return [spec.base_channels * multiplier for multiplier in spec.channel_multipliers]


def _attends(spec: AutoencoderSpec, level: int) -> bool:
    return spec.image_size // 2**level in spec.attention_resolutions


def _run(module: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, x, use_reentrant=False)
    return module(x)


class Encoder(nn.Module):
    """Image to the features of the moments (B, 2d, h, w)."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = _level_widths(spec)
        self.conv_in = nn.Conv2d(spec.in_channels, spec.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, (before, width) in enumerate(pairwise([spec.base_channels, *widths])):
            level = Level(spec, before, width, spec.num_res_blocks, _attends(spec, index))
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = _middle(spec, widths[-1])
        self.norm_out = nn.GroupNorm(spec.norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * spec.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, recompute: bool = False) -> Tensor:
        h = self.conv_in(x_BCHW)
        for part in (*self.down, self.mid):
            h = _run(part, h, recompute)
        return self.conv_out(_norm(self.norm_out, h))


class Decoder(nn.Module):
    """Latent to image; the levels are numbered from the image's resolution down, as the encoder's are."""

    def __init__(self, spec: AutoencoderSpec) -> None:
        super().__init__()
        widths = _level_widths(spec)
        self.conv_in = nn.Conv2d(spec.latent_channels, widths[-1], 3, padding=1)
        self.mid = _middle(spec, widths[-1])
        self.up = nn.ModuleList()
        for index, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            level = Level(spec, before, width, spec.num_res_blocks + 1, _attends(spec, index))
            if index > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(spec.norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], spec.in_channels, 3, padding=1)

    def forward(self, z_Bdhw: Tensor, recompute: bool = False) -> Tensor:
        h = self.conv_in(z_Bdhw)
        for part in (self.mid, *reversed(self.up)):
            h = _run(part, h, recompute)
        return self.conv_out(_norm(self.norm_out, h))


class Autoencoder(Pretrained):
    """Images (B, C, H, W) in [-1, 1] to a posterior over latents (B, d, H/f, W/f), and back.

    Any H and W that the downsample ratio f divides will do; the levels that attend stay those of `spec.image_size`.
    `gradient_checkpointing` recomputes each level in the backward pass; it can be set at any time.
    """

    Spec = AutoencoderSpec

    def __init__(self, spec: AutoencoderSpec, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quant_conv = nn.Conv2d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(spec.latent_channels, spec.latent_channels, 1)
        self.gradient_checkpointing = gradient_checkpointing

    def features(self, x_BCHW: Tensor) -> Tensor:
        """What the encoder makes of images, before quant_conv: (B, 2d, h, w)."""
        return self.encoder(_inner_channels(self, x_BCHW.to(self.dtype)), self.gradient_checkpointing)

    def moments(self, x_BCHW: Tensor) -> Tensor:
        """Mean and unclamped logvar along channels: (B, 2d, h, w)."""
        ratio = self.spec.downsample_ratio
        height, width = x_BCHW.shape[-2:]
        if height % ratio or width % ratio:
            raise UsageError(
                f"image size {height}x{width} is not divisible by the autoencoder's downsample ratio {ratio}; "
                f"resize the images to multiples of {ratio}"
            )
        return self.quant_conv(self.features(x_BCHW))

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Posterior over the latents of images in [-1, 1]."""
        return DiagonalGaussian(self.moments(x_BCHW))

    def decode(self, z_Bdhw: Tensor) -> Tensor:
        """Images (B, C, H, W), in [-1, 1] up to overshoot."""
        z_Bdhw = _inner_channels(self, z_Bdhw.to(self.dtype))
        return self.decoder(self.post_quant_conv(z_Bdhw), self.gradient_checkpointing)

    def forward(self, x_BCHW: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """Reconstruction from a posterior sample, and the posterior."""
        posterior = self.encode(x_BCHW)
        return self.decode(posterior.sample(generator)), posterior

"""FLOPs of vadit's networks by formula: products only, a multiplication and an addition each."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from vadit.config import AutoencoderSpec, Config, DiTConfig, DiTSpec, MaskSpec, TokenizerConfig
from vadit.estimate import memory
from vadit.models.dit import TIME_FREQUENCIES, mlp_width

TRAINING = 3
"""FLOPs of forward and backward over those of the forward pass: a gradient of inputs and one of weights."""


def dit_flops(spec: DiTSpec, mask: MaskSpec | None = None, *, masked: bool = False) -> int:
    """FLOPs of one image's forward pass; `masked`: of a pass of the mask's network that sees a part of the tokens."""
    mask = mask or MaskSpec()
    tokens = (spec.input_size // spec.patch_size) ** 2
    seen = int(tokens * (1 - mask.ratio)) if masked else tokens
    if mask.kind == "maskdit":
        decoder = dataclasses.replace(spec, hidden_size=mask.decoder_width)
        narrowing = seen * spec.hidden_size * decoder.hidden_size + 2 * spec.hidden_size**2
        through = _blocks(spec, spec.depth, seen) + narrowing
        through += _blocks(decoder, mask.decoder_depth, tokens, condition=spec.hidden_size)
        return 2 * (through + _ends(spec, last_width=decoder.hidden_size))
    if mask.kind == "mdt":
        first, last = spec.depth - mask.decoder_depth, mask.decoder_depth
        side = _blocks(spec, 1, tokens) if masked else 0
        return 2 * (_blocks(spec, first, seen) + side + _blocks(spec, last, tokens) + _ends(spec))
    return 2 * (_blocks(spec, spec.depth, tokens) + _ends(spec))


def _blocks(spec: DiTSpec, depth: int, tokens: int, condition: int | None = None) -> int:
    """Multiplications of `depth` blocks; their modulation comes from `condition` numbers, their own width's if None."""
    D = spec.hidden_size
    mlp = (3 if spec.swiglu else 2) * D * mlp_width(spec)
    modulation = (4 if spec.shift_free else 6) * D * (condition or D)
    return depth * (tokens * (4 * D * D + mlp + 2 * tokens * D) + modulation)


def _ends(spec: DiTSpec, last_width: int | None = None) -> int:
    """Multiplications of patches in and out, of the last modulation, and of the time's two layers."""
    D, tokens = spec.hidden_size, (spec.input_size // spec.patch_size) ** 2
    last = last_width or D
    patch = spec.patch_size**2 * spec.in_channels
    out = patch * (2 if spec.learn_sigma else 1)
    return tokens * (D * patch + last * out) + 2 * D * last + TIME_FREQUENCIES * D + D * D


def autoencoder_flops(spec: AutoencoderSpec) -> int:
    """FLOPs of one image's way through encoder and decoder."""
    widths = [spec.base_channels * multiplier for multiplier in spec.channel_multipliers]
    sides = [spec.image_size // 2**level for level in range(len(widths))]

    def conv(inputs: int, outputs: int, side: int, kernel: int = 3) -> int:
        return inputs * outputs * kernel**2 * side**2

    def residual(inputs: int, outputs: int, side: int) -> int:
        skip = conv(inputs, outputs, side, 1) if inputs != outputs else 0
        return conv(inputs, outputs, side) + conv(outputs, outputs, side) + skip

    def attention(width: int, side: int) -> int:
        return 4 * conv(width, width, side, 1) + 2 * side**4 * width

    def level(index: int, before: int, blocks: int) -> int:
        width, side = widths[index], sides[index]
        total = residual(before, width, side) + (blocks - 1) * residual(width, width, side)
        return total + (blocks * attention(width, side) if side in spec.attention_resolutions else 0)

    last, low, latent = widths[-1], sides[-1], spec.latent_channels
    total = 2 * (2 * residual(last, last, low) + attention(last, low))  # the middle of both
    total += conv(spec.in_channels, widths[0], sides[0]) + conv(last, 2 * latent, low) + conv(latent, last, low)
    total += conv(widths[0], spec.in_channels, sides[0]) + conv(2 * latent, 2 * latent, low, 1)
    total += conv(latent, latent, low, 1)
    for index in range(len(widths)):
        total += level(index, widths[max(index - 1, 0)], spec.num_res_blocks)
        total += level(index, widths[min(index + 1, len(widths) - 1)], spec.num_res_blocks + 1)
        if index > 0:  # one convolution down to this level, one up from it
            total += conv(widths[index - 1], widths[index - 1], sides[index])
            total += conv(widths[index], widths[index], sides[index - 1])
    return 2 * total


def training_flops(config: Config) -> float:
    """FLOPs per image of a training step: the network, what is trained beside it, and what is frozen.

    MaskDiT's is the masked step, unless the run begins without masks.
    """
    if isinstance(config, TokenizerConfig):
        return TRAINING * autoencoder_flops(config.autoencoder) + _critics_flops(config)
    spec, mask = config.model, config.mask
    passes = {"none": (False,), "maskdit": (mask.unmasked_after_images != 0,), "mdt": (False, True)}[mask.kind]
    total = TRAINING * sum(dit_flops(spec, mask, masked=masked) for masked in passes)
    return total + (_alignment_flops(config) if config.repa.weight > 0 else 0)


def tracked_flops(config: Config) -> float | None:
    """`training_flops`; None where they change in mid-run: with mask.unmasked_after_images."""
    changes = isinstance(config, DiTConfig) and config.mask.kind == "maskdit" and config.mask.unmasked_after_images
    return None if changes else training_flops(config)


PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "A40": 149.7,
    "A10": 125,
    "RTX A6000": 154.8,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "B100": 1750,
    "B200": 2250,
    "GB200": 2500,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209.5,
    "RTX 6000 Ada": 364,
    "MI210": 181,
    "MI250X": 191.5,
    "MI300X": 1307,
    "MI325X": 1307,
    "MI355X": 2500,
}
"""Dense bf16 TFLOP/s with fp32 sums by the makers' data sheets (MI250X: one of its two halves, a device to torch)."""


def peak_flops(config: Config, device: torch.device) -> float | None:
    """FLOP/s that a GPU has at most: run.peak_tflops, else by its name; None where neither is known (a CPU).

    It is that of bf16 whatever the run computes in: the share of an fp32 run shows what bf16 would have to give.
    """
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops * 1e12
    return named_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def named_peak(name: str) -> float | None:
    """FLOP/s of a GPU by the name that torch gives it ("NVIDIA H100 80GB HBM3"); None for one that is not in the table.

    Nor for a part of one (MIG), or for a laptop's of the same name.
    """
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words or " Laptop " in words:
        return None
    found = [known for known in PEAK_TFLOPS if f" {known} " in words]
    return PEAK_TFLOPS[max(found, key=len)] * 1e12 if found else None


def _alignment_flops(config: DiTConfig) -> float:
    """REPA's projector, forward and backward, and where features are made online, the foundation model forward."""
    repa, tokens = config.repa, (config.model.input_size // config.model.patch_size) ** 2
    foundation = memory.meta_foundation(repa.foundation, config.model.input_size // config.model.patch_size)
    width = repa.projector_width
    projector = config.model.hidden_size * width + width * width + width * foundation.feature_dim
    total: float = TRAINING * 2 * tokens * projector
    return total + (_foundation_flops(foundation, tokens) if repa.features == "online" else 0)


def _foundation_flops(foundation: nn.Module, tokens: int) -> float:
    """Products with weights; attention would be a few percent more."""
    return 2.0 * sum(parameter.numel() for parameter in foundation.parameters()) * tokens


def _critics_flops(config: TokenizerConfig) -> float:
    """LPIPS on both images and back to one, the discriminator in both networks' steps, the foundation model forward."""
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models import vgg16

    from vadit.models.discriminator import PatchDiscriminator

    spec, loss = config.autoencoder, config.loss
    total = 0.0
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, spec.in_channels, spec.image_size, spec.image_size)
        if loss.perceptual_weight > 0:
            with FlopCounterMode(display=False) as counter:
                vgg16().features[: memory.VGG16_LAYERS](images)
            total += 3 * counter.get_total_flops()
        if loss.disc_weight > 0:
            with FlopCounterMode(display=False) as counter:
                PatchDiscriminator(spec.in_channels, loss.disc_channels, loss.disc_layers)(images)
            total += (2 + 2 * TRAINING) * counter.get_total_flops()
    if loss.vf_weight > 0:
        foundation = memory.meta_foundation(config.foundation, spec.latent_size)
        total += _foundation_flops(foundation, spec.latent_size**2)
    return total

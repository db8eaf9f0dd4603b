"""FLOPs of vadit's networks, counted by torch on the meta device: products, a multiplication and an addition each."""

import functools
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from vadit.config import AutoencoderSpec, Config, DiTConfig, DiTSpec, MaskSpec, vary
from vadit.estimate.networks import networks
from vadit.models.autoencoder import Autoencoder
from vadit.models.masked import build_generator


@functools.cache
def dit_flops(spec: DiTSpec, mask: MaskSpec | None = None, *, masked: bool = False) -> int:
    """FLOPs of one image's forward pass; `masked`: of a pass of the mask's network that sees a part of the tokens."""
    with torch.device("meta"):
        model = build_generator(spec, mask or MaskSpec()).to("meta")
        x_1Chw, zero_1 = torch.zeros(1, spec.in_channels, spec.input_size, spec.input_size), torch.zeros(1)
        return _count(lambda: model.forward_features(x_1Chw, zero_1, zero_1.long(), zero_1.bool(), masked=masked))


@functools.cache
def decoder_flops(spec: AutoencoderSpec) -> int:
    """FLOPs that make one image of a latent."""
    with torch.device("meta"):
        model, side = Autoencoder(spec), spec.latent_size
        return _count(lambda: model.decode(torch.zeros(1, spec.latent_channels, side, side)))


def training_flops(config: Config) -> float:
    """FLOPs per image of a training step: the networks that are trained, and those that are frozen.

    MaskDiT's is the masked step, unless the run begins without masks. Of a foundation model the products with weights
    are counted: attention would be a few percent more.
    """
    if isinstance(config, DiTConfig) and config.mask.unmasked_after_images:
        config = vary(config, mask={"unmasked_after_images": None})
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        total = 0.0
        for network in networks(config):
            if (forward := network.forward) is None:
                total += 2 * network.num_frozen * _tokens(config)
            else:
                network.module.to("meta")  # what was made elsewhere
                total += network.step_flops * _count(functools.partial(forward, 1))
            if network.again is not None:
                total += _count(functools.partial(network.again, 1))
    return total


def _tokens(config: Config) -> int:
    """Those of a foundation model: as many as the latent has places, or patches."""
    if isinstance(config, DiTConfig):
        return (config.model.input_size // config.model.patch_size) ** 2
    return config.autoencoder.latent_size**2


def _count(forward: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def tracked_flops(config: Config) -> float | None:
    """`training_flops`; None where they change in mid-run: with mask.unmasked_after_images."""
    changes = isinstance(config, DiTConfig) and config.mask.kind == "maskdit" and config.mask.unmasked_after_images
    return None if changes else training_flops(config)


PEAK_TFLOPS = {
    "A100": 312, "A800": 312, "A40": 149.7, "A10": 125, "RTX A6000": 154.8, "RTX 3090": 71,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "H200 NVL": 835, "H200": 989, "GH200": 989,
    "L4": 121, "L40": 181, "L40S": 362, "RTX 4090": 165, "RTX 6000 Ada": 364,
    "B100": 1750, "B200": 2250, "GB200": 2500, "RTX 5090": 209.5,
    "MI210": 181, "MI250X": 191.5, "MI300X": 1307, "MI325X": 1307, "MI355X": 2500,
}  # fmt: skip
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


PEAKS = {"bf16": 1.0, "tf32": 1 / 2, "fp32": 1 / 16}
"""FLOP/s of a GPU over its bf16 peak: TF32 by the makers' data sheets, fp32 about (H200: 67 of 989)."""
SHARES = {"bf16": 0.45, "tf32": 0.45, "fp32": 0.8}
"""Of the peak that a whole pass keeps up: an assumption, which the hours hang on."""


def hours(flops: float, precision: str, peak_bf16: float) -> float:
    """Hours of so many FLOPs in a precision on a GPU of this bf16 peak in FLOP/s."""
    return flops / (peak_bf16 * PEAKS[precision] * SHARES[precision]) / 3600

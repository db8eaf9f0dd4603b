"""What samples would take on one GPU: FLOPs over a share of its peak, and memory. Modelled, not measured."""

import functools
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vadit.config import AutoencoderSpec, DiTSpec, MaskSpec
from vadit.estimate.memory import BF16, FP32, held
from vadit.models.autoencoder import Autoencoder
from vadit.models.masked import build_generator

PEAKS = {"bf16": 1.0, "tf32": 1 / 2, "fp32": 1 / 16}
"""FLOP/s of a GPU over its bf16 peak: TF32 by the makers' data sheets, fp32 about (H200: 67 of 989)."""
SHARES = {"bf16": 0.45, "tf32": 0.45, "fp32": 0.8}
"""Of the peak that a whole pass keeps up: an assumption, which the hours hang on."""


def hours(flops: float, precision: str, peak_bf16: float) -> float:
    """Hours of so many FLOPs in a precision on a GPU of this bf16 peak in FLOP/s."""
    return flops / (peak_bf16 * PEAKS[precision] * SHARES[precision]) / 3600


def sampling_bytes(
    generators: Sequence[tuple[DiTSpec, MaskSpec]],
    rows: int,
    autoencoder: AutoencoderSpec,
    decoded: int,
    precision: str,
) -> float:
    """Weights, and what the largest pass holds: a generator's over `rows`, or the decoder's over `decoded` latents."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        models, decoder = [build_generator(*each).eval() for each in generators], Autoencoder(autoencoder).eval()
        weights = FP32 * _size(decoder) + sum(map(_size, models)) * (FP32 + (BF16 if precision == "bf16" else 0))
        side = autoencoder.latent_size
        latents = torch.zeros(decoded, autoencoder.latent_channels, side, side)
        most = held(decoder, lambda: decoder.decode(latents), "fp32")
        for model in models:
            side, t, labels = model.spec.input_size, torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
            x = torch.zeros(rows, model.in_channels, side, side)
            most = max(most, x.nbytes + held(model, functools.partial(model, x, t, labels), precision))
    return weights + most


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())

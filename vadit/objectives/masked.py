"""MaskDiT's loss: denoising where tokens were seen, reconstruction where they were not (Zheng et al. 2023, section 3).

MDT needs no loss of its own: it adds the ordinary loss of a masked pass to that of an unmasked one (Gao et al. 2023).
Shapes: B batch, C channels, h w latent rows and columns, p patch side, N tokens = (h/p) (w/p).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.config import FlowSpec, MaskSpec
from vadit.objectives import flow

MaskedVelocity = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(x_t, t, labels) to (output (B, C, h, w), mask (B, N) bool: True where a token was not seen)."""

Terms = dict[str, Tensor]
"""Loss terms by name, `loss` their sum."""

VARIANCE_EPS = 1e-6


@dataclass(frozen=True)
class MaskedLoss:
    """What the trainer minimises and logs: scalars, means over the batch."""

    total: Tensor
    """mse + direction + reconstruction_weight * reconstruction."""
    mse: Tensor
    """Squared error of the prediction at the visible positions."""
    direction: Tensor
    """Velocity direction loss at the visible positions; zero where it is off."""
    reconstruction: Tensor
    """Squared error of the data's estimate against the noisy patches, normalised, at the masked positions."""


def loss_terms(
    mask: MaskSpec,
    spec: FlowSpec,
    network: Callable[..., tuple[Tensor, Tensor | None]],
    ordinary: Callable[[flow.Velocity], Terms],
    x1: Tensor,
    labels: Tensor,
    images_seen: int,
) -> Terms:
    """The terms of a masked run for data x1 (B, C, h, w).

    network(x_t, t, labels, masked=...) gives the output, and of a masked pass the mask; ordinary(velocity) are the
    terms of an unmasked run. MDT: those of a pass over all tokens, and with names that begin with masked_ those of
    a masked one; the sum is trained on. Each has noise and time of its own (in MDT's code they share the time).
    MaskDiT: those of `training_loss`, or the ordinary ones from `unmasked_after_images` images on.
    """

    def velocity(x_t: Tensor, t: Tensor, labels: Tensor, masked: bool = False) -> Tensor:
        return network(x_t, t, labels, masked=masked)[0]

    if mask.kind == "mdt":
        whole, part = ordinary(velocity), ordinary(partial(velocity, masked=True))
        named = {f"masked_{name}": value for name, value in part.items() if name != "loss"}
        return whole | named | {"loss": whole["loss"] + part["loss"]}
    if mask.unmasked_after_images is not None and images_seen >= mask.unmasked_after_images:
        return ordinary(velocity)
    loss = training_loss(spec, partial(network, masked=True), x1, labels, images_seen, mask.reconstruction_weight)
    return {
        "loss": loss.total,
        "mse": loss.mse,
        "direction": loss.direction,
        "reconstruction": loss.reconstruction,
    }


def training_loss(
    spec: FlowSpec,
    model: MaskedVelocity,
    x1: Tensor,
    labels: Tensor,
    images_seen: int,
    reconstruction_weight: float,
    generator: torch.Generator | None = None,
) -> MaskedLoss:
    """One draw of noise and time for data x1 (B, C, h, w), and MaskDiT's loss of a velocity on the linear path.

    The data's estimate x_t + (1 - t) v stands where the paper has EDM's denoiser.
    """
    t = flow.sample_time(spec, x1.shape[0], images_seen, generator, x1.device)
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    x_t, velocity = flow.interpolate(spec.path, x0, x1, t.to(x1.dtype))
    output, mask_BN = model(x_t, t, labels)
    assert mask_BN is not None, "a masked pass gives its mask"
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    visible_Bhw = ~spread(mask_BN, x1.shape[-2:])
    mse = mean_where((output - velocity).square().mean(dim=1), visible_Bhw).mean()
    direction = torch.zeros_like(mse)
    if spec.direction_loss:
        direction = mean_where(1 - F.cosine_similarity(output, velocity, dim=1), visible_Bhw).mean()
    data = x_t + (1 - t).reshape(-1, 1, 1, 1) * output
    rebuilt = reconstruction(data, x_t, mask_BN).mean()
    total = mse + direction + reconstruction_weight * rebuilt
    return MaskedLoss(total=total, mse=mse, direction=direction, reconstruction=rebuilt)


def reconstruction(data: Tensor, noisy: Tensor, mask_BN: Tensor) -> Tensor:
    """(B,) mean squared error of masked patches of `data` against those of `noisy` (B, C, h, w), each normalised.

    As MAE's with normalised pixels (He et al. 2022): a target patch has mean 0 and (unbiased) variance 1 over its p p C
    numbers. The target is the noisy input, not the clean data: the paper's choice.
    """
    patches, target = (patchify(x, mask_BN.shape[1]) for x in (data, noisy))
    variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
    target = (target - mean) / (variance + VARIANCE_EPS).sqrt()
    return mean_where((patches - target).square().mean(dim=-1), mask_BN)


def patchify(x_BChw: Tensor, num_tokens: int) -> Tensor:
    """(B, N, p p C): the numbers of each patch, in the order of the tokens."""
    B, C, h, w = x_BChw.shape
    p = round((h * w / num_tokens) ** 0.5)
    assert h // p * (w // p) == num_tokens, f"{num_tokens} tokens do not tile {h} x {w}"
    x = x_BChw.reshape(B, C, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B, num_tokens, p * p * C)


def spread(mask_BN: Tensor, size: torch.Size) -> Tensor:
    """A mask of tokens (B, N) as one of positions (B, h, w)."""
    h, w = size
    p = round((h * w / mask_BN.shape[1]) ** 0.5)
    return mask_BN.reshape(-1, h // p, w // p).repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """(B,) means of values (B, ...) over the positions where `chosen` (bool, of that shape) is True."""
    weight = chosen.to(values.dtype).flatten(1)
    return (values.flatten(1) * weight).sum(dim=1) / weight.sum(dim=1)

"""MaskDiT's loss: denoising where tokens were seen, reconstruction where they were not (Zheng et al. 2023, section 3).

MDT needs no loss of its own: it adds the ordinary loss of a masked pass to that of an unmasked one (Gao et al. 2023).
Shapes: B batch, C channels, h w latent rows and columns, p patch side, N tokens = (h/p) (w/p).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.config import FlowSpec, MaskSpec
from vadit.objectives import flow

VARIANCE_EPS = 1e-6


def passes(mask: MaskSpec, images_seen: int) -> tuple[bool, ...]:
    """The passes of a step through the network: over all tokens (False), over those that are not masked (True).

    MDT trains on the sum of both, each with noise and time of its own (in MDT's code they share the time). MaskDiT
    masks until `unmasked_after_images` images.
    """
    if mask.kind == "mdt":
        return (False, True)
    late = mask.unmasked_after_images
    return (mask.kind == "maskdit" and (late is None or images_seen < late),)


def loss(
    spec: FlowSpec, drawn: flow.Drawn, output: Tensor, mask_BN: Tensor, reconstruction_weight: float
) -> dict[str, Tensor]:
    """MaskDiT's loss of a velocity (B, C, h, w) on the linear path, by its terms: scalars, means over the batch.

    mask_BN: bool, True where a token was not seen. The data's estimate x_t + (1 - t) v stands where the paper has EDM's
    denoiser. loss: mse + direction (at the visible positions) + reconstruction_weight x reconstruction (at the masked
    ones).
    """
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    visible_Bhw = ~spread(mask_BN, output.shape[-2:])
    mse = mean_where((output - drawn.velocity).square().mean(dim=1), visible_Bhw).mean()
    direction = torch.zeros_like(mse)
    if spec.direction_loss:
        direction = mean_where(1 - F.cosine_similarity(output, drawn.velocity, dim=1), visible_Bhw).mean()
    data = drawn.x_t + (1 - drawn.t).reshape(-1, 1, 1, 1) * output
    rebuilt = reconstruction(data, drawn.x_t, mask_BN).mean()
    total = mse + direction + reconstruction_weight * rebuilt
    return {"loss": total, "mse": mse, "direction": direction, "reconstruction": rebuilt}


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

"""The losses of VA-VAE: reconstruction, KL, adversarial and VF terms, and the two adaptive weights.

Sum form, as in LDM (Rombach et al. 2022) and the paper (arXiv 2501.01423, section 3): nll and KL are summed over
pixels and latent positions and divided by the batch. The VF loss itself is the op `vadit.kernels.vf_loss`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

# The reference's constants: they matter, as all norms are compared with EPSILON, not scaled.
EPSILON = 1e-4
MAX_GAN_WEIGHT = 1e4
MAX_VF_WEIGHT = 1e8


def reconstruction_nll(
    images: Tensor, reconstructions: Tensor, *, perceptual: Callable[[Tensor, Tensor], Tensor] | None, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """nll = sum(|x - x^| + w * LPIPS(x, x^)) / B with a log-variance of 0, the mean |x - x^|, the mean LPIPS.

    images, reconstructions: (B, 3, H, W) in [-1, 1], fp32. LPIPS (B, 1, 1, 1) is broadcast over the pixels.
    """
    absolute = (images - reconstructions).abs()
    if perceptual is None:
        return absolute.sum() / len(images), absolute.mean(), absolute.new_zeros(())
    distance = perceptual(images, reconstructions)
    return (absolute + weight * distance).sum() / len(images), absolute.mean(), distance.mean()


def generator_hinge_loss(fake_logits: Tensor) -> Tensor:
    """g = -mean D(x^)."""
    return -fake_logits.mean()


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """0.5 * (mean relu(1 - D(x)) + mean relu(1 + D(x^)))."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(nll_norm: Tensor, other_norm: Tensor, *, maximum: float) -> Tensor:
    """clamp(||d nll / dW|| / (||d other / dW|| + 1e-4), 0, maximum), a constant for autograd."""
    return (nll_norm / (other_norm + EPSILON)).clamp(0.0, maximum).detach()


def conv_weight_grad_norm(inputs: Tensor, output_grad: Tensor, weight_shape: torch.Size) -> Tensor:
    """||dL/dW|| of a 3x3 convolution with stride 1 and padding 1, from its input and dL/d(output).

    The weight itself is not touched: under ZeRO-3 it is not there between forward and backward, and
    autograd.grad with respect to it would run DeepSpeed's gradient hooks.
    inputs: (B, C_in, h, w); output_grad: (B, C_out, h, w).
    """
    grad = conv2d_weight(inputs.float(), list(weight_shape), output_grad.float(), stride=1, padding=1)
    return grad.norm()

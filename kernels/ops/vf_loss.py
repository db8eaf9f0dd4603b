"""The vision-foundation loss of VA-VAE (arXiv 2501.01423, equations of L_mcos and L_mdms), in low-rank form.

    z' = W z
    L_mcos = mean_{b,i}   relu(1 - m1 - cos(z'_i, f_i))
    L_mdms = mean_{b,i,j} relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - m2)

z' (B, D, N) is never formed: with A = W^T W (d x d), <z'_i, z'_j> = z_i^T A z_j and <z'_i, f_i> = z_i^T (W^T f_i).
For D 1024, d 32, N 256 that is a third of the arithmetic; the Gram matrix of the features dominates what is left.
Bytes moved are small beside the arithmetic: read z and f once, two (B, N, N) matrices in between.
Shape suffixes: B batch, d latent channels, D feature channels, N positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch

OP = "vf_loss"
MIN_SQUARED_NORM = 1e-24
"""A vector shorter than 1e-12 (the eps of torch's normalize) has no direction: its cosines and gradients are 0."""


def _inverse_norm(squared_norm: Tensor) -> Tensor:
    """1 / sqrt(n), and 0 with a zero gradient for vectors without a direction (1 / eps would be 1e12)."""
    has_direction = squared_norm > MIN_SQUARED_NORM
    return torch.where(has_direction, torch.where(has_direction, squared_norm, 1.0).rsqrt(), 0.0)


def vf_loss_reference(
    z_BdN: Tensor, weight_Dd: Tensor | None, features_BDN: Tensor, cos_margin: float, distmat_margin: float
) -> tuple[Tensor, Tensor]:
    """Both losses in plain torch, float32 inside whatever autocast says (float64 if z or features are)."""
    wide = torch.promote_types(torch.promote_types(z_BdN.dtype, features_BDN.dtype), torch.float32)
    # bf16 matrix products would lose the small differences of cosines that the margins are about.
    with torch.autocast(device_type=z_BdN.device.type, enabled=False):
        z, f = z_BdN.to(wide), features_BDN.to(wide)
        f = f * _inverse_norm(f.square().sum(1, keepdim=True))
        if weight_Dd is None:
            Az_BdN, Wf_BdN = z, f
        else:
            weight = weight_Dd.to(wide)
            Az_BdN, Wf_BdN = (weight.T @ weight) @ z, weight.T @ f
        inverse_norm_BN = _inverse_norm((z * Az_BdN).sum(1))
        cos_BN = (z * Wf_BdN).sum(1) * inverse_norm_BN
        gram_BNN = (z * inverse_norm_BN[:, None]).transpose(1, 2) @ (Az_BdN * inverse_norm_BN[:, None])
        cos_loss = F.relu(1 - cos_margin - cos_BN).mean()
        distmat_loss = F.relu((gram_BNN - f.transpose(1, 2) @ f).abs() - distmat_margin).mean()
    return cos_loss, distmat_loss


def _check(z: Tensor, weight: Tensor | None, features: Tensor) -> None:
    checks.check_kind(OP, z=z, weight=weight, features=features)
    if z.ndim != 3 or features.ndim != 3:
        checks.fail(OP, f"z {checks.shape(z)}, features {checks.shape(features)}", "z (B, d, N), features (B, D, N)")
    found = f"z {checks.shape(z)}, features {checks.shape(features)}"
    if (z.shape[0], z.shape[2]) != (features.shape[0], features.shape[2]):
        checks.fail(OP, found, "the same number of images and of positions in both")
    if weight is not None:
        checks.check_shape(OP, "weight", weight, (features.shape[1], z.shape[1]), found)
    elif z.shape[1] != features.shape[1]:
        checks.fail(OP, found, "equally many channels in both where weight is None")


def vf_loss(
    z: Tensor, weight: Tensor | None, features: Tensor, *, cos_margin: float, distmat_margin: float
) -> tuple[Tensor, Tensor]:
    """Marginal cosine similarity loss and marginal distance matrix similarity loss.

    Args: z (B, d, N) latent; weight (D, d) projection to the features' width, or None where d == D already;
        features (B, D, N) of the frozen foundation model; cos_margin m1; distmat_margin m2; any floating dtypes.
    Returns: (L_mcos, L_mdms), two float32 scalars, differentiable in z, weight and features (NaN for an empty batch:
        means over nothing).
    Raises: ValueError naming the shapes found and needed.
    """
    _check(z, weight, features)
    dispatch.check_setting()
    return vf_loss_reference(z, weight, features, cos_margin, distmat_margin)

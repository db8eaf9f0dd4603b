"""The vision-foundation loss of VA-VAE (arXiv 2501.01423, equations of L_mcos and L_mdms), in low-rank form.

    z' = W z
    L_mcos = mean_{b,i}   relu(1 - m1 - cos(z'_i, f_i))
    L_mdms = mean_{b,i,j} relu(|cos(z'_i, z'_j) - cos(f_i, f_j)| - m2)

z' (B, D, N) is never formed: with A = W^T W (d x d), <z'_i, z'_j> = z_i^T A z_j and <z'_i, f_i> = z_i^T (W^T f_i).
For D 1024, d 32, N 256 that is a third of the arithmetic, and the Gram matrix of the features is three quarters of what
is left. Kernels compute that one, its upper triangle only (`vf_gram`), and compare it with the latent's (`vf_distmat`);
the thin products around them are torch's. Bytes moved are small beside the arithmetic.
Shape suffixes: B batch, d latent channels, D feature channels, N positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, dispatch

OP = "vf_loss"
SCHEMAS = {
    "vf_gram": "(Tensor features) -> (Tensor cosines, Tensor inverse_norm)",
    "vf_distmat": "(Tensor u, Tensor v, Tensor cosines, float margin) -> (Tensor loss, Tensor sign)",
}
MIN_SQUARED_NORM = 1e-24
"""A vector shorter than 1e-12 (the eps of torch's normalize) has no direction: its cosines and gradients are 0."""


def _inverse_norm(squared_norm: Tensor) -> Tensor:
    """1 / sqrt(n), and 0 with a zero gradient for vectors without a direction (1 / eps would be 1e12)."""
    has_direction = squared_norm > MIN_SQUARED_NORM
    return torch.where(has_direction, torch.where(has_direction, squared_norm, 1.0).rsqrt(), 0.0)


def _directions(features_BDN: Tensor) -> Tensor:
    """The features of each position at length 1."""
    return features_BDN * _inverse_norm(features_BDN.square().sum(1, keepdim=True))


def _project(z_BdN: Tensor, weight_Dd: Tensor, features_BDN: Tensor) -> tuple[Tensor, Tensor]:
    """A z and W^T f, both (B, d, N): all that the losses need of W."""
    return (weight_Dd.T @ weight_Dd) @ z_BdN, weight_Dd.T @ features_BDN


def vf_loss_reference(
    z_BdN: Tensor,
    weight_Dd: Tensor,
    features_BDN: Tensor,
    cos_margin: float,
    distmat_margin: float,
    gram_BNN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Both losses in plain torch, float32 inside whatever autocast says (float64 if z or features are)."""
    wide = torch.promote_types(torch.promote_types(z_BdN.dtype, features_BDN.dtype), torch.float32)
    # bf16 matrix products would lose the small differences of cosines that the margins are about.
    with torch.autocast(device_type=z_BdN.device.type, enabled=False):
        z, f = z_BdN.to(wide), _directions(features_BDN.to(wide))
        Az_BdN, Wf_BdN = _project(z, weight_Dd.to(wide), f)
        inverse_norm_BN = _inverse_norm((z * Az_BdN).sum(1))
        cos_BN = (z * Wf_BdN).sum(1) * inverse_norm_BN
        own_BNN = (z * inverse_norm_BN[:, None]).transpose(1, 2) @ (Az_BdN * inverse_norm_BN[:, None])
        gram = f.transpose(1, 2) @ f if gram_BNN is None else gram_BNN.to(wide)
        cos_loss = F.relu(1 - cos_margin - cos_BN).mean()
        distmat_loss = F.relu((own_BNN - gram).abs() - distmat_margin).mean()
    return cos_loss, distmat_loss


# ------------------------------------- csrc/cpu/vf_loss.cpp, csrc/cuda/vf_loss.cu, triton_kernels/vf_loss.py


def register(namespace: str) -> None:
    """Shapes of the results of the ops in a namespace that has them."""

    @torch.library.register_fake(f"{namespace}::vf_gram")
    def _(features: Tensor) -> tuple[Tensor, Tensor]:
        B, _, N = features.shape
        return features.new_empty(B, N, N, dtype=torch.float32), features.new_empty(B, N, dtype=torch.float32)

    @torch.library.register_fake(f"{namespace}::vf_distmat")
    def _(u: Tensor, v: Tensor, cosines: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        return u.new_empty(()), torch.empty_like(cosines, dtype=torch.int8)


class _DistmatLoss(torch.autograd.Function):
    """L = sum_ij relu(|u_i.v_j - c_ij| - m) / (B N N); the matrix of signs is symmetric."""

    @staticmethod
    def forward(ctx: Any, u_BdN: Tensor, v_BdN: Tensor, cosines_BNN: Tensor, margin: float, namespace: str) -> Tensor:
        loss, sign_BNN = getattr(torch.ops, namespace).vf_distmat(u_BdN, v_BdN, cosines_BNN, margin)
        ctx.save_for_backward(u_BdN, v_BdN, sign_BNN)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        u_BdN, v_BdN, sign_BNN = ctx.saved_tensors
        with torch.autocast(device_type=u_BdN.device.type, enabled=False):
            dgram_BNN = sign_BNN.to(u_BdN.dtype) * (dloss / max(sign_BNN.numel(), 1))
            return v_BdN @ dgram_BNN, u_BdN @ dgram_BNN, None, None, None


def _vf_loss_kernels(
    ops: Any,
    z_BdN: Tensor,
    weight_Dd: Tensor,
    features_BDN: Tensor,
    cos_margin: float,
    distmat_margin: float,
    gram_BNN: Tensor | None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(device_type=z_BdN.device.type, enabled=False):
        z, f = z_BdN.float(), features_BDN.float()
        if gram_BNN is None:
            gram, f_inverse_norm_BN = ops.vf_gram(features_BDN)
        else:
            gram, f_inverse_norm_BN = gram_BNN.float().contiguous(), _inverse_norm(f.square().sum(1))
        Az_BdN, Wf_BdN = _project(z, weight_Dd.float(), f)
        inverse_norm_BN = _inverse_norm((z * Az_BdN).sum(1))
        cos_BN = (z * Wf_BdN).sum(1) * inverse_norm_BN * f_inverse_norm_BN
        u, v = z * inverse_norm_BN[:, None], Az_BdN * inverse_norm_BN[:, None]
        distmat_loss = _DistmatLoss.apply(u.contiguous(), v.contiguous(), gram, distmat_margin, ops.name)
        return F.relu(1 - cos_margin - cos_BN).mean(), distmat_loss


# ---------------------------------------------------------------------------------------------------------- public


def _check(z: Tensor, weight: Tensor, features: Tensor, gram: Tensor | None) -> None:
    checks.check_kind(OP, z=z, weight=weight, features=features, features_gram=gram)
    if z.ndim != 3 or features.ndim != 3:
        checks.fail(OP, f"z {checks.shape(z)}, features {checks.shape(features)}", "z (B, d, N), features (B, D, N)")
    found = f"z {checks.shape(z)}, features {checks.shape(features)}"
    if (z.shape[0], z.shape[2]) != (features.shape[0], features.shape[2]):
        checks.fail(OP, found, "the same number of images and of positions in both")
    checks.check_shape(OP, "weight", weight, (features.shape[1], z.shape[1]), found)
    checks.check_shape(OP, "features_gram", gram, (z.shape[0], z.shape[2], z.shape[2]), found)
    checks.check_inner(OP, z=z, features=features)


def features_gram(features: Tensor) -> Tensor:
    """Cosines between the positions of each image's features, (B, N, N) float32: what `vf_loss` takes precomputed.

    Args: features (B, D, N), its last axis contiguous, any floating dtype.
    Raises: ValueError naming the shape found and needed.
    """
    checks.check_kind(OP, features=features)
    if features.ndim != 3:
        checks.fail(OP, f"features {checks.shape(features)}", "features (B, D, N)")
    checks.check_inner(OP, features=features)
    ops = dispatch.kernels_for(OP, features)
    if ops is not None:
        return ops.vf_gram(features.detach())[0]
    with torch.autocast(device_type=features.device.type, enabled=False):
        f = _directions(features.detach().to(torch.promote_types(features.dtype, torch.float32)))
        return f.transpose(1, 2) @ f


def vf_loss(
    z: Tensor,
    weight: Tensor,
    features: Tensor,
    *,
    cos_margin: float,
    distmat_margin: float,
    features_gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Marginal cosine similarity loss and marginal distance matrix similarity loss.

    Args: z (B, d, N) latent; weight (D, d) projection to the features' width; features (B, D, N) of the frozen
        foundation model; cos_margin m1; distmat_margin m2; features_gram (B, N, N), what the function of that name
        makes of the features, if it is at hand. Any floating dtypes; the last axes of z and features are contiguous.
    Returns: (L_mcos, L_mdms), two float32 scalars, differentiable in z and weight (NaN for an empty batch: means over
        nothing). Features that require a gradient get it, from plain torch.
    Raises: ValueError naming the shapes found and needed.
    """
    _check(z, weight, features, features_gram)
    margins = cos_margin, distmat_margin
    # The kernels have no gradient for the features: they are frozen in every recipe.
    ops = None if features.requires_grad else dispatch.kernels_for(OP, z, features)
    if ops is None:
        return vf_loss_reference(z, weight, features, *margins, features_gram)
    return _vf_loss_kernels(ops, z, weight, features, *margins, features_gram)

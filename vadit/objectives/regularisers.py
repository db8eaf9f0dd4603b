"""Losses on what a generator computes inside: alignment to a foundation model (REPA), dispersion.

Shapes: B batch, N tokens, D width, F channels of the features, h w their rows and columns.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.runtime.errors import UsageError


def alignment_loss(projected_BNF: Tensor, features_BFhw: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos(projected token, feature at its place), in fp32 (REPA, Yu et al. 2024, eq. 8)."""
    features_BNF = features_BFhw.flatten(2).transpose(1, 2)
    if projected_BNF.shape != features_BNF.shape:
        raise UsageError(
            f"repa: the block has {projected_BNF.shape[1]} tokens of {projected_BNF.shape[2]} channels, the features "
            f"{features_BNF.shape[1]} of {features_BNF.shape[2]}; take features of the generator's grid "
            "and of repa.foundation"
        )
    return 1 - F.cosine_similarity(projected_BNF.float(), features_BNF.float(), dim=-1).mean()


def dispersive_loss(hidden_BND: Tensor, temperature: float = 0.5) -> Tensor:
    """log mean over pairs of exp(-|h_i - h_j|^2 / (D temperature)), in fp32 (Wang & He 2025, InfoNCE with l2).

    h_i is a sample's whole output, D = N x D numbers; the pairs are all B x B of the micro-batch, as in their code.
    """
    rows = hidden_BND.flatten(1).float()
    rows = rows - rows.mean(dim=0)  # distances stay, and the products that they are made of lose fewer digits
    squares = rows.square().sum(dim=1)
    distances = (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp(min=0) / rows.shape[1]
    return torch.logsumexp((-distances / temperature).flatten(), dim=0) - 2 * math.log(len(rows))

"""torch.compile of a network's parts, in training and in sampling."""

from collections.abc import Sequence

import torch
from torch import nn


def compile_each(parts: Sequence[nn.Module]) -> None:
    """torch.compile every part by itself, for the shapes that it meets."""
    # Parts of one class share their graphs by shape, and past this number of graphs would run uncompiled.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 2 * len(parts))
    for part in parts:
        part.forward = torch.compile(part.forward, dynamic=False)

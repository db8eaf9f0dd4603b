"""The process group of a process alone: what a collective gives is what went in, and no port is opened.

Gloo and NCCL listen even where there is nobody to meet.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

BACKEND = "alone"


class Alone(dist.ProcessGroup):
    """A group of one: its reductions are of one value, what it scatters and gathers is copied."""


def _keep(group: Alone, *_: Any, **__: Any) -> dist.Work:
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(done)


def _copy(group: Alone, outputs: Any, inputs: Any, *_: Any, **__: Any) -> dist.Work:
    for output, value in zip(tree_leaves(outputs), tree_leaves(inputs), strict=True):
        output.detach().copy_(value.detach().reshape(output.shape))
    return _keep(group)


for _work, _names in (
    (_keep, "allreduce allreduce_coalesced broadcast reduce barrier"),
    (_copy, "allgather allgather_coalesced gather gather_single scatter alltoall all_to_all_single reduce_scatter"),
    (_copy, "all_gather_single all_gather_single_coalesced reduce_scatter_single reduce_scatter_single_coalesced"),
    (_copy, "_allgather_base _reduce_scatter_base alltoall_base"),  # as torch named them before 2.14
    (_copy, "allgather_into_tensor_coalesced reduce_scatter_tensor_coalesced"),
):
    for _name in _names.split():
        setattr(Alone, _name, _work)
_make: Any = Alone
dist.Backend.register_backend(BACKEND, lambda _, rank, size, __: _make(rank, size), devices=["cpu", "cuda"])

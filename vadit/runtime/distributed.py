"""Where this process stands among the others, how it joins them, and the few collectives that the trainers need."""

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves

from vadit.runtime import launcher
from vadit.runtime.errors import RunError, UsageError, first_line
from vadit.runtime.precision import allow_tf32

T = TypeVar("T")
ALONE = "alone"  # backend of a process alone
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # an entry per GPU, also of one that CUDA cannot use


def rank() -> int:
    """Index of this process, from 0."""
    return launcher.place().rank


def world_size() -> int:
    return launcher.place().world_size


def is_main() -> bool:
    """Whether this is the process that logs and writes what is written once."""
    return rank() == 0


def device(choice: str = "auto") -> torch.device:
    """The device of this process: auto takes this process's GPU where there is one.

    UsageError for auto where this is one process of several on a machine whose GPUs torch does not see: it would take
    the CPU and wait, without a word, for processes that meet on GPUs.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    lost = not hidden and not torch.cuda.is_available() and any(NVIDIA_GPUS.glob("*"))
    if choice == "auto" and world_size() > 1 and lost:
        raise UsageError(
            f"{socket.gethostname()} has GPUs that torch does not see (`vadit doctor` there says why); mend that, or "
            "set --device cpu (vadit train: --run.device cpu)"
        )
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        _keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError(
            "the device is set to cuda but torch sees no GPU; set --device cpu (vadit train: --run.device cpu), or see "
            "`vadit doctor`"
        )
    if (index := launcher.place().local_rank) >= (count := torch.cuda.device_count()):
        raise UsageError(
            f"LOCAL_RANK is {index} where torch sees {count} GPU(s); let each process see all, and start one per GPU"
        )
    torch.cuda.set_device(index)
    allow_tf32("none")  # fp32 is fp32, unless a run says otherwise (engine.tf32)
    return torch.device("cuda", index)


def _keep_freed_memory() -> None:
    """Have glibc take large blocks from its heap, and keep what is freed: every step asks for the same sizes again.

    By default it maps blocks from 32 MB on anew each time, whose pages the kernel then clears. Elsewhere: no change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def join(backend: str, timeout: timedelta, device: torch.device | None = None) -> None:
    """Meet the launcher's other processes over `backend`; alone, make a group that opens no port.

    RunError where they do not meet within `timeout`.
    """
    here = launcher.place()
    if here.world_size == 1:
        dist.init_process_group(ALONE, store=dist.HashStore(), rank=0, world_size=1)
        return
    if here.one_machine:  # no other needs to reach what they open
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")
    group: dict[str, Any] = {"rank": here.rank, "world_size": here.world_size, "device_id": device}
    try:
        dist.init_process_group(backend, store=_store(here, timeout), timeout=timeout, **group)
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"rank {here.rank} of {here.world_size} cannot meet the others at {here.address}:{here.port} "
            f"({first_line(error)}); see that all are started, that MASTER_ADDR leads to rank 0's machine, and that "
            "MASTER_PORT is free there"
        ) from error


def _store(here: launcher.Place, timeout: timedelta) -> dist.Store:
    """The group's store, which rank 0 keeps unless torchrun's agent does; it listens at the address of rank 0 alone.

    At all addresses, as torch has it, where that is not one of this machine's, and where a host name leads to the
    loopback on its own machine, as Debian has it, but elsewhere on others that there may be.
    """
    keeps, fd = here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", None
    for family, *_, where in socket.getaddrinfo(here.address, here.port, type=socket.SOCK_STREAM) if keeps else []:
        if fd is None and (here.one_machine or not launcher.LOOPBACK.fullmatch(str(where[0]))):
            with contextlib.suppress(OSError):
                fd = socket.create_server(where[:2], family=family).detach()
    address = here.address, here.port, here.world_size
    return dist.TCPStore(*address, is_master=keeps, timeout=timeout, master_listen_fd=fd)


def set_collective_timeout(hang_timeout_s: float) -> None:
    """Let no collective give up before the watchdog does, after `hang_timeout_s` seconds (0: never).

    By itself NCCL aborts the process after 10 minutes, with no word about who is missing, where one of them perhaps
    still writes a large checkpoint to a slow disk. Call it once all process groups are made.
    """
    if world_size() == 1:
        return
    limit = timedelta(seconds=2 * hang_timeout_s + 600) if hang_timeout_s else timedelta(days=7)
    set_timeout = getattr(distributed_c10d, "set_timeout", distributed_c10d._set_pg_timeout)  # before torch 2.14
    for group in list(distributed_c10d._world.pg_map):
        set_timeout(limit, group)


def barrier() -> None:
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def all_mean(values: torch.Tensor) -> torch.Tensor:
    """Mean over processes, element by element, in place."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def any_rank(flag: bool, on: torch.device) -> bool:
    """Whether `flag` is set on any process (every process must call)."""
    return any_most(float(flag), on) > 0


def any_most(value: float, on: torch.device) -> float:
    """The largest `value` of any process (every process must call)."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    most = torch.tensor([value], dtype=torch.float64, device=on)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most.item())


def all_gathered(value: T) -> list[T]:
    """What each process gives, in the order of ranks (every process must call); pickled on the way."""
    if not dist.is_initialized() or world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main process, where alone it is called (every process must call this).

    An error there is raised on all: none is left waiting for the main process.
    """
    outcome: list[Any] = [None, None]
    fault: Exception | None = None
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            fault = error
            known = isinstance(error, (UsageError, RunError))
            outcome[1] = error if known else RunError(f"the main process failed ({type(error).__name__}: {error})")
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if fault is not None or outcome[1] is not None:
        raise fault or outcome[1]
    return cast(T, outcome[0])


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, on the main process first (every process must call this); its error is raised on all."""
    made: list[T] = []
    from_main(lambda: made.append(make()))
    return made[0] if made else make()


def per_rank_batch(global_batch: int, accumulation: int = 1, processes: int | None = None) -> int:
    """Images per process and micro-batch (by default of as many processes as there are); it must divide."""
    processes = world_size() if processes is None else processes
    parts = processes * accumulation
    if global_batch % parts:
        lower = max(global_batch // parts, 1) * parts
        raise UsageError(
            f"run.batch_size {global_batch} is not divisible by {processes} processes x "
            f"{accumulation} accumulation steps; set --run.batch-size {lower} or change the number of processes"
        )
    return global_batch // parts


class _Alone(dist.ProcessGroup):
    """A group of one, which opens no port: gloo and NCCL listen even where there is nobody to meet.

    Its reductions are of one value, what it scatters and gathers is copied.
    """


def _keep(group: _Alone, *_: Any, **__: Any) -> dist.Work:
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(done)


def _copy(group: _Alone, outputs: Any, inputs: Any, *_: Any, **__: Any) -> dist.Work:
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
        setattr(_Alone, _name, _work)
_make: Any = _Alone
dist.Backend.register_backend(ALONE, lambda _, rank, size, __: _make(rank, size), devices=["cpu", "cuda"])

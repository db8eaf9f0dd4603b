"""The one file that knows DeepSpeed: its JSON, its start-up, one step, and where the fp32 weights lie.

Every key whose default has moved between DeepSpeed releases is written out (gradient_clipping went from 0 to 1 in
0.19, for one), so that a run means the same under another release.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vadit import distributed
from vadit.config import EngineSpec, OptimizerSpec
from vadit.errors import UsageError
from vadit.train import optimizers

MAX_BUCKET = 500_000_000
"""Weights that are reduced or gathered in one piece, at most."""


def deepspeed_config(spec: EngineSpec, *, global_batch: int, num_weights: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a run; `global_batch` counts images per optimizer step over all processes."""
    micro_batch = distributed.per_rank_batch(global_batch, spec.gradient_accumulation)
    # A bucket is allocated whole: one larger than the network would be memory for nothing. Collectives want even sizes.
    bucket = min(MAX_BUCKET, num_weights + num_weights % 2)
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "overlap_comm": spec.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if spec.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": spec.gradient_accumulation,
        "gradient_clipping": spec.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": spec.precision == "bf16", "immediate_grad_update": False},
        "fp16": {"enabled": False},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    if spec.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def start(device: torch.device) -> None:
    """Join the process group (alone, without a launcher, as one process) and quieten DeepSpeed."""
    _hush()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed

    _hush()  # DeepSpeed's import has set its own level
    if not torch.distributed.is_initialized():
        if "RANK" not in os.environ:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            os.environ.update(alone)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # Without this DeepSpeed compiles an extension at the first start on a CPU, for up to a minute and silently, to
        # speed up sums between processes of one machine: gloo serves for what runs there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _hush() -> None:
    """Leave out what DeepSpeed and torch tell at every start; errors still get through."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # ZeRO-3 calls collectives by names that torch has since deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def finish() -> None:
    """Leave the process group that a launcher's processes share.

    A process alone keeps its own: DeepSpeed could not start again in it.
    """
    if torch.distributed.is_initialized() and distributed.world_size() > 1:
        torch.distributed.destroy_process_group()


def _fused_adam(device: torch.device) -> optimizers.Builder:
    """DeepSpeed's FusedAdam, whose kernel is compiled (nvcc, ninja) at its first use on a machine."""
    if device.type != "cuda":  # there is one for CPUs, slower than torch's, that would be compiled for minutes first
        raise RuntimeError("it pays on a GPU only")
    from deepspeed.ops.adam import FusedAdam

    return FusedAdam


class Engine:
    """A network under DeepSpeed: call it, then `backward(loss)`, then `step()`."""

    def __init__(
        self, module: nn.Module, *, optimizer: OptimizerSpec, spec: EngineSpec, global_batch: int, device: torch.device
    ) -> None:
        start(device)
        import deepspeed

        self.spec = spec
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        num_weights = sum(parameter.numel() for parameter in trained)
        self.config = deepspeed_config(spec, global_batch=global_batch, num_weights=num_weights)
        fused = device.type == "cuda" and not spec.offload_optimizer
        adam, self.optimizer = optimizers.build(
            trained, optimizer, device=device, fused=fused, deepspeed_fused=lambda: _fused_adam(device)
        )
        # Of an optimizer that is not on its list DeepSpeed warns at every start.
        with contextlib.nullcontext() if self.optimizer.name == optimizers.TORCH else _quiet():
            self._engine, *_ = deepspeed.initialize(
                model=module.to(device), model_parameters=trained, optimizer=adam, config=self.config
            )

    @property
    def module(self) -> nn.Module:
        """The network itself: calling it goes round DeepSpeed's hooks."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Back-propagate `loss` (a mean over this process's micro-batch) and reduce gradients where ZeRO wants it."""
        self._engine.backward(loss)

    def step(self) -> bool:
        """Step the optimizer at an accumulation boundary. Returns whether weights changed."""
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._engine.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's, which compiles its step and wants the same tensor
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; None where DeepSpeed keeps none (ZeRO 0, fp32)."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def compute_dtype(self) -> torch.dtype:
        """Dtype that inputs of the network must have."""
        return torch.bfloat16 if self.spec.precision == "bf16" else torch.float32

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The arithmetic of the engine's forward, for a call of `module` that goes round the engine."""
        with torch.autocast(self._engine.device.type, torch.bfloat16, enabled=self.spec.precision == "autocast"):
            yield

    # -------------------------------------------------------------------------------------------- fp32 weights

    def masters(self) -> list[torch.Tensor]:
        """This process's share of the fp32 weights, flat; the whole weights where nothing is sharded (ZeRO 0)."""
        optimizer = self._engine.optimizer
        # ZeRO 1/2, ZeRO 3, and the optimizer of bf16 with fp32 accumulation keep them under different names.
        names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
        for name in names:
            if shards := getattr(optimizer, name, None):
                return [shard.data for shard in shards]
        if self.spec.precision == "bf16":
            raise UsageError("engine.zero_stage 0 keeps no sharded fp32 weights in bf16; set --engine.zero-stage 1")
        return [parameter.data for group in optimizer.param_groups for parameter in group["params"]]

    def full_state(self) -> dict[str, torch.Tensor]:
        """All weights and buffers, whole and fp32, on the host of the main process (empty elsewhere). Collective."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, torch.Tensor] = {}
        for name, parameter in self.module.named_parameters():
            with contextlib.ExitStack() as stack:
                value = (
                    safe_get_full_fp32_param(parameter) if parameter.requires_grad and self.spec.zero_stage else None
                )
                if value is None:
                    if hasattr(parameter, "ds_id"):
                        stack.enter_context(deepspeed.zero.GatheredParameters([parameter]))
                    value = parameter.detach()
                if distributed.is_main():
                    state[name] = (
                        value.detach().float().reshape(getattr(parameter, "ds_shape", parameter.shape)).cpu().clone()
                    )
        if distributed.is_main():
            own = self.module.state_dict(keep_vars=True)
            for name, buffer in self.module.named_buffers():
                if name in own:
                    state[name] = buffer.detach().cpu().clone()
        return state

    def load_masters(self, state: dict[str, torch.Tensor]) -> None:
        """Write whole fp32 weights into the sharded masters (not into the network's own copies). Collective."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self.spec.zero_stage:
                safe_set_full_fp32_param(parameter, state[name].to(self._engine.device))
            else:
                parameter.data.copy_(state[name])

    # -------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path, name: str) -> None:
        """Write weights and optimizer, each process its part, into `folder/name`. Collective."""
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=name, save_latest=False)

    def load(self, folder: Path, name: str) -> None:
        """Read what `save` wrote, with the same number of processes and ZeRO stage. Collective."""
        with _quiet():
            self._engine.load_checkpoint(str(folder), tag=name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed reports each file that it touches at INFO through several loggers; errors still get through."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)

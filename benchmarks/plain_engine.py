"""A training step without DeepSpeed: what `vadit.train.engine.Engine` is to the trainers, in plain torch.

For `bench_step.py` on machines that have torch and no DeepSpeed, and to see what DeepSpeed costs. One process, nothing
sharded, AdamW of torch; precisions mean what they mean to the engine (autocast: fp32 weights; bf16: bf16 weights with
fp32 masters). It neither saves nor resumes: nothing is trained with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vadit.config import EngineSpec, OptimizerSpec
from vadit.runtime import distributed
from vadit.runtime.compiled import compile_each
from vadit.runtime.errors import UsageError
from vadit.runtime.precision import allow_tf32
from vadit.train import optimizers


class PlainEngine:
    """The calls of `Engine` that a training step makes, with the same meaning."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerSpec,
        spec: EngineSpec,
        global_batch: int,
        device: torch.device,
        blocks: Sequence[nn.Module] = (),
        forward: Callable[..., Any] | None = None,
    ) -> None:
        if distributed.world_size() > 1:
            raise UsageError("a step in plain torch is of one process; install deepspeed for more")
        if optimizer.kind != "adamw":
            raise UsageError(f"a step in plain torch has AdamW alone, found optimizer.kind {optimizer.kind}")
        if device.type == "cuda":
            allow_tf32(spec.tf32)
        if forward is not None:
            module.forward = forward
        if spec.compile is True and blocks:
            compile_each(blocks)
        self.spec, self.device = spec, device
        self.config: dict[str, Any] = {"engine": "torch", "train_batch_size": global_batch}
        self.module = module.to(device)
        if spec.precision == "bf16":
            for weight in self.module.parameters():  # buffers stay: running statistics and tables are fp32
                weight.data = weight.data.bfloat16()
        self._weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        low = spec.precision == "bf16"
        self._masters = [nn.Parameter(weight.detach().float()) for weight in self._weights] if low else self._weights
        copies = dict(zip(self._masters, self._weights, strict=True)) if low else None
        self._adam, self.optimizer = optimizers.build(self._masters, optimizer, device=device, copies=copies)
        self._micro = 0
        self._norm: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The arithmetic of the forward pass."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "autocast"):
            yield

    def compute_dtype(self) -> torch.dtype:
        """Dtype that inputs of the network must have."""
        return torch.bfloat16 if self.spec.precision == "bf16" else torch.float32

    def masters(self) -> list[Tensor]:
        """The fp32 weights."""
        return [master.data for master in self._masters]

    def begin_step(self, lr: float) -> None:
        """Set the rate of the step."""
        for group in self._adam.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor, *, checked: Tensor | None = None) -> None:
        """Add the gradients of a micro-batch; masters in fp32 take them at once."""
        (loss / self.spec.gradient_accumulation).backward()
        if self.spec.gradient_accumulation > 1:
            optimizers.add_gradients(self._adam.copies)

    def at_boundary(self) -> bool:
        """Whether this is the last micro-batch of a step."""
        return self._micro + 1 == self.spec.gradient_accumulation

    def gradient_norm(self) -> Tensor:
        """Global norm before clipping, () fp32."""
        gradients = (optimizers.gradient(weight, self._adam.copies) for weight in self._masters)
        self._norm = optimizers.sum_of_squares([each for each in gradients if each is not None]).sqrt()
        return self._norm

    def average_along(self, shards: dict[float, list[Tensor]], rates: tuple[float, ...]) -> bool:
        """Have the step to come move the averages, too."""
        self._adam.rates = rates
        along = map(list, zip(*shards.values(), strict=True))
        self._adam.averages = dict(zip(self._masters, along, strict=True)) if rates else {}
        return True

    def grad_norm(self) -> float | None:
        """The last of them."""
        return None if self._norm is None else float(self._norm)

    def step(self, veto: Tensor | None = None) -> bool:
        """Clip and step at the last micro-batch; whether it did. The host reads the norm, as with DeepSpeed."""
        if not self.at_boundary():
            self._micro += 1
            return False
        self._micro = 0
        norm = self.gradient_norm() if veto is None or self._norm is None else self._norm
        bad = ~norm.isfinite() if veto is None else veto | ~norm.isfinite()
        applied = not bool(bad)
        if applied:
            self._adam.scale = optimizers.clipping(norm, self.spec.max_grad_norm)
            self._adam.step()
        self._adam.rates = ()
        for weight in (*self._weights, *self._masters):
            weight.grad = None
        return applied

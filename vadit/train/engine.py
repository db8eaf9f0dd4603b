"""The one file that knows DeepSpeed: its JSON, its start-up, one step, and where the fp32 weights lie.

Every key whose default has moved between DeepSpeed releases is written out (gradient_clipping went from 0 to 1 in
0.19, for one), so that a run means the same under another release.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import nn

from vadit.config import MAX_BUCKET, EngineSpec, OptimizerSpec
from vadit.runtime import distributed, launcher
from vadit.runtime.compiled import compile_each
from vadit.runtime.json_files import Count
from vadit.runtime.precision import allow_tf32
from vadit.train import optimizers

START_S = 600.0
"""What a process may take to get ready, while no watchdog looks after it yet; the others wait for three times that."""


def deepspeed_config(spec: EngineSpec, *, global_batch: int, num_weights: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a run; `global_batch` counts images per optimizer step over all processes."""
    micro_batch = distributed.per_rank_batch(global_batch, spec.gradient_accumulation)
    # A bucket is allocated whole: one larger than the network would be memory for nothing. Collectives want even sizes.
    bucket = min(MAX_BUCKET, num_weights + num_weights % 2)
    zero: dict[str, Any] = {
        "stage": spec.stage,
        "overlap_comm": spec.overlap_comm,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": True,
    }
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if spec.offload_weights:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": spec.gradient_accumulation,
        "gradient_clipping": 0.0,  # by the engine: DeepSpeed would read the norm on the host once more for it
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": spec.precision == "bf16" and spec.stage > 0, "immediate_grad_update": False},
        "fp16": {"enabled": False},
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # they would wait for the device, twice in a micro-batch
        "wall_clock_breakdown": False,
    }
    if spec.precision == "bf16" and spec.stage and spec.gradient_accumulation > 1:
        # Micro-batches are summed in fp32. At stage 1 DeepSpeed would take another optimizer for that, of other
        # habits; its stage 2 does it with the same one, and shards the sum besides.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        zero["stage"] = max(spec.stage, 2)
    if spec.precision == "autocast":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return config


def start(device: torch.device) -> None:
    """Join the other processes and quieten DeepSpeed."""
    _hush()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed

    _hush()  # DeepSpeed's import has set its own level
    if not torch.distributed.is_initialized():
        on_gpu = device.type == "cuda"
        # The processes meet; then one may read much data while the others wait.
        distributed.join("nccl" if on_gpu else "gloo", 3 * timedelta(seconds=START_S), device if on_gpu else None)
        # Without this DeepSpeed compiles an extension at the first start on a CPU, for up to a minute and silently, to
        # speed up sums between processes of one machine: gloo serves for what runs there.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    if distributed.world_size() == 1:  # ZeRO 3 compares with nobody, for which it would read LOCAL_RANK
        from deepspeed.runtime.zero import partitioned_param_coordinator

        partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """DeepSpeed wants LOCAL_RANK in the environment, also alone, and OpenMPI's to say the same."""
    kept = {name: os.environ.pop(name, None) for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")}
    os.environ["LOCAL_RANK"] = str(launcher.place().local_rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def _hush() -> None:
    """Leave out what DeepSpeed and torch print at every start; errors still get through."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_not_of_skipped_steps)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # ZeRO-3 calls collectives by names that torch has since deprecated.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def _not_of_skipped_steps(record: logging.LogRecord) -> bool:
    """The guard reports a step that is left out, and why: DeepSpeed takes every one for an overflow."""
    return "OVERFLOW! Skipping step" not in record.getMessage()


def finish() -> None:
    """Leave the process group that a launcher's processes share.

    A process alone keeps its own: DeepSpeed could not start again in it.
    """
    if torch.distributed.is_initialized() and distributed.world_size() > 1:
        torch.distributed.destroy_process_group()


def communication_backend() -> Any:
    """DeepSpeed's backend: the object whose methods its collectives are."""
    from deepspeed.comm import comm

    return comm.cdb


class Piece(NamedTuple):
    """Elements [start, start + length) of a weight, laid flat, at `offset` of a flat tensor."""

    name: str
    start: Count
    offset: Count
    length: Count


class Engine:
    """A network under DeepSpeed: call it, then `backward(loss)`, then `step()`.

    `blocks` are those of its modules that engine.compile compiles, each by itself; a call runs `forward`, where given,
    in place of the network's own.
    """

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
        start(device)
        if device.type == "cuda":
            allow_tf32(spec.tf32)
        import deepspeed

        if forward is not None:
            module.forward = forward
        if spec.compile is True and blocks:
            if spec.zero_stage == 3:  # weights of a block come and go together: no hooks inside it, to cut its graph
                deepspeed.utils.set_z3_leaf_modules(module, list({type(block) for block in blocks}))
            compile_each(blocks)
        self.spec, self.device = spec, device
        self.module = module.to(device)  # the network itself: calling it goes round DeepSpeed's hooks
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # ZeRO lays the weights end to end: those of odd sizes come last, so that all others begin at 16 bytes.
        trained.sort(key=lambda weight: weight.numel() % 8 != 0)
        num_weights = sum(parameter.numel() for parameter in trained)
        self.config = deepspeed_config(spec, global_batch=global_batch, num_weights=num_weights)
        masters = trained
        self._copies: dict[nn.Parameter, nn.Parameter] = {}  # at ZeRO 0 in bf16, the weight of each fp32 one
        if spec.precision == "bf16" and spec.stage == 0:
            for weight in module.parameters():
                weight.data = weight.data.bfloat16()
            masters = [nn.Parameter(weight.detach().float()) for weight in trained]
            self._copies = dict(zip(masters, trained, strict=True))
        matrices = [weight for block in blocks for weight in block.parameters() if weight.ndim == 2]
        adam, self.optimizer = optimizers.build(
            masters, optimizer, device=device, matrices=matrices, copies=self._copies
        )
        with _local_rank(), quiet():  # of an optimizer that is not on its list DeepSpeed warns at every start
            self._engine, *_ = deepspeed.initialize(
                model=self.module, model_parameters=trained, optimizer=adam, config=self.config
            )
        if spec.zero_stage:
            self._clear_padding()
        self._norm: torch.Tensor | None = None  # of the last step
        self._next_norm: torch.Tensor | None = None  # of the step to come, once asked for
        self._judged: torch.Tensor  # what DeepSpeed gets as the norm of the step under way: infinite if vetoed
        self._statistics: list[torch.Tensor] = []
        self._measure = self._take_over_norm()
        self._base_optimizer().register_step_pre_hook(self._clip)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def begin_step(self, lr: float) -> None:
        """Before the first forward pass of a step: set its rate, and keep what forward passes change in the network."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if running := self._running_statistics():
            if not self._statistics:
                self._statistics = [value.clone() for value in running]
            torch._foreach_copy_(self._statistics, running)

    def backward(self, loss: torch.Tensor, *, checked: torch.Tensor | None = None) -> None:
        """Back-propagate `loss` (a mean over this process's micro-batch) and reduce gradients where ZeRO wants it.

        Where `checked`, else `loss` itself, is not finite, the gradients become NaN. Their norm is computed over all
        processes anyway, so every one of them hears of a bad loss on any, without a collective of its own.
        """
        sound = torch.isfinite(loss.detach() if checked is None else checked)
        self._engine.backward(loss * torch.where(sound, 1.0, math.nan))
        if self.spec.gradient_accumulation > 1:  # micro-batches are summed in fp32
            optimizers.add_gradients(self._copies)

    def at_boundary(self) -> bool:
        """Whether this is the last micro-batch of an optimizer step."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def gradient_norm(self) -> torch.Tensor:
        """Global norm of the gradients before clipping, () fp32; infinite where one is not finite.

        Alike on all processes; does not wait for the device. Collective, after the backward pass at a boundary.
        """
        self._next_norm = self._measure()
        return self._next_norm

    def step(self, veto: torch.Tensor | None = None) -> bool:
        """Step the optimizer at an accumulation boundary. Returns whether weights changed.

        A step whose gradients are not finite, or with `veto` (() bool, alike on all processes), leaves weights,
        optimizer state and running statistics as they were.
        """
        boundary = self.at_boundary()
        if boundary:
            norm = self.gradient_norm() if self._next_norm is None else self._next_norm
            self._norm, self._next_norm = norm, None
            self._judged = norm if veto is None else torch.where(veto.to(norm.device), math.inf, norm)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if boundary:
            self.average_along({}, ())
        if boundary and not applied and self._statistics:
            torch._foreach_copy_(self._running_statistics(), self._statistics)
        return applied

    def _take_over_norm(self) -> Callable[[], torch.Tensor]:
        """Come between DeepSpeed and its gradient norm; returns what measures it.

        ZeRO reads the norm on the host in every step and leaves out a step where it is not finite: a veto is an
        infinite norm, and costs no wait of its own. ZeRO 0 knows no such thing, so it is made here, in the same way.
        """
        optimizer = self._engine.optimizer
        if self.spec.zero_stage == 0:
            return self._take_over_plain_step()
        optimizer.unscale_and_clip_grads = lambda *_: None
        if not self.spec.offload_optimizer:  # DeepSpeed's own makes an fp64 copy of every gradient
            optimizer.get_grad_norm_direct = _norm_of_shares
        if self.spec.zero_stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._judged]
            return lambda: combine_grad_norm_groups(groups())
        measure: Callable[[], torch.Tensor] = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda norm_type=2: self._judged
        # In bf16 it would read all gradients once more, and wait for the device: the norm says the same.
        optimizer.check_overflow = lambda partition_gradients=True: None
        return measure

    def _take_over_plain_step(self) -> Callable[[], torch.Tensor]:
        optimizer = self._engine.optimizer
        step = optimizer.step
        if distributed.world_size() == 1:  # DeepSpeed would lay the gradients end to end, to sum them over one process
            self._engine.enable_backward_allreduce = False

        def measure() -> torch.Tensor:
            gradients = (optimizers.gradient(weight, self._copies) for weight in self._masters())
            norm = optimizers.sum_of_squares([each for each in gradients if each is not None]).sqrt()
            norm = torch.where(norm.isfinite(), norm, math.inf)
            if distributed.world_size() > 1:  # equal but for a bit, perhaps: a verdict must be alike
                torch.distributed.all_reduce(norm, op=torch.distributed.ReduceOp.MAX)
            return norm

        def step_unless_vetoed() -> None:
            optimizer.overflow = not bool(self._judged.isfinite())  # where DeepSpeed looks whether a step was applied
            if not optimizer.overflow:
                step()
            optimizer.zero_grad()

        optimizer.step = step_unless_vetoed
        return measure

    def average_along(self, shards: dict[float, list[torch.Tensor]], rates: tuple[float, ...]) -> bool:
        """Have the step to come move the averages `shards` by `rates`, too, where weights change; whether it can."""
        optimizer = self._base_optimizer()
        if not isinstance(optimizer, optimizers.AdamW):
            return False
        optimizer.rates = rates
        along = map(list, zip(*shards.values(), strict=True))
        optimizer.averages = dict(zip(self._masters(), along, strict=True)) if rates else {}
        return True

    def _clip(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before the optimizer steps: scale its gradients down where their norm is above engine.max_grad_norm."""
        scale = optimizers.clipping(self._judged, self.spec.max_grad_norm)
        if isinstance(optimizer, optimizers.AdamW):
            optimizer.scale = scale
            return
        weights = (weight for group in optimizer.param_groups for weight in group["params"])
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if scale is not None and gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))

    def _running_statistics(self) -> list[torch.Tensor]:
        norms = [module for module in self.module.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        return [value for module in norms for value in module.buffers()]

    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step before clipping; None before the first."""
        return None if self._norm is None else float(self._norm)

    def compute_dtype(self) -> torch.dtype:
        """Dtype that inputs of the network must have."""
        return torch.bfloat16 if self.spec.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        """The arithmetic of the engine's forward, for a call of `module` that goes round the engine."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.spec.precision == "autocast")

    def masters(self) -> list[torch.Tensor]:
        """This process's share of the fp32 weights, flat; the whole weights where nothing is sharded (ZeRO 0)."""
        return [master.data for master in self._masters()]

    def _masters(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps, themselves."""
        optimizer = self._engine.optimizer
        if self.spec.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self.spec.zero_stage:
            return list(optimizer.single_partition_of_fp32_groups)
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def _clear_padding(self) -> None:
        """Zero what is no weight: ZeRO 3 leaves there what the memory held, NaN perhaps, and takes it for weights."""
        for master, pieces in zip(self.masters(), self.layout(), strict=True):
            end = 0
            for piece in pieces:
                master[end : piece.offset].zero_()
                end = piece.offset + piece.length
            master[end:].zero_()

    def layout(self) -> list[list[Piece]]:
        """Which weights lie where in each of `masters`. What no piece covers is padding."""
        optimizer = self._engine.optimizer
        names: dict[torch.Tensor, str] = {value: name for name, value in self.module.named_parameters()}
        masters = self._masters()
        if self.spec.zero_stage == 3:  # every weight is cut over the processes
            return [_cut_each(group, names) for group in optimizer.fp16_groups]
        if self.spec.zero_stage:  # the weights, laid end to end, are cut
            rows = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, masters, strict=True)
            return [_cut_row(group, starts, names, master.numel()) for group, starts, master in rows]
        names |= {weight: names[copy] for weight, copy in self._copies.items()}
        return [[Piece(names[weight], 0, 0, weight.numel())] for weight in masters]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of all parameters, trained and frozen."""
        return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in self.module.named_parameters()}

    def frozen(self) -> list[tuple[Piece, torch.Tensor]]:
        """Parameters that are not trained: whole, under ZeRO 3 this process's part."""
        found = []
        for name, value in self.module.named_parameters():
            if value.requires_grad:
                continue
            if hasattr(value, "ds_tensor"):
                (piece,) = _cut_each([value], {value: name}) or [Piece(name, 0, 0, 0)]
                found.append((piece, value.ds_tensor.data[: piece.length]))
            else:
                found.append((Piece(name, 0, 0, value.numel()), value.data))
        return found

    def buffers(self) -> dict[str, torch.Tensor]:
        """What the network's state dict holds besides parameters (BatchNorm's statistics), this process's own."""
        kept = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}

    def whole_weights(self, shards: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters, fp32, and buffers by name, whole, out of flat `shards` that lie as `masters` do. Collective.

        One at a time, so that no second network needs to fit: take them all, in the same order on all processes.
        """
        places: dict[str, list[tuple[Piece, torch.Tensor]]] = {}
        for shard, pieces in zip(shards, self.layout(), strict=True):
            for piece in pieces:
                places.setdefault(piece.name, []).append((piece, shard))
        frozen = {piece.name: (piece, value) for piece, value in self.frozen()}
        for name, shape in self.shapes().items():
            whole = torch.zeros(math.prod(shape), device=self.device)
            for piece, flat in [frozen[name]] if name in frozen else places.get(name, []):
                part = flat.reshape(-1)[piece.offset : piece.offset + piece.length]
                whole[piece.start : piece.start + piece.length] = part.to(whole)
            # Pieces of different processes do not overlap: their sum is exact. Whole weights are alike everywhere.
            sharded = self.spec.zero_stage == 3 if name in frozen else self.spec.stage > 0
            if sharded and distributed.world_size() > 1:
                torch.distributed.all_reduce(whole)
            yield name, whole.view(shape)
        yield from self.buffers().items()

    def optimizer_states(self) -> list[dict[str, Any]]:
        """The optimizer's state of each of `masters` by name: moments, step; empty before the first step."""
        state = self._base_optimizer().state
        return [dict(state[master]) if master in state else {} for master in self._masters()]

    def set_optimizer_states(self, states: list[dict[str, Any]]) -> None:
        """Give the optimizer what `optimizer_states` gave, or others of the same kind."""
        optimizer = self._base_optimizer()
        on_device = any(optimizer.param_groups[0].get(name) for name in ("fused", "capturable"))
        for master, state in zip(self._masters(), states, strict=True):
            optimizer.state.pop(master, None)
            if not state:
                continue
            step = state.get("step")
            if isinstance(step, torch.Tensor):  # torch's AdamW keeps it on the host, unless its kernel reads it
                state = {**state, "step": step.to(master.device if on_device else "cpu")}
            optimizer.state[master] = state

    def optimizer_steps(self) -> list[Any]:
        """The step count of each parameter group, with optimizers that count there (apex's)."""
        return [group.get("step") for group in self._base_optimizer().param_groups]

    def set_optimizer_steps(self, steps: list[Any]) -> None:
        """Set what `optimizer_steps` gives."""
        for group, step in zip(self._base_optimizer().param_groups, steps, strict=True):
            group.pop("step", None)
            group.update({} if step is None else {"step": step})

    def _base_optimizer(self) -> torch.optim.Optimizer:
        base: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return base

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the fp32 weights, changed from outside, into what the network computes with. Collective."""
        optimizer = self._engine.optimizer
        if self.spec.zero_stage == 3:
            optimizer.checkpoint_event_prologue()  # no weight may stay gathered, with its value of before
            for index in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
            optimizer.checkpoint_event_epilogue()
        elif self.spec.zero_stage:
            optimizer.update_lp_params()
        for master, weight in self._copies.items():
            weight.copy_(master)


def _cut_each(group: list[torch.nn.Parameter], names: dict[torch.Tensor, str]) -> list[Piece]:
    """ZeRO 3: every weight cut into as many equal parts, the last one padded, as there are processes."""
    pieces, offset = [], 0
    for weight in group:
        size, numel = weight.ds_tensor.ds_numel, weight.ds_numel  # type: ignore[attr-defined]
        start = min(distributed.rank() * size, numel)
        if (length := min(size, numel - start)) > 0:
            pieces.append(Piece(names[weight], start, offset, length))
        offset += size
    return pieces


def _cut_row(
    group: list[torch.nn.Parameter], starts: list[int], names: dict[torch.Tensor, str], size: int
) -> list[Piece]:
    """ZeRO 1/2: the weights begin at `starts` in one row, of which this process has the `size` elements at its rank."""
    pieces, first = [], distributed.rank() * size
    for weight, begin in zip(group, starts, strict=True):
        start, stop = max(first - begin, 0), min(first + size - begin, weight.numel())
        if start < stop:
            pieces.append(Piece(names[weight], start, begin + start - first, stop - start))
    return pieces


def _norm_of_shares(gradients: Sequence[torch.Tensor], params: Any, norm_type: float = 2.0) -> torch.Tensor:
    """The norm of what all processes' shares of the averaged gradients make together, () fp32. Collective."""
    squares = optimizers.sum_of_squares(gradients)
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(squares)
    return squares.sqrt()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logger warns; errors still get through."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)

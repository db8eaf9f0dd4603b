"""What a run needs of each GPU, before it starts: parameters and bytes, by ZeRO stage.

Weights, gradients, optimizer state, averages and DeepSpeed's buckets are counted by formula (Rajbhandari et al. 2020,
section 5). What a forward and a backward pass hold is counted on the networks themselves, with fake tensors, which
have shapes and no storage. These do not all exist at once: what counts is the fullest moment of a step.

Not counted: the CUDA context (0.3-0.6 GiB) and NCCL's buffers, workspace of cuDNN and cuBLAS, fragmentation, the
batches that a loader keeps ready, what torch.compile changes, and of an evaluation during training all but its
network's weights. A weight below 100,000 elements stays whole under ZeRO 3 and is counted as cut.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vadit.config import Config
from vadit.estimate.networks import Network, networks

FP32, BF16 = 4, 2
"""Bytes per number."""
MAX_BUCKET = 500_000_000
"""Weights that DeepSpeed reduces or gathers in one piece, at most (`vadit.train.engine`)."""
PREFETCH = 50_000_000
"""Weights that ZeRO 3 gathers ahead of their use (DeepSpeed's default)."""
MAX_LIVE = 1_000_000_000
"""Weights that ZeRO 3 leaves gathered from the forward to the backward pass (DeepSpeed's default)."""


@dataclass(frozen=True)
class Size:
    """Parameters of one network of a run."""

    name: str
    num_trained: int
    """Those that the optimizer sees."""
    num_frozen: int
    averaged: bool


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and a backward pass over one micro-batch hold at most, the weights aside."""

    alone: float
    """Where each gradient goes once it is there."""
    with_gradients: float
    """Where gradients stay: they come while activations go."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU under one ZeRO stage, at the moment of a step when most is held."""

    stage: int
    weights: float
    optimizer: float
    """fp32 master weights and Adam's moments."""
    averages: float
    gradients: float
    buffers: float
    """DeepSpeed's buckets, weights gathered by ZeRO 3, copies in the optimizer's step."""
    activations: float
    moment: str
    """When that is: backward, reduction, step or evaluation."""

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum((self.weights, self.optimizer, self.averages, self.gradients, self.buffers, self.activations))


@dataclass(frozen=True)
class Estimate:
    """What `vadit train --dry-run` prints."""

    networks: tuple[Size, ...]
    micro_batch: int
    """Images per GPU in one pass."""
    activations: Activations
    stages: tuple[StageMemory, ...]
    """ZeRO 0, 1, 2 and 3."""


def estimate(config: Config, world_size: int, micro_batch: int | None = None) -> Estimate:
    """Parameters and memory per GPU of a run on `world_size` GPUs.

    micro_batch: images per GPU in one pass; by default what the run's settings give.
    """
    images = micro_batch or config.run.batch_size // (world_size * config.engine.gradient_accumulation)
    sizes, activations = trace(config, images)
    rows = tuple(_stage(config, sizes, activations, stage, world_size) for stage in range(4))
    return Estimate(sizes, images, activations, rows)


# ------------------------------------------------------------------------------------------------ formulas


def _stage(
    config: Config, sizes: tuple[Size, ...], activations: Activations, stage: int, world_size: int
) -> StageMemory:
    spec = config.engine
    trained = sum(size.num_trained for size in sizes)
    averaged = sum(size.num_trained for size in sizes if size.averaged)
    number = BF16 if spec.precision == "bf16" else FP32
    optimizer_share = trained / (world_size if stage else 1)
    weights_share = 0 if stage == 3 and spec.offload_weights else trained / (world_size if stage == 3 else 1)
    # ZeRO keeps its own fp32 masters even where the weights are fp32 already; without it the weights are the masters.
    per_weight = 2 * FP32 + (FP32 if stage or spec.precision == "bf16" else 0)
    on_host = stage > 0 and spec.offload_optimizer
    moments = _moments(config, [size.num_trained for size in sizes], activations, stage, world_size)
    if config.evaluation.every_images:  # fills a network of its own, between two steps
        moments["evaluation"] = (0, FP32 * averaged, 0)
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, buffers, held = moments[moment]
    return StageMemory(
        stage=stage,
        weights=number * weights_share + FP32 * sum(size.num_frozen for size in sizes),
        optimizer=0 if on_host else per_weight * optimizer_share,
        averages=0 if on_host else len(spec.ema_decays) * FP32 * averaged / (world_size if stage else 1),
        gradients=gradients,
        buffers=buffers,
        activations=held,
        moment=moment,
    )


def _moments(
    config: Config, sizes: list[int], activations: Activations, stage: int, world_size: int
) -> dict[str, tuple[float, float, float]]:
    """Gradients, buffers and activations in the passes, in the reduction of gradients and in the optimizer's step.

    sizes: trained weights of each network; they run backward and step one after the other, the largest decides.
    """
    spec = config.engine
    number = BF16 if spec.precision == "bf16" else FP32
    # Under autocast some gradients are sent in bf16, the rest in fp32: a bucket for each, each as large as if for all.
    sent = FP32 + BF16 if spec.precision == "autocast" else number
    largest = max(sizes)
    bucket = min(MAX_BUCKET, largest)
    whole = number * sum(sizes)
    share = whole / (world_size if stage else 1)
    alone, together = activations.alone, activations.with_gradients
    # A step lays gradients end to end, and in bf16 makes an fp32 copy of them.
    copies = largest / world_size * (number + (FP32 if number == BF16 else 0)) if stage else 0
    if stage == 3:  # buckets and the gradients' shard are made at the start and stay
        buckets = sent * sum(min(MAX_BUCKET, size) for size in sizes)
        gathered = number * (min(MAX_LIVE, largest) + min(PREFETCH, largest)) if world_size > 1 else 0
        return {
            "backward": (share, buckets + gathered, alone),
            "reduction": (share, buckets + number * bucket, 0),
            "step": (share, buckets + copies, 0),
        }
    buckets = bucket * sent * (2 if spec.overlap_comm else 1) if stage else 0
    if stage == 2:  # each gradient moves into the bucket, and out of it
        kept = share if spec.gradient_accumulation > 1 else 0
        passes = (kept, buckets, alone)
    elif spec.gradient_accumulation > 1:
        passes = (whole, buckets, alone)
    else:
        passes = (together - alone, buckets, alone)
    # What is sent is a copy of a bucket; DeepSpeed makes it for a single process, too, at stage 0.
    copy = sent * bucket if world_size > 1 or stage == 0 else 0
    left = share if stage == 2 else whole
    return {
        "backward": passes,
        "reduction": (left, buckets + copy, 0),
        "step": (share, copies, 0),
    }


# ------------------------------------------------------------------------------------------------ the networks


def trace(config: Config, images: int) -> tuple[tuple[Size, ...], Activations]:
    """The networks of a run, and what passes over `images` hold."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        found = networks(config)
        held = [_pass(network, images, config) for network in found if network.forward is not None]
    main, critics = held[0], held[1:]
    # A critic's graph goes once its gradient at the reconstruction is known: one is there beside the autoencoder's.
    beside = main.kept + max((critic.most for critic in critics), default=0)
    sizes = tuple(Size(network.name, network.num_trained, network.num_frozen, network.averaged) for network in found)
    return sizes, Activations(max(main.most, beside), max(main.most_with_gradients, beside))


def _pass(network: Network, images: int, config: Config) -> _Held:
    """One forward and backward pass of a network."""
    assert network.forward is not None, "this network has no backward pass"
    if config.engine.precision == "bf16" and network.num_trained:
        _halve(network.module)
    held = _Held([*network.module.parameters(), *network.module.buffers()])
    for weight in network.module.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(held.keep_gradient)
    with held, torch.autocast("cpu", torch.bfloat16, enabled=config.engine.precision == "autocast"):
        loss = network.forward(images)
        held.kept = held.now
        loss.backward()
    return held


def _halve(module: nn.Module) -> None:
    """`module.bfloat16()`, which fake tensors refuse."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None and value.is_floating_point():
                    half = value.detach().bfloat16()
                    kept[name] = nn.Parameter(half, value.requires_grad) if isinstance(value, nn.Parameter) else half


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive but those in `weights`: torch's MemTracker, in small."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.now = self.kept = self.most = self.most_with_gradients = self._gradients = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most_with_gradients = max(self.most_with_gradients, self.now)
        self.most = max(self.most, self.now - self._gradients)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, known: int, num_bytes: int) -> None:
        self._known.discard(known)
        self.now -= num_bytes

    def keep_gradient(self, weight: Tensor) -> None:
        """Take the gradient that a weight has just got for what stays."""
        assert weight.grad is not None, "called once it is there"
        self._gradients += weight.grad.nbytes

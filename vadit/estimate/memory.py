"""What a run needs of each GPU, before it starts: parameters and bytes, by ZeRO stage.

Weights, gradients, optimizer state, averages and DeepSpeed's buckets are counted by formula (Rajbhandari et al. 2020,
section 5); what a forward and a backward pass hold, on the networks themselves, with fake tensors, which have shapes
and no storage. These do not all exist at once: what counts is the fullest moment of a step.

Not counted: the CUDA context (0.3-0.6 GiB) and NCCL's buffers, workspace of cuDNN and cuBLAS, fragmentation, the
batches that a loader keeps ready, what torch.compile changes, and of an evaluation during training all but its
network's weights. A weight below 100,000 elements stays whole under ZeRO 3 and is counted as cut.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from vadit.config import MAX_BUCKET, AutoencoderSpec, Config, DiTSpec, MaskSpec
from vadit.estimate.networks import Network, networks
from vadit.models.autoencoder import Autoencoder
from vadit.models.masked import build_generator
from vadit.runtime import distributed

FP32, BF16 = 4, 2  # bytes per number
PREFETCH = 50_000_000  # weights that ZeRO 3 gathers ahead of their use (DeepSpeed's default)
MAX_LIVE = 1_000_000_000
"""Weights that ZeRO 3 leaves gathered from the forward to the backward pass (DeepSpeed's default)."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward and a backward pass over one micro-batch hold at most, the weights aside."""

    alone: float  # where each gradient goes once it is there
    with_gradients: float  # where gradients stay: they come while activations go


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU under one ZeRO stage, at the moment of a step when most is held."""

    stage: int
    weights: float
    optimizer: float  # fp32 master weights and Adam's moments
    averages: float
    gradients: float
    buffers: float  # DeepSpeed's buckets, weights gathered by ZeRO 3, copies in the optimizer's step
    activations: float
    moment: str  # when that is: backward, reduction, step or evaluation

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.optimizer + self.averages + self.gradients + self.buffers + self.activations


@dataclass(frozen=True)
class Estimate:
    """What `vadit train --dry-run` prints."""

    networks: list[Network]
    micro_batch: int  # images per GPU in one pass
    activations: Activations
    stages: list[StageMemory]


def estimate(config: Config, world_size: int) -> Estimate:
    """Parameters and memory per GPU of a run on `world_size` GPUs; UsageError for a batch that does not divide."""
    images = distributed.per_rank_batch(config.run.batch_size, config.engine.gradient_accumulation, world_size)
    found, activations = trace(config, images)
    return Estimate(found, images, activations, stages(config, found, activations, world_size))


def stages(config: Config, found: list[Network], activations: Activations, world_size: int) -> list[StageMemory]:
    """Memory per GPU under ZeRO 0, 1, 2 and 3."""
    return [_stage(config, found, activations, stage, world_size) for stage in range(4)]


def _stage(config: Config, found: list[Network], activations: Activations, stage: int, world_size: int) -> StageMemory:
    spec = config.engine
    trained, averaged = (sum(n.num_trained for n in found if n.averaged or both) for both in (True, False))
    number = BF16 if spec.precision == "bf16" else FP32
    shards = world_size if stage else 1
    # ZeRO keeps its own fp32 masters even where the weights are fp32 already; without it fp32 weights are the masters.
    per_weight = 2 * FP32 + (FP32 if stage or number == BF16 else 0)
    moments = _moments(config, [n.num_trained for n in found], activations, stage, world_size)
    if config.evaluation.every_images:  # fills a network of its own, between two steps
        moments["evaluation"] = (0, FP32 * averaged, 0)
    moment, (gradients, buffers, held) = max(moments.items(), key=lambda item: sum(item[1]))
    on_host = stage > 0 and spec.offload_optimizer
    weights = 0 if stage == 3 and spec.offload_weights else number * trained / (world_size if stage == 3 else 1)
    return StageMemory(
        stage=stage,
        weights=weights + FP32 * sum(n.num_frozen for n in found),
        optimizer=0 if on_host else per_weight * trained / shards,
        averages=0 if on_host else len(spec.ema_decays) * FP32 * averaged / shards,
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
    spec, autocast = config.engine, config.engine.precision == "autocast"
    number = BF16 if spec.precision == "bf16" else FP32
    whole, largest = number * sum(sizes), max(sizes)
    share = whole / (world_size if stage else 1)
    bucket = number * min(MAX_BUCKET, largest)
    # Under autocast some gradients are sent in bf16, the rest in fp32: a bucket for each, each as large as if for all.
    buckets = bucket * (2 if spec.overlap_comm else 1) * (2 if autocast else 1) if stage else 0
    sent = bucket if world_size > 1 else 0  # a copy
    kept = whole if stage < 2 else share
    if stage == 0 and spec.gradient_accumulation > 1:
        kept = share = FP32 * sum(sizes)
    passes = (kept if spec.gradient_accumulation > 1 else 0, buckets, activations.alone)
    if stage == 1:  # what is sent lies in a bucket: its share stays, and sums that wait for the next bucket
        kept = max(share, whole - bucket if spec.gradient_accumulation > 1 else 0)
    if stage < 2 and spec.gradient_accumulation == 1:
        passes = (activations.with_gradients - activations.alone, buckets, activations.alone)
    if stage == 3:  # buckets and the gradients' shard are made at the start and stay
        buckets = sum(min(MAX_BUCKET, size) for size in sizes) * (FP32 + BF16 if autocast else number)
        gathered = number * (min(MAX_LIVE, largest) + min(PREFETCH, largest)) if world_size > 1 else 0
        passes, sent = (share, buckets + gathered, activations.alone), bucket
    # A step lays gradients end to end, and in bf16 makes an fp32 copy of them.
    copies = largest / world_size * (number + (FP32 if number == BF16 else 0)) if stage else 0
    return {
        "backward": passes,
        "reduction": (kept, buckets + sent, 0),
        "step": (share, copies + (buckets if stage == 3 else 0), 0),
    }


def trace(config: Config, images: int) -> tuple[list[Network], Activations]:
    """The networks of a run, and what passes over `images` hold."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        found = networks(config)
        main, *critics = [_Held(network, images, config.engine.precision) for network in found if network.forward]
    # A critic's graph goes once its gradient at the reconstruction is known: one is there beside the autoencoder's.
    beside = main.kept + max((critic.most for critic in critics), default=0)
    return found, Activations(max(main.most, beside), max(main.most_with_gradients, beside))


def held(module: nn.Module, run: Callable[[], object], precision: str) -> float:
    """Bytes that a pass without gradients holds at most, the weights aside; bf16 rounds the weights."""

    def forward(_: int) -> Tensor:
        with torch.no_grad():
            run()
        return torch.zeros((), requires_grad=True).sum()

    return _Held(Network("", module, forward), 0, "bf16" if precision == "bf16" else "fp32").most


def sampling_bytes(
    generators: Sequence[tuple[DiTSpec, MaskSpec]],
    rows: int,
    autoencoder: AutoencoderSpec,
    decoded: int,
    precision: str,
) -> float:
    """Weights, and what the largest pass holds: a generator's over `rows`, or the decoder's over `decoded` latents."""
    with torch.random.fork_rng(devices=[]), FakeTensorMode():
        models, decoder = [build_generator(*each).eval() for each in generators], Autoencoder(autoencoder).eval()
        weights = FP32 * _size(decoder) + sum(map(_size, models)) * (FP32 + (BF16 if precision == "bf16" else 0))
        side = autoencoder.latent_size
        latents = torch.zeros(decoded, autoencoder.latent_channels, side, side)
        most = held(decoder, lambda: decoder.decode(latents), "fp32")
        for model in models:
            side, t, labels = model.spec.input_size, torch.zeros(rows), torch.zeros(rows, dtype=torch.long)
            x = torch.zeros(rows, model.in_channels, side, side)
            most = max(most, x.nbytes + held(model, functools.partial(model, x, t, labels), precision))
    return weights + most


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive in one pass, its weights aside: torch's MemTracker, in small."""

    def __init__(self, network: Network, images: int, precision: str) -> None:
        super().__init__()
        assert network.forward is not None, "it has a backward pass"
        if halved := precision == "bf16" and network.num_trained > 0:
            _halve(network.module)
        self._now = self.most = self.most_with_gradients = self._gradients = 0
        weights = [*network.module.parameters(), *network.module.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}
        for weight in network.module.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._keep)
        with self, torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32" and not halved):
            loss = network.forward(images)
            self.kept = self._now
            loss.backward()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, output)
        return output

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.most_with_gradients = max(self.most_with_gradients, self._now)
        self.most = max(self.most, self._now - self._gradients)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, known: int, num_bytes: int) -> None:
        self._known.discard(known)
        self._now -= num_bytes

    def _keep(self, weight: Tensor) -> None:
        assert weight.grad is not None, "called once it is there"
        self._gradients += weight.grad.nbytes


def _halve(module: nn.Module) -> None:
    """`module.bfloat16()`, which fake tensors refuse."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None and value.is_floating_point():
                    half = value.detach().bfloat16()
                    kept[name] = nn.Parameter(half, value.requires_grad) if isinstance(value, nn.Parameter) else half  # type: ignore[assignment]

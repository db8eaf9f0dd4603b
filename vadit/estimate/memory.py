"""What a run needs of each GPU, before it starts: parameters and bytes, by ZeRO stage.

Weights, gradients, optimizer state and averages are counted by formula (Rajbhandari et al. 2020, section 5), and so are
the buffers of DeepSpeed 0.19 (`_moments`). What the backward pass keeps is counted on the networks themselves: one
forward with fake tensors, which have shapes and no storage, and a hook on every tensor that autograd saves.

These do not all exist at once, activations go while gradients come: what counts is the fullest moment of a step.

Not counted: the CUDA context (0.3-0.6 GiB) and NCCL's buffers, workspace of cuDNN and cuBLAS, fragmentation, the
batches that a loader keeps ready, what torch.compile changes, the temporaries of a single operation, and of an
evaluation during training all but its network's weights. A weight below 100,000 elements stays whole under ZeRO 3 and
is counted as cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vadit.config import Config, DiTConfig, EngineSpec, FoundationSpec, TokenizerConfig
from vadit.runtime import distributed
from vadit.train.engine import MAX_BUCKET

if TYPE_CHECKING:
    from vadit.models.foundation import FoundationModel

FP32, BF16 = 4, 2
"""Bytes per number."""
MOMENTS = {"adamw_8bit": 2 * (1 + FP32 / 256)}
"""Bytes of Adam's two moments per weight; 8-bit ones have a scale per block of 256, all others are fp32."""
PREFETCH = 50_000_000
"""Weights that ZeRO 3 gathers ahead of their use (DeepSpeed's default)."""
MAX_LIVE = 1_000_000_000
"""Weights that ZeRO 3 leaves gathered from the forward to the backward pass (DeepSpeed's default)."""
VGG16_LAYERS = 30
"""Layers of torchvision's vgg16().features up to relu5_3, the last that LPIPS reads."""


@dataclass(frozen=True)
class Network:
    """One network of a run."""

    name: str
    num_trained: int
    """Parameters that the optimizer sees."""
    num_frozen: int
    """Parameters that it does not."""
    averaged: bool
    """Whether it has moving averages."""


@dataclass(frozen=True)
class Activations:
    """What the backward pass keeps, in bytes."""

    per_image: float
    fixed: float
    """Independent of the batch: under autocast, the bf16 copies of the weights."""
    recomputed_per_image: float = 0.0
    """Of `per_image`, what one checkpointed block makes again: it is there until the backward pass ends."""


@dataclass(frozen=True)
class Moment:
    """What comes and goes within a step, in bytes, at one point of it."""

    name: str
    gradients: float
    buffers: float
    """DeepSpeed's buckets, weights gathered by ZeRO 3, copies in the optimizer's step."""
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.gradients + self.buffers + self.activations


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU under one ZeRO stage, at the moment of a step when most is held."""

    stage: int
    weights: float
    optimizer: float
    """fp32 master weights and Adam's moments."""
    averages: float
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment when most is held."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def gradients(self) -> float:
        """Gradients at the peak."""
        return self.peak.gradients

    @property
    def buffers(self) -> float:
        """Buffers at the peak."""
        return self.peak.buffers

    @property
    def activations(self) -> float:
        """Activations at the peak."""
        return self.peak.activations

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.optimizer + self.averages + self.peak.total


@dataclass(frozen=True)
class Estimate:
    """What `vadit train --dry-run` tells."""

    networks: tuple[Network, ...]
    micro_batch: int
    """Images per GPU in one forward."""
    activations: Activations
    stages: tuple[StageMemory, ...]


def estimate(config: Config, world_size: int) -> Estimate:
    """Parameters and memory per GPU of a run on `world_size` GPUs; refuses a batch that does not divide."""
    micro_batch = distributed.per_rank_batch(config.run.batch_size, config.engine.gradient_accumulation, world_size)
    networks, activations = count(config)
    return Estimate(networks, micro_batch, activations, stages(config, networks, activations, world_size, micro_batch))


def count(config: Config) -> tuple[tuple[Network, ...], Activations]:
    """The networks of a run, and what their backward pass keeps."""
    foundation = None
    if isinstance(config, TokenizerConfig):
        if config.loss.vf_weight > 0:
            foundation = meta_foundation(config.foundation, config.autoencoder.latent_size)
        with FakeTensorMode():
            return _tokenizer(config, foundation)
    if config.repa.weight > 0:
        foundation = meta_foundation(config.repa.foundation, config.model.input_size // config.model.patch_size)
    with FakeTensorMode():
        return _generator(config, foundation)


def stages(
    config: Config, networks: tuple[Network, ...], activations: Activations, world_size: int, micro_batch: int
) -> tuple[StageMemory, ...]:
    """Memory per GPU under ZeRO 0, 1, 2 and 3."""
    return tuple(_stage_memory(networks, config, stage, world_size, activations, micro_batch) for stage in range(4))


def _stage_memory(
    networks: tuple[Network, ...],
    config: Config,
    stage: int,
    world_size: int,
    activations: Activations,
    micro_batch: int,
) -> StageMemory:
    spec = config.engine
    trained = sum(network.num_trained for network in networks)
    frozen = sum(network.num_frozen for network in networks)
    averaged = sum(network.num_trained for network in networks if network.averaged)
    number = BF16 if spec.precision == "bf16" else FP32
    shards = world_size if stage >= 1 else 1
    # ZeRO keeps its own fp32 masters even where the weights are fp32 already; without it the weights are the masters.
    masters = FP32 * trained if stage >= 1 or spec.precision == "bf16" else 0
    on_host = stage >= 1 and spec.offload_optimizer
    return StageMemory(
        stage=stage,
        weights=(0 if stage == 3 and spec.offload_weights else number * trained / (world_size if stage == 3 else 1))
        + FP32 * frozen,
        optimizer=0 if on_host else (masters + MOMENTS.get(config.optimizer.kind, 2 * FP32) * trained) / shards,
        averages=0 if on_host else len(spec.ema_decays) * FP32 * averaged / shards,
        moments=(
            *_moments([n.num_trained for n in networks], config, stage, world_size, activations, micro_batch),
            # A look during training fills a network of its own, between two steps.
            *([Moment("evaluation", 0, FP32 * averaged, 0)] if config.evaluation.every_images else []),
        ),
    )


def _moments(
    sizes: list[int], config: Config, stage: int, world_size: int, activations: Activations, micro_batch: int
) -> tuple[Moment, ...]:
    """What is held at the end of the forward pass, in the backward pass, in the reduction after it, and in the step.

    sizes: trained weights of each network; they run backward and step one after the other, the largest decides.
    """
    spec, on_cpu = config.engine, config.run.device == "cpu"
    number = BF16 if spec.precision == "bf16" else FP32
    trained, largest = sum(sizes), max(sizes)
    share = trained / (world_size if stage >= 1 else 1)
    kept = activations.fixed + activations.per_image * micro_batch
    recomputed = activations.recomputed_per_image * micro_batch
    accumulates = spec.gradient_accumulation > 1
    # Under autocast some gradients are sent in bf16, the rest in fp32: a bucket for each, each as large as if for all.
    autocast = spec.precision == "autocast"
    bucket = min(MAX_BUCKET, largest)
    if stage == 3:
        # Buckets and the gradients' shard are made at the start and stay.
        buckets = sum(min(MAX_BUCKET, size) for size in sizes) * (FP32 + BF16 if autocast else number)
        gathered = min(MAX_LIVE, largest) * number if world_size > 1 else 0
        ahead = min(PREFETCH, largest) * number if world_size > 1 else 0
        # Gradients are put in order of the processes, a copy; gloo makes one more.
        reduction = bucket * number * (2 if on_cpu else 1)
        forward = Moment("forward", share * number, buckets + gathered + ahead, kept)
        return (
            forward,
            dataclasses.replace(forward, name="backward"),
            Moment("reduction", share * number, buckets + reduction, 0),
            Moment("step", share * number, buckets + _step_copies(config, largest / world_size), 0),
        )
    whole = trained * number
    if stage == 0:
        return (
            Moment("forward", whole if accumulates else 0, 0, kept),
            # Activations go as gradients come: the sum is largest at one of the ends.
            *_backward(whole if accumulates else 0, whole, 0, kept, recomputed),
            # DeepSpeed sends a copy laid end to end, and makes it for a single process, too.
            Moment("reduction", whole, bucket * number, 0),
            Moment("step", whole, 0, 0),
        )
    buckets = bucket * number * (2 if spec.overlap_comm else 1) * (2 if autocast else 1)
    # ZeRO 1 leaves gradients whole until the backward pass is over, ZeRO 2 moves each into the bucket.
    before, after = (whole if accumulates else 0, whole) if stage == 1 else (share * number if accumulates else 0,) * 2
    # A bucket is sent as a copy (alone there is nothing to send); then this process's share is copied out of it.
    sent: float = bucket * (number + (BF16 if autocast else 0)) if world_size > 1 else 0
    if stage == 2 and (accumulates or largest > MAX_BUCKET):  # that of buckets before is there already
        sent += share * number
    return (
        Moment("forward", before, 0, kept),
        *_backward(before, after, buckets, kept, recomputed),
        Moment("reduction", max(after, sent, share * number), buckets, 0),
        Moment("step", share * number, _step_copies(config, largest / world_size), 0),
    )


def _backward(before: float, after: float, buckets: float, kept: float, recomputed: float) -> tuple[Moment, Moment]:
    """Start and end of a backward pass: activations go as gradients come, the sum is largest at one of the two."""
    return Moment("backward", before, buckets, kept), Moment("backward", after, buckets, recomputed)


def _step_copies(config: Config, share: float) -> float:
    """Bytes that a step makes beside gradients of `share` weights: ZeRO lays them end to end, in bf16 as fp32, too."""
    number = BF16 if config.engine.precision == "bf16" else FP32
    return share * (number + (FP32 if number == BF16 else 0))


# ------------------------------------------------------------------------------------------------ the networks


def _generator(config: DiTConfig, foundation: FoundationModel | None) -> tuple[tuple[Network, ...], Activations]:
    from vadit.models.dit import LightningDiT
    from vadit.models.masked import MaskedDiT, build_generator
    from vadit.models.repa import AlignedDiT

    spec, mask = config.model, config.mask
    passes: tuple[dict[str, Any], ...] = ({},)
    networks = []
    if foundation is not None:
        model: LightningDiT = AlignedDiT(spec, config.repa, foundation.feature_dim)
        passes = ({"taps": (config.repa.block,)},)
        if config.repa.features == "online":
            networks.append(_count("foundation model", foundation))
    else:
        model = build_generator(spec, mask)
    if mask.kind == "mdt":
        passes = ({}, {"masked": True})
    elif mask.kind == "maskdit" and mask.unmasked_after_images is None:
        passes = ({"masked": True},)
    model.train()

    def forward(batch: int) -> None:
        x_BChw = torch.zeros(batch, spec.in_channels, spec.input_size, spec.input_size)
        drop_B = torch.zeros(batch, dtype=torch.bool)
        for options in passes:
            labels_B = torch.zeros(batch, dtype=torch.long)
            model.forward_features(x_BChw, torch.zeros(batch), labels_B, drop_B, with_variance=True, **options)

    blocks = model.compiled_blocks if isinstance(model, MaskedDiT) else list(model.blocks)
    kept = _measure(forward, [model], config.engine, blocks)
    generator = _count("LightningDiT" if spec.swiglu else "DiT", model, averaged=True)
    return (generator, *networks), kept


def meta_foundation(spec: FoundationSpec, grid: int) -> FoundationModel:
    """A foundation model on the meta device (timm reads values while it builds, which fake tensors have not)."""
    from vadit.models.foundation import FoundationModel

    # Random weights: the count needs the shapes alone, and nothing is downloaded.
    with torch.device("meta"):
        return FoundationModel(dataclasses.replace(spec, weights="random"), grid)


def _tokenizer(config: TokenizerConfig, foundation: FoundationModel | None) -> tuple[tuple[Network, ...], Activations]:
    from vadit.models.autoencoder import Autoencoder, Level, Middle
    from vadit.models.discriminator import PatchDiscriminator

    spec, loss = config.autoencoder, config.loss
    autoencoder = Autoencoder(spec).train()
    critics: list[nn.Module] = []
    networks = [_count("autoencoder", autoencoder, averaged=True)]
    if loss.disc_weight > 0:
        critics.append(PatchDiscriminator(spec.in_channels, loss.disc_channels, loss.disc_layers).train())
        networks.append(_count("discriminator", critics[-1]))
    if loss.perceptual_weight > 0:
        from torchvision.models import vgg16

        critics.append(vgg16().features[:VGG16_LAYERS].requires_grad_(False))
        networks.append(_count("VGG16 of LPIPS", critics[-1]))
    if foundation is not None:
        networks.append(_count("foundation model", foundation))
        networks[0] = dataclasses.replace(
            networks[0], num_trained=networks[0].num_trained + foundation.feature_dim * spec.latent_channels
        )

    shape = (spec.in_channels, spec.image_size, spec.image_size)
    kept = _measure(
        lambda batch: autoencoder.decode(autoencoder.encode(torch.zeros(batch, *shape)).mean),
        [autoencoder],
        config.engine,
        [module for module in autoencoder.modules() if isinstance(module, (Level, Middle))],
    )

    def judge(critic: nn.Module) -> Activations:
        images = 1 if isinstance(critic, PatchDiscriminator) else 2  # LPIPS sees both at once
        return _measure(
            lambda batch: critic(torch.zeros(images * batch, *shape).requires_grad_()), [critic], config.engine
        )

    # A critic's graph goes once its gradient at the reconstruction is known: one is there beside the autoencoder's.
    judged = [judge(critic) for critic in critics]
    most = max(judged, key=lambda critic: critic.per_image, default=Activations(0, 0))
    return tuple(networks), Activations(
        kept.per_image + most.per_image, kept.fixed + most.fixed, recomputed_per_image=kept.recomputed_per_image
    )


def _count(name: str, model: nn.Module, averaged: bool = False) -> Network:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Network(name, trained, sum(p.numel() for p in model.parameters()) - trained, averaged)


def _measure(
    forward: Callable[[int], object], models: list[nn.Module], spec: EngineSpec, blocks: Sequence[nn.Module] = ()
) -> Activations:
    """Bytes that autograd saves in `forward(batch)`: the slope and the intercept over two batches.

    Under engine.gradient_checkpointing each of `blocks` keeps what it is given, and one at a time what it saves.
    """
    owned = {tensor.untyped_storage()._cdata for model in models for tensor in (*model.parameters(), *model.buffers())}
    recomputed = set(blocks) if spec.gradient_checkpointing else set()

    def saved(batch: int) -> tuple[int, int]:
        """What is kept, and the most of what one block recomputes."""
        kept: dict[int, torch.UntypedStorage] = {}
        inside: list[dict[int, torch.UntypedStorage]] = [{}]
        current = kept

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                current[storage._cdata] = storage
            return tensor

        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal current
            for argument in arguments:
                if isinstance(argument, Tensor):
                    pack(argument)
            current = {}
            inside.append(current)

        def leave(*_: object) -> None:
            nonlocal current
            current = kept

        hooks = [
            hook
            for block in recomputed
            for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
        ]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision != "fp32"):
                forward(batch)
        for hook in hooks:
            hook.remove()
        sizes = [sum(storage.nbytes() for storage in part.values()) for part in (kept, *inside)]
        return sizes[0], max(sizes[1:])

    few, many = saved(2), saved(4)
    slopes = [(b - a) / 2 for a, b in zip(few, many, strict=True)]
    rest = sum(max(value - 2 * slope, 0.0) for value, slope in zip(few, slopes, strict=True))
    # With bf16 weights there are no casts to keep; the arithmetic is the same as under autocast.
    fixed = rest if spec.precision == "autocast" else 0.0
    return Activations(per_image=sum(slopes), fixed=fixed, recomputed_per_image=slopes[1])

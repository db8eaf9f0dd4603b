"""What a run needs of each GPU, before it starts: parameters and bytes, by ZeRO stage.

Weights, gradients, optimizer state and averages are counted by formula (Rajbhandari et al. 2020, section 5). What the
backward pass keeps is counted on the networks themselves: one forward with fake tensors, which have shapes and
no storage, and a hook on every tensor that autograd saves. Workspace and fragmentation come on top.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vadit.config import Config, DiTConfig, EngineSpec, TokenizerConfig
from vadit.train.engine import MAX_BUCKET, deepspeed_config

if TYPE_CHECKING:
    from vadit.models.foundation import FoundationModel

FP32, BF16 = 4, 2
"""Bytes per number."""
MOMENTS = {"adamw_8bit": 2 * (1 + FP32 / 256)}
"""Bytes of Adam's two moments per weight; 8-bit ones have a scale per block of 256, all others are fp32."""
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


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU under one ZeRO stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    """fp32 master weights and Adam's moments."""
    averages: float
    buffers: float
    """DeepSpeed's buckets for reducing gradients."""
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.buffers + self.activations


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
    settings = deepspeed_config(config.engine, global_batch=config.run.batch_size, num_weights=MAX_BUCKET)
    micro_batch = settings["train_micro_batch_size_per_gpu"]
    if isinstance(config, TokenizerConfig):
        foundation = _foundation(config)
        with FakeTensorMode():
            networks, activations = _tokenizer(config, foundation)
    else:
        with FakeTensorMode():
            networks, activations = _generator(config)
    kept = activations.fixed + activations.per_image * micro_batch
    stages = tuple(_stage_memory(networks, config, stage, world_size, kept) for stage in range(4))
    return Estimate(networks, micro_batch, activations, stages)


def _stage_memory(
    networks: tuple[Network, ...], config: Config, stage: int, world_size: int, activations: float
) -> StageMemory:
    spec = config.engine
    trained = sum(network.num_trained for network in networks)
    frozen = sum(network.num_frozen for network in networks)
    averaged = sum(network.num_trained for network in networks if network.averaged)
    number = BF16 if spec.precision == "bf16" else FP32
    shards = world_size if stage >= 1 else 1
    # ZeRO keeps its own fp32 masters even where the weights are fp32 already; without it the weights are the masters.
    masters = FP32 * trained if stage >= 1 or spec.precision == "bf16" else 0
    buckets = sum(min(MAX_BUCKET, network.num_trained) for network in networks)
    on_host = stage >= 1 and spec.offload_optimizer
    return StageMemory(
        stage=stage,
        weights=(0 if stage == 3 and spec.offload_weights else number * trained / (world_size if stage == 3 else 1))
        + FP32 * frozen,
        gradients=number * trained / (world_size if stage >= 2 else 1),
        optimizer=0 if on_host else (masters + MOMENTS.get(config.optimizer.kind, 2 * FP32) * trained) / shards,
        averages=0 if on_host else len(spec.ema_decays) * FP32 * averaged / shards,
        buffers=number * buckets * (2 if spec.overlap_comm else 1) if stage >= 1 else 0,
        activations=activations,
    )


# ------------------------------------------------------------------------------------------------ the networks


def _generator(config: DiTConfig) -> tuple[tuple[Network, ...], Activations]:
    from vadit.models.dit import LightningDiT

    spec = config.model
    model = LightningDiT(spec).train()

    def forward(batch: int) -> None:
        x_BChw = torch.zeros(batch, spec.in_channels, spec.input_size, spec.input_size)
        drop_B = torch.zeros(batch, dtype=torch.bool)
        model.forward_with_variance(x_BChw, torch.zeros(batch), torch.zeros(batch, dtype=torch.long), drop_B)

    kept = _measure(forward, [model], config.engine)
    if config.engine.gradient_checkpointing:
        # Each block keeps its input (fp32: the residual stream) and is recomputed alone.
        stream = FP32 * spec.hidden_size * (spec.input_size // spec.patch_size) ** 2
        kept = Activations(kept.per_image / spec.depth + stream * spec.depth, kept.fixed / spec.depth)
    return (_count("LightningDiT" if spec.swiglu else "DiT", model, averaged=True),), kept


def _foundation(config: TokenizerConfig) -> FoundationModel | None:
    """The foundation model on the meta device (timm reads values while it builds, which fake tensors have not)."""
    if config.loss.vf_weight <= 0:
        return None
    from vadit.models.foundation import FoundationModel

    # Random weights: the count needs the shapes alone, and nothing is downloaded.
    with torch.device("meta"):
        return FoundationModel(dataclasses.replace(config.foundation, weights="random"), config.autoencoder.latent_size)


def _tokenizer(config: TokenizerConfig, foundation: FoundationModel | None) -> tuple[tuple[Network, ...], Activations]:
    from vadit.models.autoencoder import Autoencoder

    spec, loss = config.autoencoder, config.loss
    autoencoder = Autoencoder(spec).train()
    critics: list[nn.Module] = []
    networks = [_count("autoencoder", autoencoder, averaged=True)]
    if loss.disc_weight > 0:
        from vadit.models.discriminator import PatchDiscriminator

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

    def forward(batch: int) -> None:
        images = torch.zeros(batch, spec.in_channels, spec.image_size, spec.image_size)
        reconstruction = autoencoder.decode(autoencoder.encode(images).mean)
        for critic in critics:
            critic(reconstruction)

    return tuple(networks), _measure(forward, [autoencoder, *critics], config.engine)


def _count(name: str, model: nn.Module, averaged: bool = False) -> Network:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Network(name, trained, sum(p.numel() for p in model.parameters()) - trained, averaged)


def _measure(forward: Callable[[int], None], models: list[nn.Module], spec: EngineSpec) -> Activations:
    """Bytes that autograd saves in `forward(batch)`: the slope and the intercept over two batches."""
    owned = {tensor.untyped_storage()._cdata for model in models for tensor in (*model.parameters(), *model.buffers())}

    def saved(batch: int) -> int:
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in owned:
                kept[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision != "fp32"):
                forward(batch)
        return sum(storage.nbytes() for storage in kept.values())

    few, many = saved(2), saved(4)
    slope = (many - few) / 2
    # With bf16 weights there are no casts to keep; the arithmetic is the same as under autocast.
    return Activations(per_image=slope, fixed=max(few - 2 * slope, 0.0) if spec.precision == "autocast" else 0.0)

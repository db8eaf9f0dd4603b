"""Train the generator: latents -> LightningDiT under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit import choices, distributed, rng
from vadit.choices import Choice
from vadit.config import DiTConfig
from vadit.data.latents import LatentLoader, open_latents
from vadit.models import attention
from vadit.models.dit import Attention, LightningDiT
from vadit.objectives import ddpm, flow
from vadit.train import float8, loop, runs
from vadit.train.checkpoint import Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine
from vadit.train.guard import Guard


def train(config: DiTConfig, *, title: str = "train LightningDiT") -> Path:
    """Train to the end, or go on from where the run folder stands. Returns the run folder.

    Raises:
        UsageError: a setting does not fit the data, the checkpoint or the number of processes.
        RunError: damaged data, steps that fail again and again, a disk that is full.
        loop.Stopped: a signal asked to stop; everything is saved.
    """
    device = distributed.device(config.run.device)
    batch_size = distributed.per_rank_batch(config.run.batch_size, config.engine.gradient_accumulation)
    dataset = open_latents(config.data, config.model)
    folder = runs.open_folder(config)
    runs.seed_everything(config.run)

    model = LightningDiT(config.model, gradient_checkpointing=config.engine.gradient_checkpointing)
    if config.run.init_from and not runs.has_checkpoint(folder):
        runs.initialise(model, config.run.init_from)
    chosen = _equip(model, config, batch_size, device)
    engine = Engine(
        model.train(),
        optimizer=config.optimizer,
        spec=config.engine,
        global_batch=config.run.batch_size,
        device=device,
        blocks=list(model.blocks),
    )
    runs.save_deepspeed_config(folder, {"model": engine.config})
    runs.save_choices(folder, [*chosen, engine.optimizer, *choices.kernels(device)])
    loader = LatentLoader(
        dataset,
        batch_size,
        seed=config.run.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=device,
    )
    ema = ShardedEMA(engine, config.engine.ema_decays)
    guard = Guard(config.guard, folder)
    torch.manual_seed(rng.fold(config.run.seed, distributed.rank()))

    def step(batches: Iterator[Any], position: Position) -> dict[str, Tensor]:
        return train_step(engine, ema, guard, config, batches, position, device)

    task = loop.Task(title=title, engines={"model": engine}, ema=ema, guard=guard, loader=loader, step=step)
    loop.run(task, spec=config.run, optimizer=config.optimizer, folder=folder, device=device)
    return folder


def _equip(model: LightningDiT, config: DiTConfig, batch_size: int, device: torch.device) -> list[Choice]:
    """Give the blocks the attention and the linear layers of the run's settings; what they are."""
    spec = config.model
    dtype = torch.float32 if config.engine.precision == "fp32" else torch.bfloat16
    kernel = attention.choose(
        config.engine.attention, head_dim=spec.hidden_size // spec.num_heads, dtype=dtype, device=device
    )
    attend = attention.named(kernel.name)
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = attend
    rows = batch_size * (spec.input_size // spec.patch_size) ** 2
    return [kernel, float8.convert(model.blocks, config.engine.float8, rows=rows, device=device)]


def train_step(
    engine: Engine,
    ema: ShardedEMA,
    guard: Guard,
    config: DiTConfig,
    batches: Iterator[Any],
    position: Position,
    device: torch.device,
) -> dict[str, Tensor]:
    """One optimizer step over `gradient_accumulation` micro-batches; the means of the loss terms."""

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # fp32 in and out, whatever the precision inside
        return engine(x.to(engine.compute_dtype()), t, y, with_variance=config.flow.objective == "ddpm").float()

    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.gradient_accumulation):
        latents, labels = next(batches)
        latents, labels = latents.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if config.flow.objective == "ddpm":
            loss = ddpm.training_loss(network, latents, labels)
            terms = {"loss": loss.total, "mse": loss.mse, "variational": loss.variational}
        else:
            flow_loss = flow.training_loss(config.flow, network, latents, labels, images_seen=position.images_seen)
            terms = {"loss": flow_loss.total, "mse": flow_loss.mse, "direction": flow_loss.direction}
        engine.backward(terms["loss"])
        if guard.step({"model": engine}):
            ema.update()
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.engine.gradient_accumulation
    return sums

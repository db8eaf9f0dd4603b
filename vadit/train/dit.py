"""Train the generator: latents -> LightningDiT under DeepSpeed."""

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit.config import DiTConfig
from vadit.images.loader import describe_classes
from vadit.images.pixels import to_signed
from vadit.latents.companions import Companion
from vadit.latents.dataset import DebugLatents, LatentDataset, open_latents
from vadit.latents.loader import LatentLoader
from vadit.models import attention
from vadit.models.dit import Attention, DiTOutput, LightningDiT
from vadit.models.foundation import FoundationModel
from vadit.models.masked import training_network
from vadit.objectives import ddpm, flow, masked, regularisers
from vadit.runtime import choices, distributed, rng
from vadit.runtime.choices import Choice
from vadit.runtime.console import note, note_once
from vadit.runtime.errors import UsageError
from vadit.runtime.precision import resolved
from vadit.sampling.draw import check_request
from vadit.sampling.info import info_of
from vadit.train import fit, float8, loop, runs
from vadit.train.checkpoint.checkpoints import Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine, start
from vadit.train.evaluation import Samples
from vadit.train.guard import Guard
from vadit.train.online import OnlineImages, open_online_images


def train(config: DiTConfig, *, title: str = "train LightningDiT", asked: Collection[str] | None = None) -> Path:
    """Train to the end, or go on from where the run folder stands. Returns the run folder.

    asked: settings of the latents' shape that are asked for, while the others follow the data (`fit`); None: all.
    UsageError: a setting does not fit the data, the checkpoint or the number of processes. RunError: damaged data,
    steps that fail again and again, a full disk. loop.Stopped: a signal asked to stop; everything is saved.
    """
    if config.evaluation.every_images:
        resolved(config.evaluation.precision, distributed.device(config.run.device))  # refused before data are read
    config = fit.follow_data(config, asked)
    dataset = open_latents(config.data, config.model, config.repa)
    runs.check_folder(config, len(dataset))
    fit.check_size(config, len(dataset), distributed.device(config.run.device))
    with runs.owned_folder(config):
        return _train(config, dataset, title)


def _train(config: DiTConfig, dataset: LatentDataset | DebugLatents, title: str) -> Path:
    device, folder, asked = distributed.device(config.run.device), Path(config.run.out), config
    batch_size = distributed.per_rank_batch(config.run.batch_size, config.engine.gradient_accumulation)
    if config.repa.weight > 0 and config.repa.features == "online":
        grid = config.model.input_size // config.model.patch_size
        dataset.companion = open_online_images(config.data, dataset, grid, device)
    config, automatic = runs.settle(config, device)
    if distributed.is_main():
        classes = info_of(config).classes or [str(label) for label in range(dataset.num_classes)]
        note(f"  latents of {describe_classes(classes, dataset.labels)}", "dim")
    runs.seed_everything(config.run)

    features = open_features(config, dataset.companion, device)
    model = training_network(config, None if features is None else features.width)
    _warn_of_sampling(model, config, dataset.labels)
    if config.run.init_from and not runs.has_checkpoint(folder):
        runs.initialise(model, config.run.init_from)
    if config.engine.float8 is not None:
        start(device)  # for the processes to agree on whether they have it
    chosen = _equip(model, config, batch_size, device)
    engine = runs.engine(model, config, device, blocks=model.compiled_blocks, forward=model.forward_features)
    engines = {"model": engine}
    chosen += [*automatic, engine.optimizer, *choices.kernels(device)]
    place = distributed.rank(), distributed.world_size()
    loader = LatentLoader(dataset, batch_size, config.run.seed, *place, device)
    ema = ShardedEMA(engine, config.engine.ema_decays)
    guard = Guard(config.guard, folder)
    evaluation = Samples(config, dataset, ema, folder) if config.evaluation.every_images else None
    torch.manual_seed(rng.fold(config.run.seed, distributed.rank()))

    def step(batches: Iterator[Any], position: Position) -> dict[str, Tensor]:
        return train_step(engine, ema, guard, config, batches, position, features)

    save_start = partial(runs.save_start, [asked], engines, chosen)
    loop.run(loop.Task(title, engines, ema, guard, loader, step, save_start, evaluation), config=config)
    return folder


def _warn_of_sampling(model: LightningDiT, config: DiTConfig, labels: Tensor) -> None:
    """A line each where sampling would ask for labels that this run does not train, and where it would be refused."""
    count, spec = len(torch.unique(labels)), config.model
    if count < spec.num_classes and not config.data.path.startswith("debug:"):
        note_once(
            f"data.path {config.data.path} holds samples of {count:,} of the {spec.num_classes:,} classes of "
            "model.num_classes: the others stay untrained, and `vadit sample` draws none of them"
        )
    try:
        check_request(model, config.sample, config.flow, None, None)
    except UsageError as fault:
        note_once(f"`vadit sample` will refuse the sampler of these settings: {fault}")


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
    features: "Features | None" = None,
) -> dict[str, Tensor]:
    """One optimizer step over `gradient_accumulation` micro-batches; the means of the loss terms."""
    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.gradient_accumulation):
        latents, labels, *companions = (part.to(engine.device, non_blocking=True) for part in next(batches))
        terms: dict[str, Tensor] = {}
        for masks in masked.passes(config.mask, position.images_seen):
            drawn = draw(config, latents, position.images_seen)
            output: DiTOutput = engine(
                drawn.x_t.to(engine.compute_dtype()),
                drawn.t,
                labels,
                with_variance=config.flow.objective == "ddpm",
                taps=tapped_blocks(config),
                masked=masks,
            )
            found = loss_terms(config, drawn, output)
            terms |= found | {"loss": terms.get("loss", 0) + found["loss"]}
        terms = _with_regularisers(config, terms, output, companions, features)
        engine.backward(terms["loss"])
        if guard.step({"model": engine}):
            ema.update(position.step)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.engine.gradient_accumulation
    return sums


def draw(config: DiTConfig, latents: Tensor, images_seen: int) -> flow.Drawn | ddpm.Drawn:
    """Noise and time for a batch."""
    if config.flow.objective == "ddpm":
        return ddpm.draw(latents)
    return flow.draw(config.flow, latents, images_seen)


def loss_terms(config: DiTConfig, drawn: flow.Drawn | ddpm.Drawn, output: DiTOutput) -> dict[str, Tensor]:
    """The loss of one pass by its terms, in fp32 whatever is inside the network; `loss` is what is trained on."""
    prediction = output.prediction.float()
    if isinstance(drawn, flow.Drawn) and config.mask.kind == "maskdit" and output.mask_BN is not None:
        return masked.loss(config.flow, drawn, prediction, output.mask_BN, config.mask.reconstruction_weight)
    if isinstance(drawn, ddpm.Drawn):
        terms = ddpm.loss(drawn, prediction)
    else:
        terms = flow.loss(config.flow, drawn, prediction)
    if output.mask_BN is None:
        return terms
    return {name if name == "loss" else f"masked_{name}": value for name, value in terms.items()}


class Features:
    """Foundation features (B, F, h, w) of a batch's third part: read from disk, or computed from images."""

    def __init__(self, width: int, model: FoundationModel | None) -> None:
        self.width = width
        self._model = model

    def __call__(self, companion: Tensor) -> Tensor:
        """Of features (B, F, h, w), themselves; of uint8 images (B, 3, H, W), the foundation model's."""
        return companion if self._model is None else self._model(to_signed(companion))


def open_features(config: DiTConfig, companion: Companion | None, device: torch.device) -> Features | None:
    """What `repa` aligns to; None where it is off."""
    if config.repa.weight <= 0:
        return None
    assert companion is not None, "open_latents gives a companion where repa has a weight"
    if not isinstance(companion, OnlineImages):
        return Features(companion.shape[0], None)
    grid = config.model.input_size // config.model.patch_size
    model = FoundationModel(config.repa.foundation, grid).to(device)
    return Features(model.feature_dim, model)


def dispersed_block(config: DiTConfig) -> int:
    """The block, counted from 1, whose output is dispersed: the first quarter's last (Wang & He 2025)."""
    return max(config.model.depth // 4, 1)


def tapped_blocks(config: DiTConfig) -> tuple[int, ...]:
    """Blocks whose outputs the loss needs, in their order."""
    aligned = {config.repa.block} if config.repa.weight > 0 else set()
    dispersed = {dispersed_block(config)} if config.flow.dispersive_weight > 0 else set()
    return tuple(sorted(aligned | dispersed))


def _with_regularisers(
    config: DiTConfig, terms: dict[str, Tensor], output: DiTOutput, companions: list[Tensor], features: Features | None
) -> dict[str, Tensor]:
    """The terms with alignment and dispersion of the tapped blocks added, as far as they are on."""
    terms = dict(terms)
    if config.flow.dispersive_weight > 0:
        terms["dispersive"] = regularisers.dispersive_loss(output.hidden[dispersed_block(config)])
        terms["loss"] = terms["loss"] + config.flow.dispersive_weight * terms["dispersive"]
    if features is not None:
        assert output.projected is not None, "REPA taps the aligned block"
        terms["alignment"] = regularisers.alignment_loss(output.projected, features(companions[0]))
        terms["loss"] = terms["loss"] + config.repa.weight * terms["alignment"]
    return terms

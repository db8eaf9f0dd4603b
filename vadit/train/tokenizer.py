"""Train the tokenizer: images -> VA-VAE and its discriminator, two engines under DeepSpeed.

The adaptive weights compare gradient norms at the last layers of encoder and decoder. Taking them through an engine's
outputs would start its gradient reduction, so the generator's losses are taken on detached copies of the
reconstruction, their gradients are combined there, and one surrogate loss whose gradient is exactly that combination
goes through the engine: the same numbers as VQGAN's, with one backward pass over the weights, at every ZeRO stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vadit.config import TokenizerConfig, TokenizerLossSpec
from vadit.images.backends import SETTING, open_images, open_loader
from vadit.images.loader import ImageSet, describe_classes
from vadit.images.pixels import to_signed
from vadit.models.aligned import AlignedAutoencoder
from vadit.models.discriminator import PatchDiscriminator
from vadit.models.foundation import FoundationModel
from vadit.models.lpips import LPIPS
from vadit.objectives import tokenizer as objective
from vadit.runtime import choices, distributed, rng
from vadit.runtime.compiled import compile_each
from vadit.runtime.console import note_once
from vadit.train import fit, loop, runs
from vadit.train.checkpoint.checkpoints import Position
from vadit.train.classifier import OWN, own_foundation
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine, start
from vadit.train.evaluation import Reconstructions
from vadit.train.guard import Guard
from vadit.train.watchdog import Watchdog


@dataclass(frozen=True)
class Networks:
    """Everything that one step touches."""

    model: Engine
    discriminator: Engine | None
    foundation: FoundationModel | None
    perceptual: LPIPS | None


def train(config: TokenizerConfig, *, title: str = "train VA-VAE") -> Path:
    """Train all stages to the end, or go on from where the run folder stands. Returns the run folder.

    UsageError: a setting does not fit the data, the checkpoint or the number of processes. RunError: damaged data,
    steps that fail again and again, a full disk. loop.Stopped: a signal asked to stop; everything is saved.
    """
    images = open_images(config.data, config.autoencoder.image_size)
    runs.check_folder(config, len(images))
    fit.check_size(config, len(images), distributed.device(config.run.device))
    with runs.owned_folder(config):
        if not config.stages:
            return _train_stage([config], images, title)
        start(distributed.device(config.run.device))
        with Watchdog(config.run.hang_timeout_s) as watchdog:  # between the stages, too
            for index in range(len(config.stages)):
                watchdog.beat(0, doing=f"getting ready for stage {index + 1}")
                stage = runs.stage_config(config, index)
                runs.check_folder(stage, len(images))
                with runs.owned_folder(stage):
                    _train_stage([config, stage], images, f"{title} ({index + 1}/{len(config.stages)})", watchdog)
    return Path(config.run.out)


def _train_stage(
    configs: list[TokenizerConfig], images: ImageSet, title: str, watchdog: Watchdog | None = None
) -> Path:
    """Train with the last of `configs`; one before it is of the whole run."""
    config, folder = configs[-1], Path(configs[-1].run.out)
    device = distributed.device(config.run.device)
    batch_size = distributed.per_rank_batch(config.run.batch_size, config.engine.gradient_accumulation)
    config, automatic = runs.settle(config, device)
    runs.seed_everything(config.run)
    networks = _build(config, images, folder, device)
    engines = {"model": networks.model}
    if networks.discriminator is not None:
        engines["discriminator"] = networks.discriminator
    loader, decoding = open_loader(
        config.data,
        images,
        batch_size,
        seed=config.run.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=device,
        begun_with=choices.recorded(folder, SETTING) if runs.has_checkpoint(folder) else None,
    )
    note_once(f"  images by {decoding.name} ({decoding.reason})", "dim")
    note_once(f"  {describe_classes(images.source.classes, images.source.labels)}", "dim")
    # The discriminator's optimizer is the same.
    chosen = [decoding, *automatic, networks.model.optimizer, *choices.kernels(device)]
    ema = ShardedEMA(networks.model, config.engine.ema_decays)
    guard = Guard(config.guard, folder)
    evaluation = Reconstructions(config, images, ema, folder) if config.evaluation.every_images else None
    torch.manual_seed(rng.fold(config.run.seed, distributed.rank()))
    step = partial(train_step, networks, ema, guard, config)
    save_start = partial(runs.save_start, configs, engines, chosen)
    task = loop.Task(title, engines, ema, guard, loader, step, save_start, evaluation)
    loop.run(task, config=config, watchdog=watchdog)
    return folder


def _build(config: TokenizerConfig, images: ImageSet, folder: Path, device: torch.device) -> Networks:
    loss, grid = config.loss, config.autoencoder.latent_size
    perceptual = LPIPS(loss.vgg_weights).to(device) if loss.perceptual_weight > 0 else None
    foundation = None
    if loss.vf_weight > 0:
        spec = config.foundation
        if spec.weights == OWN:
            spec = own_foundation(spec, images, folder, grid=grid, device=device, seed=config.run.seed)
        foundation = FoundationModel(spec, grid).to(device)
    feature_dim = None if foundation is None else foundation.feature_dim
    model = AlignedAutoencoder(config, feature_dim, recompute_tail=config.engine.zero_stage == 3)
    discriminator = None
    if loss.disc_weight > 0:
        discriminator = _Discriminator(
            PatchDiscriminator(config.autoencoder.in_channels, loss.disc_channels, loss.disc_layers)
        )
    if config.run.init_from and not runs.has_checkpoint(folder):
        runs.initialise(model, config.run.init_from)
        if discriminator is not None:
            runs.initialise_discriminator(discriminator, config.run.init_from)
    if config.engine.compile is True:
        compile_each(frozen_parts(foundation, perceptual))
    trained = runs.engine(model, config, device)
    critic = None if discriminator is None else runs.engine(discriminator, config, device)
    return Networks(trained, critic, foundation, perceptual)


def frozen_parts(foundation: FoundationModel | None, perceptual: LPIPS | None) -> list[nn.Module]:
    """What engine.compile compiles: LPIPS and the foundation model's blocks, whose elementwise work fuses.

    The networks that train lose by it: their norms are fused ops already, and compiled graphs would redo convolutions
    for the adaptive weights (modelled: benchmarks/bench_cost.py).
    """
    blocks = getattr(foundation and foundation.model, "blocks", ())
    return [*([] if perceptual is None else [perceptual]), *blocks]


class _Discriminator(nn.Module):
    """Real and fake images through one call: BatchNorm sees them apart, the engine sees one forward."""

    def __init__(self, network: PatchDiscriminator) -> None:
        super().__init__()
        self.network = network

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(real), self.network(fake)


def train_step(
    networks: Networks,
    ema: ShardedEMA,
    guard: Guard,
    config: TokenizerConfig,
    batches: Iterator[Any],
    position: Position,
) -> dict[str, Tensor]:
    """One optimizer step of both networks over `gradient_accumulation` micro-batches; the means of the loss terms."""
    sums: dict[str, Tensor] = {}
    for _ in range(config.engine.gradient_accumulation):
        images = to_signed(next(batches).images.to(networks.model.device, non_blocking=True))
        # Steps are counted from 1 here: disc_start_step 1 means from the first.
        adversarial = networks.discriminator is not None and position.step + 1 >= config.loss.disc_start_step
        terms, fake = generator_step(networks, config.loss, images, adversarial=adversarial)
        engines = {"model": networks.model}
        if adversarial and networks.discriminator is not None:
            terms |= discriminator_step(networks, images, fake)
            engines["discriminator"] = networks.discriminator
        # Both step after both backward passes (neither sees the other's new weights): they skip together or not at all.
        if guard.step(engines):
            ema.update(position.step)
        for name, value in terms.items():
            sums[name] = sums.get(name, 0) + value.detach() / config.engine.gradient_accumulation
    return sums


def generator_step(
    networks: Networks, spec: TokenizerLossSpec, images: Tensor, *, adversarial: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward, losses, adaptive weights and backward of the autoencoder; the terms and the detached reconstruction.

    images: (B, 3, H, W) in [-1, 1], fp32.
    """
    engine = networks.model
    # Frozen networks multiply in bf16 where those that train do, with fp32 between the products.
    frozen = torch.autocast(images.device.type, torch.bfloat16, enabled=engine.spec.precision != "fp32")
    with frozen:
        features = None if networks.foundation is None else networks.foundation(images)
    output, kl, cos_loss, distmat_loss = engine(images, features)
    network = engine.module
    assert isinstance(network, AlignedAutoencoder) and network.inner is not None

    # ---- losses on a copy of the reconstruction, and their gradients there
    fake = output.detach().float().requires_grad_()
    with frozen:
        nll, l1, lpips = objective.reconstruction_nll(
            images, fake, perceptual=networks.perceptual, weight=spec.perceptual_weight
        )
    (nll_grad,) = torch.autograd.grad(nll, fake)
    image_grad = nll_grad
    terms = {"l1": l1, "lpips": lpips, "nll": nll, "kl": kl, "mcos": cos_loss, "mdms": distmat_loss}
    loss = nll.detach() + spec.kl_weight * kl.detach()
    if adversarial:
        gan, gan_grad, weight = _adversarial(networks, network, fake, nll_grad)
        image_grad = nll_grad + spec.disc_weight * weight * gan_grad
        loss = loss + spec.disc_weight * weight * gan
        terms |= {"gan": gan, "gan_weight": spec.disc_weight * weight}

    # ---- the surrogate: its gradient at the reconstruction is image_grad
    surrogate = (output * image_grad.to(output.dtype)).sum() + spec.kl_weight * kl
    if features is not None:
        weight = _alignment_weight(network, nll_grad, spec) if spec.vf_adaptive else torch.ones_like(kl)
        alignment = spec.cos_weight * cos_loss + spec.distmat_weight * distmat_loss
        surrogate = surrogate + spec.vf_weight * weight * alignment
        loss = loss + spec.vf_weight * weight * alignment.detach()
        terms |= {"vf_weight": spec.vf_weight * weight}
    network.inner = None
    engine.backward(surrogate, checked=loss)
    return {"loss": loss, **terms}, fake.detach()


def _adversarial(
    networks: Networks, network: AlignedAutoencoder, fake: Tensor, nll_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The generator's hinge loss, its gradient at the reconstruction, and adaptive_gan (reference: VQGAN, eq. 7)."""
    assert networks.discriminator is not None
    discriminator = networks.discriminator
    with discriminator.autocast():
        logits = discriminator.module.network(fake.to(discriminator.compute_dtype()))  # type: ignore[union-attr, operator]
    gan = objective.generator_hinge_loss(logits.float())
    (gan_grad,) = torch.autograd.grad(gan, fake)
    return gan.detach(), gan_grad, _ratio(network, "decoder", nll_grad, gan_grad, objective.MAX_GAN_WEIGHT)


def _alignment_weight(network: AlignedAutoencoder, nll_grad: Tensor, spec: TokenizerLossSpec) -> Tensor:
    """adaptive_vf: the ratio of gradient norms at encoder.conv_out, over the graph of the forward just done."""
    inner = network.inner
    assert inner is not None
    alignment = spec.cos_weight * inner.cos_loss + spec.distmat_weight * inner.distmat_loss
    (from_nll,) = torch.autograd.grad(
        inner.images_BCHW, inner.moments_BEhw, nll_grad.to(inner.images_BCHW.dtype), retain_graph=True
    )
    (from_alignment,) = torch.autograd.grad(alignment, inner.moments_BEhw, retain_graph=True)
    return _ratio(network, "encoder", from_nll, from_alignment, objective.MAX_VF_WEIGHT)


def _ratio(network: AlignedAutoencoder, part: str, from_nll: Tensor, from_other: Tensor, maximum: float) -> Tensor:
    """The adaptive weight of a loss, by its gradient and nll's at the output of `conv_out` of encoder or decoder."""
    weight = getattr(network, part).conv_out.weight
    shape = getattr(weight, "ds_shape", weight.shape)  # the whole one's, also where ZeRO-3 has taken it away
    inputs = network.conv_inputs[part]
    norms = (objective.conv_weight_grad_norm(inputs, each, shape) for each in (from_nll, from_other))
    return objective.adaptive_weight(*norms, maximum=maximum)


def discriminator_step(networks: Networks, images: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Forward, hinge loss and backward of the discriminator on real images and detached reconstructions."""
    engine = networks.discriminator
    assert engine is not None
    dtype = engine.compute_dtype()
    real_logits, fake_logits = engine(images.to(dtype), fake.to(dtype))
    loss = objective.discriminator_hinge_loss(real_logits.float(), fake_logits.float())
    engine.backward(loss)
    return {"disc": loss, "logits_real": real_logits.float().mean(), "logits_fake": fake_logits.float().mean()}

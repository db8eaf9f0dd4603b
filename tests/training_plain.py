"""The two trainers once more, in plain PyTorch: torch.optim.AdamW, whole weights, one process that plays all ranks.

Ranks are played one after the other, each with its own random state and share of the data, and gradients averaged.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.config import DiTConfig, FlowSpec, TokenizerConfig, vary
from vadit.images.backends import open_images, open_loader
from vadit.images.pixels import to_signed
from vadit.latents.dataset import open_latents
from vadit.latents.loader import LatentLoader
from vadit.models.aligned import AlignedAutoencoder
from vadit.models.discriminator import PatchDiscriminator
from vadit.models.foundation import FoundationModel
from vadit.models.masked import build_generator
from vadit.objectives import flow
from vadit.recipes import get_recipe
from vadit.runtime import rng
from vadit.train import runs

BATCH = 4


def flow_terms(spec: FlowSpec, model: Any, x1: Tensor, labels: Tensor, seen: int = 0, generator: Any = None) -> Any:
    """One draw for data x1, and the terms of the loss of model(x_t, t, labels) there."""
    drawn = flow.draw(spec, x1, seen, generator)
    return flow.loss(spec, drawn, model(drawn.x_t, drawn.t, labels))


def tiny_dit(out: Path, *, steps: int = 4, run: dict[str, Any] | None = None, **engine: Any) -> DiTConfig:
    """The debug twin, clipped and decayed; without the direction loss, whose gradient at a zero output is 1e8."""
    return vary(
        get_recipe("lightningdit-b-debug"),
        flow={"direction_loss": False},
        optimizer={"lr": 3e-3, "weight_decay": 0.1},
        engine={"max_grad_norm": 0.5, "ema_decays": (0.9,), **engine},
        run={"out": str(out), "total_images": steps * BATCH, **(run or {})},
    )


def tiny_tokenizer(
    out: Path, *, steps: int = 3, loss: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **engine: Any
) -> TokenizerConfig:
    """The debug twin in one stage, its discriminator from the second step on."""
    return vary(
        get_recipe("vavae-f16d32-dinov2-debug"),
        loss={"disc_start_step": 2, **(loss or {})},
        engine={"max_grad_norm": 0.0, **engine},
        run={"out": str(out), "total_images": steps * BATCH, **(run or {})},
        stages=(),
    )


def logged(folder: Path, name: str = "loss") -> list[float]:
    """One value of every log point of a run."""
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


class Ranks:
    """The random states of `world_size` processes, and the turns they take."""

    def __init__(self, seed: int, world_size: int) -> None:
        self.states = []
        for rank in range(world_size):
            torch.manual_seed(rng.fold(seed, rank))
            self.states.append(torch.get_rng_state())

    def turns(self) -> Iterator[int]:
        for rank in range(len(self.states)):
            torch.set_rng_state(self.states[rank])
            yield rank
            self.states[rank] = torch.get_rng_state()


def flow_loss(config: DiTConfig, model: Any, latents: Tensor, labels: Tensor, seen: int) -> Tensor:
    """The loss of one micro-batch after so many images."""
    return flow_terms(config.flow, model, latents, labels, seen)["loss"]


def plain_dit(
    config: DiTConfig, *, world_size: int = 1, loss_of: Any = flow_loss
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of every step and the weights at the end."""
    dataset = open_latents(config.data, config.model)
    runs.seed_everything(config.run)
    model = build_generator(config.model, config.mask).train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    options = config.optimizer
    adam = torch.optim.AdamW(trained, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    parts = world_size * config.engine.gradient_accumulation
    size = config.run.batch_size // parts
    ranks = Ranks(config.run.seed, world_size)
    streams = [
        LatentLoader(dataset, size, seed=config.run.seed, rank=rank, world_size=world_size).stream()
        for rank in range(world_size)
    ]
    losses = []
    for images_seen in range(0, config.run.total_images, config.run.batch_size):
        mean = 0.0
        for rank in ranks.turns():
            for _ in range(config.engine.gradient_accumulation):
                latents, labels = next(streams[rank])
                loss = loss_of(config, model, latents, labels, images_seen)
                (loss / parts).backward()
                mean += loss.item() / parts
        if config.engine.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, config.engine.max_grad_norm)
        adam.step()
        adam.zero_grad()
        losses.append(mean)
    return losses, model.state_dict()


class PlainTokenizer:
    """VA-VAE's losses as the paper's section 3 writes them: gradients at the two last layers, one summed loss."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.loss = config.loss
        self.perceptual: Any = None
        self.foundation = None
        runs.seed_everything(config.run)
        if config.loss.vf_weight > 0:
            self.foundation = FoundationModel(config.foundation, config.autoencoder.latent_size)
        feature_dim = None if self.foundation is None else self.foundation.feature_dim
        self.model = AlignedAutoencoder(config, feature_dim).train()
        self.discriminator = PatchDiscriminator(3, config.loss.disc_channels, config.loss.disc_layers).train()

    def generator_loss(self, images: Tensor, *, adversarial: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """(loss with its graph, its terms, the reconstruction)."""
        spec, model = self.loss, self.model
        mean, logvar = model.quant_conv(model.encoder(images)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape)
        fake = model.decoder(model.post_quant_conv(z))
        rec = (images - fake).abs()
        if self.perceptual is not None:
            rec = rec + spec.perceptual_weight * self.perceptual(images, fake)
        nll = rec.sum() / len(images)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(images)
        loss = nll + spec.kl_weight * kl
        terms = {"nll": nll, "kl": kl}
        if adversarial:
            gan = -self.discriminator(fake).mean()
            weight = self._ratio(nll, gan, model.decoder.conv_out.weight).clamp(0, 1e4)
            loss = loss + spec.disc_weight * weight * gan
            terms |= {"gan": gan, "gan_weight": spec.disc_weight * weight}
        if self.foundation is not None:
            cos_loss, distmat_loss = self._alignment(z, self.foundation(images))
            vf = spec.cos_weight * cos_loss + spec.distmat_weight * distmat_loss
            weight = torch.ones(())
            if spec.vf_adaptive:
                weight = self._ratio(nll, vf, model.encoder.conv_out.weight).clamp(0, 1e8)
            loss = loss + spec.vf_weight * weight * vf
            terms |= {"mcos": cos_loss, "mdms": distmat_loss, "vf_weight": spec.vf_weight * weight}
        return loss, {"loss": loss, **terms}, fake.detach()

    def _alignment(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.model.linear_proj.weight
        z = F.conv2d(z, weight)
        z, features = F.normalize(z.flatten(2), dim=1), F.normalize(features.flatten(2), dim=1)
        cos_loss = F.relu(1 - self.loss.cos_margin - (z * features).sum(dim=1)).mean()
        difference = (z.transpose(1, 2) @ z - features.transpose(1, 2) @ features).abs()
        return cos_loss, F.relu(difference - self.loss.distmat_margin).mean()

    @staticmethod
    def _ratio(nll: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        (from_nll,) = torch.autograd.grad(nll, weight, retain_graph=True)
        (from_other,) = torch.autograd.grad(other, weight, retain_graph=True)
        return (from_nll.norm() / (from_other.norm() + 1e-4)).detach()

    def discriminator_loss(self, images: Tensor, fake: Tensor) -> Tensor:
        real, generated = self.discriminator(images), self.discriminator(fake)
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + generated).mean())


def plain_tokenizer(config: TokenizerConfig, *, world_size: int = 1) -> tuple[list[float], list[float]]:
    """Losses of the autoencoder at every step, and of the discriminator from where it starts."""
    source = open_images(config.data, config.autoencoder.image_size)
    plain = PlainTokenizer(config)
    adams = [
        torch.optim.AdamW(module.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas, weight_decay=0.0)
        for module in (plain.model, plain.discriminator)
    ]
    parts = world_size * config.engine.gradient_accumulation
    size = config.run.batch_size // parts
    ranks = Ranks(config.run.seed, world_size)
    streams = [
        open_loader(config.data, source, size, seed=config.run.seed, rank=rank, world_size=world_size)[0].stream()
        for rank in range(world_size)
    ]
    losses, disc_losses = [], []
    for step in range(1, config.run.total_images // config.run.batch_size + 1):
        adversarial = step >= config.loss.disc_start_step
        mean = disc_mean = 0.0
        pairs = []
        for rank in ranks.turns():
            for _ in range(config.engine.gradient_accumulation):
                images = to_signed(next(streams[rank]).images)
                loss, _, fake = plain.generator_loss(images, adversarial=adversarial)
                (loss / parts).backward()
                mean += loss.item() / parts
                pairs.append((images, fake))
        adams[1].zero_grad()  # what the generator's loss has left in the discriminator
        adams[0].step()
        adams[0].zero_grad()
        losses.append(mean)
        if adversarial:
            for images, fake in pairs:
                loss = plain.discriminator_loss(images, fake)
                (loss / parts).backward()
                disc_mean += loss.item() / parts
            adams[1].step()
            disc_losses.append(disc_mean)
    return losses, disc_losses

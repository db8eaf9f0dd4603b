"""The tokenizer's step against the plain loop of its authors, on this machine, the two taking turns.

    python benchmarks/plain_tokenizer.py --size 128 --batch 2 --threads 2 --rounds 5

Plain: torch modules after the equations (LDM's autoencoder, a PatchGAN, the VF loss with W z formed), adaptive weights
by autograd at the last weights, two torch AdamW. Ours: the trainer's step. No averages on either side; both share the
frozen networks, LPIPS with the published heads, VGG16 and a small DINOv2 with random weights.
Times are of the processor, which other work changes least.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vadit.config import FoundationSpec, TokenizerConfig, vary
from vadit.images.pixels import to_signed
from vadit.models.autoencoder import Autoencoder
from vadit.models.lpips import vgg_features
from vadit.recipes import get_recipe
from vadit.train import engine as engines
from vadit.train import tokenizer
from vadit.train.checkpoint.checkpoints import Position


class PlainBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the shortcut."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.main = nn.Sequential(block.norm1, nn.SiLU(), block.conv1, block.norm2, nn.SiLU(), block.conv2)
        self.short = block.nin_shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.main(x)


class PlainAttention(nn.Module):
    """Attention of one head by two products of matrices."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v, self.out = block.norm, block.q, block.k, block.v, block.proj_out

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.out((v @ weights.transpose(1, 2)).view_as(x))


def plain(part: Any) -> list[nn.Module]:
    """The layers of a level, or of the middle, in their order."""
    found: list[nn.Module] = []
    attention = list(getattr(part, "attn", []))
    for index, block in enumerate(getattr(part, "block", part.children())):
        found.append(PlainAttention(block) if hasattr(block, "q") else PlainBlock(block))
        found += [PlainAttention(attention[index])] if attention else []
    return found + [layer for layer in (getattr(part, "downsample", 0), getattr(part, "upsample", 0)) if layer]


class PlainStep:
    """The authors' step."""

    def __init__(self, config: TokenizerConfig, foundation: Any, lpips: Any) -> None:
        self.loss, self.foundation, self.lpips = config.loss, foundation, lpips
        model = Autoencoder(config.autoencoder)
        self.encoder = nn.Sequential(model.encoder.conv_in)
        for part in (*model.encoder.down, model.encoder.mid):
            self.encoder.extend(plain(part))
        self.encoder.extend([model.encoder.norm_out, nn.SiLU(), model.encoder.conv_out])
        self.decoder = nn.Sequential(model.post_quant_conv, model.decoder.conv_in)
        for part in (model.decoder.mid, *reversed(model.decoder.up)):
            self.decoder.extend(plain(part))
        self.decoder.extend([model.decoder.norm_out, nn.SiLU(), model.decoder.conv_out])
        self.quant, self.project = model.quant_conv, nn.Conv2d(32, foundation.feature_dim, 1, bias=False)
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, width, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(before, width, 4, stride, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        self.critic = nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))
        trained = [*self.encoder.parameters(), *self.quant.parameters(), *self.decoder.parameters()]
        options: dict[str, Any] = {"lr": 1e-4, "betas": (0.5, 0.9)}
        self.adam = torch.optim.AdamW([*trained, *self.project.parameters()], **options)
        self.critic_adam = torch.optim.AdamW(self.critic.parameters(), **options)

    def __call__(self, images: Tensor) -> None:
        features = self.foundation(images)
        mean, logvar = self.quant(self.encoder(images)).chunk(2, 1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        fake = self.decoder(z)
        nll = ((images - fake).abs() + self.lpips(images, fake)).sum() / len(images)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / len(images)
        ours, theirs = F.normalize(self.project(z).flatten(2)), F.normalize(features.flatten(2))
        similar = (ours.transpose(1, 2) @ ours - theirs.transpose(1, 2) @ theirs).abs()
        align = F.relu(0.5 - (ours * theirs).sum(1)).mean() + F.relu(similar - 0.25).mean()
        gan = -self.critic(fake).mean()

        def weight(other: Tensor, last: Tensor) -> Tensor:
            norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, other)]
            return (norms[0] / (norms[1] + 1e-4)).detach()

        align = weight(align, self.encoder[-1].weight) * align
        loss = nll + self.loss.kl_weight * kl + weight(gan, self.decoder[-1].weight) * gan + align
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        real, false = self.critic(images), self.critic(fake.detach())
        self.critic_adam.zero_grad()
        (0.5 * (F.relu(1 - real).mean() + F.relu(1 + false).mean())).backward()
        self.critic_adam.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("size", 128), ("batch", 2), ("threads", 2), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        torch.save({f"features.{name}": t for name, t in vgg_features().state_dict().items()}, folder / "vgg.pth")
        tiny = FoundationSpec(name="vit_small_patch14_dinov2", weights="random", input_range="minus_one_one")
        config = vary(
            get_recipe("vavae-f16d32-dinov2"),
            autoencoder={"image_size": options.size},
            foundation=tiny,
            loss={"vgg_weights": str(folder / "vgg.pth"), "disc_start_step": 1},
            engine={"zero_stage": 0, "compile": False, "precision": "fp32"},
            run={"out": str(folder / "run"), "device": "cpu", "batch_size": options.batch},
            stages=(),
        )
        assert isinstance(config, TokenizerConfig)
        engines.start(torch.device("cpu"))
        networks = tokenizer._build(config, folder, torch.device("cpu"))
    authors = PlainStep(config, networks.foundation, networks.perceptual)
    pixels = torch.randint(256, (options.batch, 3, options.size, options.size), dtype=torch.uint8)
    batches = itertools.repeat(SimpleNamespace(images=pixels))
    guard: Any = SimpleNamespace(step=lambda engines: [engine.step() for engine in engines.values()] and None)
    ema: Any = None  # never asked: the guard says that nothing was applied
    position = Position(1, options.batch)

    def ours() -> None:
        tokenizer.train_step(networks, ema, guard, config, batches, position)

    times: dict[str, list[float]] = {"authors": [], "ours": []}
    for _ in range(options.rounds + 1):
        for name, step in (("authors", lambda: authors(to_signed(pixels))), ("ours", ours)):
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(times["authors"][1:], times["ours"][1:], strict=True)]
    print({name: round(statistics.median(values[1:]), 3) for name, values in times.items()}, "seconds")
    print(f"the authors' step takes {statistics.median(ratios):.2f} times as long")


if __name__ == "__main__":
    main()

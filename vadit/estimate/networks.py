"""The networks of a run, each called as a training step calls it: for the meta device or fake tensors."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from vadit.config import Config, DiTConfig, FoundationSpec, TokenizerConfig
from vadit.models.aligned import AlignedAutoencoder
from vadit.models.discriminator import PatchDiscriminator
from vadit.models.foundation import FoundationModel
from vadit.models.lpips import vgg_features
from vadit.models.masked import training_network


@dataclass(frozen=True)
class Network:
    """One network of a run."""

    name: str
    module: nn.Module
    forward: Callable[[int], Tensor] | None = None
    """On so many images, to a number that depends on all that it gives; None: it runs without gradients."""
    step_flops: float = 0.0  # FLOPs of a training step over those of `forward`
    again: Callable[[int], Tensor] | None = None
    """What is differentiated once more, to its input alone: at about the cost of its forward pass."""
    averaged: bool = False  # whether it has moving averages

    @property
    def num_trained(self) -> int:
        """Parameters that the optimizer sees."""
        return sum(weight.numel() for weight in self.module.parameters() if weight.requires_grad)

    @property
    def num_frozen(self) -> int:
        """Parameters that it does not."""
        return sum(weight.numel() for weight in self.module.parameters() if not weight.requires_grad)


def networks(config: Config) -> list[Network]:
    """The networks of a run on the meta device or as fake tensors, whichever the caller has set; the trained one first.

    MaskDiT is that of the largest pass: without masks, where these end in mid-run.
    """
    return _tokenizer(config) if isinstance(config, TokenizerConfig) else _generator(config)


def _generator(config: DiTConfig) -> list[Network]:
    spec, mask = config.model, config.mask
    foundation = None
    if config.repa.weight > 0:
        foundation = _foundation(config.repa.foundation, spec.input_size // spec.patch_size)
    model = training_network(config, None if foundation is None else foundation.feature_dim)
    online = config.repa.features == "online"
    others = [] if foundation is None or not online else [Network("foundation model", foundation)]
    passes = {"none": (False,), "maskdit": (mask.unmasked_after_images is None,), "mdt": (False, True)}[mask.kind]
    taps = (config.repa.block,) if config.repa.weight > 0 else ()

    def forward(images: int) -> Tensor:
        x_BChw = torch.zeros(images, spec.in_channels, spec.input_size, spec.input_size)
        t_B, labels_B = torch.zeros(images), torch.zeros(images, dtype=torch.long)
        drop_B = torch.zeros(images, dtype=torch.bool)
        outputs = []
        for masked in passes:
            options = {"with_variance": True, "taps": taps, "masked": masked}
            output = model.forward_features(x_BChw, t_B, labels_B, drop_B, **options)  # type: ignore[arg-type]
            outputs += [output.prediction, *([] if output.projected is None else [output.projected])]
        return torch.stack([output.float().sum() for output in outputs]).sum()

    name = "LightningDiT" if spec.swiglu else "DiT"
    return [Network(name, model.train(), forward, step_flops=3, averaged=True), *others]


def _tokenizer(config: TokenizerConfig) -> list[Network]:
    spec, loss = config.autoencoder, config.loss
    foundation = _foundation(config.foundation, spec.latent_size) if loss.vf_weight > 0 else None
    autoencoder = AlignedAutoencoder(config, None if foundation is None else foundation.feature_dim)

    def pixels(images: int) -> Tensor:
        return torch.zeros(images, spec.in_channels, spec.image_size, spec.image_size)

    def reconstruct(images: int) -> Tensor:
        reconstruction, kl, *_ = autoencoder(pixels(images), None)  # the alignment loss is small beside it
        autoencoder.inner = None
        autoencoder.conv_inputs.clear()
        return reconstruction.float().sum() + kl

    def decode(images: int) -> Tensor:
        return autoencoder.decode(torch.zeros(images, spec.latent_channels, spec.latent_size, spec.latent_size))

    again = decode if loss.vf_weight > 0 and loss.vf_adaptive else None  # from the reconstruction to the latent
    found = [Network("autoencoder", autoencoder.train(), reconstruct, step_flops=3, again=again, averaged=True)]
    if loss.disc_weight > 0:
        critic = PatchDiscriminator(spec.in_channels, loss.disc_channels, loss.disc_layers).train()
        # In the generator's step forward and backward (to the image alone), in its own both on two images.
        judge = lambda images: critic(pixels(images).to(next(critic.parameters())).requires_grad_()).sum()  # noqa: E731
        found.append(Network("discriminator", critic, judge, step_flops=8))
    if loss.perceptual_weight > 0:
        vgg = vgg_features().requires_grad_(False)
        # It sees images and reconstructions; the way back is that of the latter alone.
        compare = lambda images: vgg(pixels(images).requires_grad_()).sum()  # noqa: E731
        found.append(Network("VGG16 of LPIPS", vgg, compare, step_flops=3))
    return found + ([] if foundation is None else [Network("foundation model", foundation)])


def _foundation(spec: FoundationSpec, grid: int) -> FoundationModel:
    """On the meta device: timm reads values while it builds, which fake tensors have not."""
    with unset_fake_temporarily(), torch.device("meta"):  # random weights: nothing is downloaded
        return FoundationModel(dataclasses.replace(spec, weights="random"), grid)

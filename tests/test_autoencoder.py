"""The autoencoder against a naive second form, its posterior, PatchGAN's layers, and VA-VAE's losses."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_help import assert_recomputing_changes_nothing
from torch import Tensor, nn
from training_plain import BATCH, PlainTokenizer, tiny_tokenizer

from vadit.config import AutoencoderSpec
from vadit.models import autoencoder
from vadit.models.autoencoder import Autoencoder, DiagonalGaussian
from vadit.models.discriminator import PatchDiscriminator
from vadit.objectives import tokenizer as objective
from vadit.runtime.errors import UsageError
from vadit.train import tokenizer

BASE = AutoencoderSpec(
    image_size=16,
    latent_channels=3,
    base_channels=8,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
    norm_groups=4,
)


def randomised(spec: AutoencoderSpec) -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


class Naive:
    """LDM's encoder and decoder written out over the state dict, in float64."""

    def __init__(self, model: Autoencoder) -> None:
        self.spec = model.spec
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.w[name + ".weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.w[name + ".bias"], stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.unflatten(1, (self.spec.norm_groups, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups - mean).pow(2).mean((2, 3, 4), keepdim=True)
        flat = ((groups - mean) / (variance + 1e-6).sqrt()).flatten(1, 2)
        return flat * self.w[name + ".weight"][:, None, None] + self.w[name + ".bias"][:, None, None]

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(name + ".norm1", x)
        h = self.conv(name + ".conv1", h * h.sigmoid())
        h = self.norm(name + ".norm2", h)
        h = self.conv(name + ".conv2", h * h.sigmoid())
        return h + (self.conv(name + ".nin_shortcut", x) if name + ".nin_shortcut.weight" in self.w else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        normed = self.norm(name + ".norm", x)
        q, k, v = (self.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5, -1)
        return x + self.conv(name + ".proj_out", torch.einsum("bij,bcj->bci", weights, v).view_as(x))

    def level(self, name: str, x: Tensor, blocks: int) -> Tensor:
        for index in range(blocks):
            x = self.block(f"{name}.block.{index}", x)
            if f"{name}.attn.{index}.q.weight" in self.w:
                x = self.attention(f"{name}.attn.{index}", x)
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.block(name + ".block_2", self.attention(name + ".attn_1", self.block(name + ".block_1", x)))

    def moments(self, x: Tensor) -> Tensor:
        h = self.conv("encoder.conv_in", x.double())
        for level in range(len(self.spec.channel_multipliers)):
            h = self.level(f"encoder.down.{level}", h, self.spec.num_res_blocks)
            if level < len(self.spec.channel_multipliers) - 1:
                padded = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1, dtype=h.dtype)
                padded[:, :, :-1, :-1] = h
                h = self.conv(f"encoder.down.{level}.downsample.conv", padded, stride=2, padding=0)
        h = self.norm("encoder.norm_out", self.middle("encoder.mid", h))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h * h.sigmoid()))

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z.double())))
        for level in reversed(range(len(self.spec.channel_multipliers))):
            h = self.level(f"decoder.up.{level}", h, self.spec.num_res_blocks + 1)
            if level > 0:
                doubled = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv(f"decoder.up.{level}.upsample.conv", doubled)
        h = self.norm("decoder.norm_out", h)
        return self.conv("decoder.conv_out", h * h.sigmoid())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"attention_resolutions": (), "num_res_blocks": 1},
        {"channel_multipliers": (2, 1), "attention_resolutions": (16, 8)},
    ],
    ids=["f4", "no_attention", "f2"],
)
def test_equals_naive_form(change: dict) -> None:
    model = randomised(dataclasses.replace(BASE, **change))
    naive = Naive(model)
    x = torch.rand(2, 3, 16, 24) * 2 - 1
    ratio = model.spec.downsample_ratio
    with torch.no_grad():
        moments = model.moments(x)
        z = torch.randn(2, 3, 16 // ratio, 24 // ratio)
        images = model.decode(z)
        model.train()  # which rounds otherwise
        trained = model.moments(x), model.decode(z)
    for found, expected in zip(trained, (moments, images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for found, expected in ((moments, naive.moments(x)), (images, naive.decode(z))):
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() < 1e-5
    used = {name for name in model.state_dict() if ".attn." in name and name.endswith("q.weight")}
    assert len(used) == len(model.spec.attention_resolutions) * (2 * model.spec.num_res_blocks + 1)


def test_posterior_of_sizes_that_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = 3 * torch.randn(2, 8, 5, 5, generator=generator)
    posterior = DiagonalGaussian(moments)
    expected = torch.distributions.Normal(moments[:, :4].double(), moments[:, 4:].double().div(2).exp())
    kl = torch.distributions.kl_divergence(expected, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(posterior.kl().double(), kl, rtol=1e-5)
    assert torch.equal(posterior.mode(), moments[:, :4])
    assert torch.allclose(posterior.std.double(), expected.stddev, rtol=1e-5)

    first = posterior.sample(torch.Generator().manual_seed(7))
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(7)))
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(8)))
    wide = DiagonalGaussian(torch.cat([torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), -1.0)], 1))
    drawn = wide.sample(generator)
    assert abs(drawn.mean() - 2.0) < 0.02
    assert abs(drawn.std() - 0.6065) < 0.02
    moments = torch.tensor([0.0, 0.0, -100.0, 100.0]).view(1, 4, 1, 1)
    assert DiagonalGaussian(moments).logvar.flatten().tolist() == [-30.0, 20.0]
    with pytest.raises(UsageError, match=r"18x16 is not divisible by the autoencoder's downsample ratio 4"):
        randomised(BASE).encode(torch.zeros(1, 3, 18, 16))


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    model = randomised(BASE)
    x = torch.rand(2, 3, 16, 16) * 2 - 1

    def loss() -> Tensor:
        images, posterior = model(x, torch.Generator().manual_seed(3))
        return (images - x).square().mean() + 0.1 * posterior.kl().mean()

    assert_recomputing_changes_nothing(model, loss)


def test_discriminator_has_pix2pix_layers_and_names() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator()
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    found = {name: (c.in_channels, c.out_channels, c.stride[0], c.bias is not None) for name, c in convolutions.items()}
    assert found == {
        "main.0": (3, 64, 2, True),
        "main.2": (64, 128, 2, False),
        "main.5": (128, 256, 2, False),
        "main.8": (256, 512, 1, False),
        "main.11": (512, 1, 1, True),
    }
    assert all(c.kernel_size == (4, 4) and c.padding == (1, 1) for c in convolutions.values())
    assert all(abs(c.weight.std() - 0.02) < 0.002 for c in convolutions.values())
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    weights = torch.cat([norm.weight for norm in norms])
    assert len(norms) == 3
    assert abs(weights.mean() - 1.0) < 0.005
    assert abs(weights.std() - 0.02) < 0.005
    assert all((norm.bias == 0).all() for norm in norms)
    assert {layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)} == {0.2}
    # pix2pix prints 2.769 M for a pair of images at its input, which takes 3,072 weights more
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_765_633
    model = PatchDiscriminator(in_channels=1, channels=2, layers=5)
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


def test_each_logit_sees_70_pixels() -> None:
    model = PatchDiscriminator(channels=4).eval()
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = model(image)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


CPU = torch.device("cpu")


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    # mean relu(1 - real) = (0 + 0.5 + 2) / 3, mean relu(1 + fake) = (0 + 1 + 4) / 3
    assert objective.discriminator_hinge_loss(real, fake).item() == pytest.approx(0.5 * (2.5 + 5.0) / 3)
    assert objective.generator_hinge_loss(fake).item() == pytest.approx(-1 / 3)
    images, fake = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    distance = torch.tensor([0.5, 1.5]).view(2, 1, 1, 1)
    nll, l1, lpips = objective.reconstruction_nll(images, fake, perceptual=lambda x, y: distance, weight=2.0)
    pixels = 3 * 4 * 4
    assert nll.item() == pytest.approx((pixels * (0.25 + 1.0) + pixels * (0.25 + 3.0)) / 2)
    assert (l1.item(), lpips.item()) == (0.25, 1.0)
    without, _, none = objective.reconstruction_nll(images, fake, perceptual=None, weight=2.0)
    assert (without.item(), none.item()) == (pixels * 0.25, 0.0)


def test_adaptive_weight_and_the_norm_it_takes() -> None:
    nll_norm, zero = torch.tensor(3.0, requires_grad=True), torch.tensor(0.0)
    weight = objective.adaptive_weight(nll_norm, torch.tensor(2.0), maximum=1e4)
    assert weight.item() == pytest.approx(3 / 2.0001) and not weight.requires_grad
    assert objective.adaptive_weight(nll_norm, zero, maximum=1e4).item() == 1e4
    assert objective.adaptive_weight(nll_norm, zero, maximum=1e8).item() == pytest.approx(3e4)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(5, 7, 3, padding=1)
    inputs, towards = torch.randn(2, 5, 6, 9), torch.randn(2, 7, 6, 9)
    (grad,) = torch.autograd.grad((conv(inputs) * towards).sum(), conv.weight)
    torch.testing.assert_close(objective.conv_weight_grad_norm(inputs, towards, conv.weight.shape), grad.norm())


class Perceptual(torch.nn.Module):
    """Stands for LPIPS: a distance (B, 1, 1, 1) with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.conv = torch.nn.Conv2d(3, 4, 3).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.conv(x) - self.conv(y)) ** 2).mean(dim=(1, 2, 3), keepdim=True)


@pytest.mark.parametrize(("adversarial", "adaptive"), [(False, True), (True, True), (True, False)])
def test_surrogate_equals_autograd_at_the_weights(
    adversarial: bool, adaptive: bool, tmp_path: Path, monkeypatch
) -> None:
    # oneDNN's channels-last convolutions round more at these widths of 8, and each way of adding gradients its own way.
    monkeypatch.setattr(autoencoder, "_inner_channels", lambda _, x: x)
    loss = {"vf_adaptive": adaptive, "cos_margin": 0.1, "distmat_margin": 0.05}
    config = tiny_tokenizer(tmp_path, zero_stage=0, loss={**loss, "kl_weight": 0.01})
    spec = dataclasses.replace(config.loss, perceptual_weight=0.7)
    plain = PlainTokenizer(config)
    plain.loss, plain.perceptual = spec, Perceptual()
    tokenizer.runs.seed_everything(config.run)
    built = tokenizer._build(config, None, tmp_path, CPU)
    assert built.discriminator is not None
    networks = dataclasses.replace(built, perceptual=plain.perceptual)
    images = torch.rand(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1

    torch.manual_seed(5)
    expected, expected_terms, expected_fake = plain.generator_loss(images, adversarial=adversarial)
    expected.backward()
    torch.manual_seed(5)
    terms, fake = tokenizer.generator_step(networks, spec, images, adversarial=adversarial)

    torch.testing.assert_close(fake, expected_fake, rtol=1e-5, atol=1e-5)
    assert ("gan_weight" in terms) == adversarial
    for name, value in expected_terms.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    gradients = dict(built.model.module.named_parameters())
    for name, parameter in plain.model.named_parameters():
        assert parameter.grad is not None, name
        found = gradients[name].grad
        assert found is not None, name
        # Biases before GroupNorm have a gradient of 0 but for rounding, which is compared with the largest of all.
        error = (found - parameter.grad).norm()
        assert error <= 1e-5 * parameter.grad.norm() + 1e-4, (name, error, parameter.grad.norm())


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_frozen_networks_multiply_in_bf16_where_the_trained_ones_do(precision: str, tmp_path: Path) -> None:
    config = tiny_tokenizer(tmp_path, precision=precision, zero_stage=1)
    networks = dataclasses.replace(tokenizer._build(config, None, tmp_path, CPU), perceptual=Perceptual())
    assert networks.perceptual is not None and networks.foundation is not None
    seen = []
    for convolution in (networks.perceptual.conv, networks.foundation.model.patch_embed.proj):
        convolution.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    terms, _ = tokenizer.generator_step(networks, config.loss, torch.rand(BATCH, 3, 32, 32), adversarial=True)
    assert seen == 3 * [torch.float32 if precision == "fp32" else torch.bfloat16]
    assert terms["loss"].dtype == terms["mcos"].dtype == torch.float32

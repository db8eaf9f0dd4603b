"""VA-VAE's losses: the formulas, and the trainer's surrogate against autograd at the weights themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_plain import BATCH, PlainTokenizer, tiny_tokenizer

from vadit.objectives import tokenizer as objective
from vadit.train import tokenizer

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
def test_surrogate_equals_autograd_at_the_weights(adversarial: bool, adaptive: bool, tmp_path: Path) -> None:
    loss = {"vf_adaptive": adaptive, "cos_margin": 0.1, "distmat_margin": 0.05}
    config = tiny_tokenizer(tmp_path, zero_stage=0, loss={**loss, "kl_weight": 0.01})
    spec = dataclasses.replace(config.loss, perceptual_weight=0.7)
    plain = PlainTokenizer(config)
    plain.loss, plain.perceptual = spec, Perceptual()
    tokenizer.runs.seed_everything(config.run)
    built = tokenizer._build(config, tmp_path, CPU)
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

"""Both models trained with the kernels and with plain torch: the same curve of the loss, within rounding."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from training_plain import BATCH, PlainTokenizer, flow_terms, tiny_tokenizer

from vadit.images.backends import open_images, open_loader
from vadit.images.pixels import to_signed
from vadit.kernels import dispatch
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe

STEPS = 50
needs_extension = pytest.mark.skipif(dispatch.BACKENDS["cpp"].missing is not None, reason="vadit/_C.abi3.so")


def calls_of_kernels(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the ops that find kernels from now on, so that a comparison of torch with itself shows."""
    seen: set[str] = set()
    find = dispatch.kernels_for

    def watched(op: str, *tensors: torch.Tensor | None):
        ops = find(op, *tensors)
        if ops is not None:
            seen.add(op)
        return ops

    monkeypatch.setattr(dispatch, "kernels_for", watched)
    return seen


def generator_losses(qk_norm: bool) -> list[float]:
    """The flow's loss on one batch, from weights of which none is zero: a new LightningDiT's blocks do nothing."""
    torch.manual_seed(0)
    config = get_recipe("lightningdit-b-debug")
    model = LightningDiT(dataclasses.replace(config.model, qk_norm=qk_norm)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spec = config.model
    latents = torch.randn(8, spec.in_channels, spec.input_size, spec.input_size)
    labels = torch.randint(spec.num_classes, (8,))
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step % 5)
        loss = flow_terms(config.flow, model, latents, labels)["loss"]
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@needs_extension
@pytest.mark.parametrize("qk_norm", [False, True])
def test_generator(monkeypatch: pytest.MonkeyPatch, qk_norm: bool) -> None:
    seen = calls_of_kernels(monkeypatch)
    with dispatch.setting("reference"):
        plain = generator_losses(qk_norm)
    assert not seen
    with dispatch.setting("auto"):
        ours = generator_losses(qk_norm)
    assert seen == {"rms_norm", "rope", "swiglu"}
    assert plain[-5] < 0.9 * plain[0], "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-4, atol=0)


def tokenizer_losses(out: Path) -> list[list[float]]:
    """The terms of every step, as AlignedAutoencoder computes them with the op of the VF loss."""
    config = tiny_tokenizer(out, steps=STEPS)
    plain = PlainTokenizer(config)
    assert plain.foundation is not None, "the debug twin aligns"
    adam = torch.optim.AdamW(plain.model.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=0.0)
    source = open_images(config.data, config.autoencoder.image_size)
    stream = open_loader(config.data, source, BATCH, seed=config.run.seed)[0].stream()
    losses = []
    for _ in range(STEPS):
        images = to_signed(next(stream).images)
        rebuilt, kl, cos_loss, distmat_loss = plain.model(images, plain.foundation(images))
        rec = (rebuilt - images).abs().mean()
        (rec + 1e-6 * kl + cos_loss + distmat_loss).backward()
        adam.step()
        adam.zero_grad()
        losses.append([rec.item(), cos_loss.item(), distmat_loss.item()])
    return losses


@needs_extension
def test_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls_of_kernels(monkeypatch)
    with dispatch.setting("reference"):
        plain = torch.tensor(tokenizer_losses(tmp_path))
    assert not seen
    with dispatch.setting("auto"):
        ours = torch.tensor(tokenizer_losses(tmp_path))
    assert seen == {"vf_loss"}
    assert (plain[-1, :2] < 0.95 * plain[0, :2]).all(), "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=0)

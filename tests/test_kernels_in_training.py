"""Training with the kernels as with plain torch, the same again to the bit, and compiled once."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_help import events, faulty, newest, same
from model_help import randomised
from torch import Tensor, nn
from training_plain import BATCH, PlainTokenizer, flow_terms, logged, tiny_dit, tiny_tokenizer

from vadit.config import vary
from vadit.images.backends import open_images, open_loader
from vadit.images.pixels import to_signed
from vadit.kernels import dispatch, exact
from vadit.models import lpips
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.train import dit, tokenizer
from vadit.train.engine import Engine
from vadit.train.guard import Guard

STEPS = 50
needs_extension = pytest.mark.skipif(dispatch.BACKENDS["cpp"].missing is not None, reason="vadit/_C.abi3.so")


def calls_of_kernels(monkeypatch) -> set[str]:
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
def test_generator(monkeypatch, qk_norm: bool) -> None:
    seen = calls_of_kernels(monkeypatch)
    with dispatch.setting("reference"):
        plain = generator_losses(qk_norm)
    assert not seen
    with dispatch.setting("auto"):
        ours = generator_losses(qk_norm)
    assert seen == {"gated_norm", "rms_norm", "rope", "swiglu"}
    assert plain[-5] < 0.9 * plain[0], "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-4, atol=0)


def tokenizer_losses(out: Path) -> list[list[float]]:
    """The terms of every step, as AlignedAutoencoder computes them with the op of the VF loss."""
    config = tiny_tokenizer(out, steps=STEPS)
    plain = PlainTokenizer(config)
    assert plain.foundation is not None, "the debug twin aligns"
    # eps: a gradient that is 0 but for rounding (a bias before a norm) is no step of full length.
    adam = torch.optim.AdamW(plain.model.parameters(), lr=2e-4, betas=(0.5, 0.9), eps=1e-6, weight_decay=0.0)
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
def test_tokenizer(tmp_path: Path, monkeypatch) -> None:
    seen = calls_of_kernels(monkeypatch)
    with dispatch.setting("reference"):
        plain = torch.tensor(tokenizer_losses(tmp_path))
    assert not seen
    with dispatch.setting("auto"):
        ours = torch.tensor(tokenizer_losses(tmp_path))
    assert seen == {"group_norm_silu", "vf_loss"}
    assert (plain[-1, :2] < 0.95 * plain[0, :2]).all(), "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=0)


EVERY_STEP = {"save_every_images": BATCH, "keep_checkpoints": 9}


def test_a_deterministic_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    try:
        for name in ("one", "other"):
            dit.train(tiny_dit(tmp_path / f"dit-{name}", run={"deterministic": True}))
            tokenizer.train(tiny_tokenizer(tmp_path / f"vae-{name}", steps=2, run={"deterministic": True}))
            assert torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
    for network in ("dit", "vae"):
        one, other = tmp_path / f"{network}-one", tmp_path / f"{network}-other"
        assert logged(one) == logged(other)
        assert same(newest(one), newest(other))


def compiled(monkeypatch, train: Callable[[], object]) -> tuple[int, list[int]]:
    """Blocks that were compiled while `train` ran, and the graphs that dynamo had made after each of its steps."""
    torch._dynamo.reset()
    blocks, graphs, after = 0, 0, []
    original, compile_one = Guard.step, torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def compile_with(function: Any, **options: Any) -> Any:
        nonlocal blocks
        if not isinstance(getattr(function, "__self__", None), nn.Module):  # what torch compiles of its own
            return compile_one(function, **options)
        blocks += 1
        # More graphs than the limit would be an error.
        return compile_one(function, backend=backend, fullgraph=True, **options)

    def step(guard: Guard, engines: dict[str, Engine]) -> bool:
        applied = original(guard, engines)
        after.append(graphs)
        return applied

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile_with)
        patch.setattr(Guard, "step", step)
        train()
    torch._dynamo.reset()
    return blocks, after


@pytest.mark.parametrize(
    ("network", "zero_stage"), [("dit", 1), pytest.param("dit", 3, marks=pytest.mark.faults), ("tokenizer", 3)]
)
def test_blocks_are_compiled_once(network: str, zero_stage: int, tmp_path: Path, monkeypatch) -> None:
    engine: dict[str, Any] = {"zero_stage": zero_stage, "compile": True}
    if network == "dit":
        faulty(monkeypatch, lambda call: call == 3)
        config = tiny_dit(tmp_path / "compiled", run=EVERY_STEP, **engine)
        blocks, graphs = compiled(monkeypatch, lambda: dit.train(config))
        assert blocks == 2 and graphs == [2] * 5  # all but the first share one: its tokens are not pending
    else:
        faulty_images(monkeypatch)
        small_lpips(monkeypatch)
        small = tiny_tokenizer(tmp_path / "compiled", run=EVERY_STEP, loss={"perceptual_weight": 1.0}, **engine)
        blocks, graphs = compiled(monkeypatch, lambda: tokenizer.train(small))
        assert blocks == 2 and graphs == [2] * 4  # LPIPS, and the only block of the foundation model
    assert len(events(tmp_path / "compiled")) == 1


def test_compiled_blocks_train_as_plain_ones(tmp_path: Path, monkeypatch) -> None:
    found = []
    for name in ("plain", "compiled"):
        config = tiny_dit(tmp_path / name, zero_stage=3, compile=name == "compiled")
        compiled(monkeypatch, lambda config=config: dit.train(config))  # type: ignore[misc]
        found.append(logged(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_inductor_compiles_what_a_tokenizer_is_compared_by(tmp_path: Path, monkeypatch) -> None:
    """LPIPS and the foundation model in real graphs: the losses and their gradients as without."""
    torch._dynamo.reset()
    small_lpips(monkeypatch)
    found = []
    for engine in ({}, {"compile": True}):
        loss = {"disc_layers": 1, "perceptual_weight": 1.0}
        config = tiny_tokenizer(out := tmp_path / f"{len(found)}", steps=3, loss=loss, **engine)
        small = {"channel_multipliers": (1, 1), "image_size": 8, "attention_resolutions": (), "latent_channels": 4}
        tokenizer.train(vary(config, autoencoder=small))
        found.append([logged(out), logged(out, "lpips"), logged(out, "mcos")])
    torch._dynamo.reset()
    assert found[0] == [pytest.approx(losses, rel=1e-5) for losses in found[1]]


def small_lpips(monkeypatch) -> None:
    monkeypatch.setattr(lpips, "VGG_WIDTHS", ((4, 1), (8, 2)))
    monkeypatch.setattr(lpips.LPIPS, "_load_backbone", lambda *_: None)
    monkeypatch.setattr(lpips.LPIPS, "_load_heads", lambda net: [head.data.fill_(1) for head in net.heads])


def faulty_images(monkeypatch) -> None:
    original, calls = tokenizer.generator_step, 0

    def broken(networks: Any, loss: Any, images: Tensor, *, adversarial: bool) -> Any:
        nonlocal calls
        calls += 1
        return original(networks, loss, images * (math.nan if calls == 2 else 1), adversarial=adversarial)

    monkeypatch.setattr(tokenizer, "generator_step", broken)


def outputs_and_gradients(model: LightningDiT, autocast: bool = False) -> list[Tensor]:
    spec, generator = model.spec, torch.Generator().manual_seed(1)
    x = torch.randn(3, spec.in_channels, spec.input_size, spec.input_size, generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x, torch.tensor([0.1, 0.5, 0.9]), torch.arange(3))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.float().square().mean(), trained)]


@needs_extension
@pytest.mark.parametrize("switches", [{}, {"shift_free": True, "swiglu": False, "qk_norm": True}], ids=["", "switches"])
def test_a_network_is_the_same_with_and_without_its_ops(switches: dict[str, bool]) -> None:
    """Also where the layers add their biases themselves, and where a compiler sees all blocks as two graphs."""
    spec = dataclasses.replace(get_recipe("lightningdit-b-debug").model, depth=4, **switches)
    model = randomised(LightningDiT(spec))
    with dispatch.setting("reference"):
        expected, rounded = outputs_and_gradients(model), outputs_and_gradients(model, autocast=True)
    with exact():
        plain = outputs_and_gradients(model)
    ours, in_bf16 = outputs_and_gradients(model), outputs_and_gradients(model, autocast=True)
    for wanted, *others, torchs, found in zip(expected, ours, plain, rounded, in_bf16, strict=True):
        assert all((other - wanted).norm() <= 2e-5 * wanted.norm() for other in others)
        assert (found - wanted).norm() <= 1.5 * (torchs - wanted).norm()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    for autocast, eager in ((False, ours), (True, in_bf16)):
        found = outputs_and_gradients(model, autocast)
        assert all(torch.equal(*pair) for pair in zip(found, eager, strict=True))
    # the first block's tokens are closed, all others' pending; each once in float32 and once under autocast
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4

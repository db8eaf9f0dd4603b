"""What goes beyond the paper, each off by default: contrastive loss, dispersion, time shift, value residual, REPA."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_help import randomised
from torch import Tensor
from training_plain import flow_terms

from vadit.config import DiTConfig, DiTSpec, FlowSpec, FoundationSpec, OptimizerSpec, RepaSpec, vary
from vadit.models.dit import AlignedDiT, DiTOutput, LightningDiT, closed
from vadit.objectives import flow, regularisers
from vadit.recipes import get_recipe
from vadit.runtime.errors import UsageError
from vadit.train import dit as trainer
from vadit.train import optimizers, runs
from vadit.train.checkpoint import export

SPEC = DiTSpec(input_size=4, in_channels=3, hidden_size=32, depth=4, num_heads=2, num_classes=5, class_dropout=0.0)


def batch(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 4, 4, generator=generator)
    return x, torch.rand(count, generator=generator), torch.arange(count) % 5


def test_time_shift_and_contrastive_loss_by_hand() -> None:
    plain, shifted = (
        flow.sample_time(FlowSpec(time_shift=s), 1000, 0, torch.Generator().manual_seed(3)) for s in (1.0, 1.5)
    )
    noise = 1 - plain.double()
    torch.testing.assert_close(1 - shifted.double(), 1.5 * noise / (1 + 0.5 * noise), rtol=1e-5, atol=1e-6)
    assert shifted.mean() < plain.mean()
    x, _, labels = batch()
    seen: dict[str, Tensor] = {}

    def model(x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen["x_t"], seen["t"] = x_t, t
        return x_t * 0.5

    spec = FlowSpec(contrastive_weight=0.05)
    loss = flow_terms(spec, model, x, labels, 0, torch.Generator().manual_seed(7))
    plain = flow_terms(FlowSpec(), model, x, labels, 0, torch.Generator().manual_seed(7))
    assert "contrastive" not in plain
    t = seen["t"].reshape(-1, 1, 1, 1)
    velocity = (x - seen["x_t"]) / (1 - t)  # x1 - x0, from x_t = t x1 + (1 - t) x0
    others = torch.stack([velocity[2], velocity[0], velocity[1]])
    expected = ((seen["x_t"] * 0.5 - others) ** 2).mean()
    assert loss["contrastive"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss["loss"].item() == pytest.approx(plain["loss"].item() - 0.05 * expected.item(), rel=1e-5)


def test_dispersive_and_alignment_loss_by_hand() -> None:
    hidden = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0)) * 2 + 3
    rows = hidden.double().flatten(1)
    pairs = [math.exp(-((rows[i] - rows[j]) ** 2).mean().item() / 0.7) for i in range(5) for j in range(5)]
    assert regularisers.dispersive_loss(hidden, 0.7).item() == pytest.approx(math.log(sum(pairs) / 25), rel=1e-5)
    assert regularisers.dispersive_loss(hidden[:1].expand(4, -1, -1), 0.5).item() == pytest.approx(0, abs=1e-5)
    features = torch.randn(2, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    tokens = features.flatten(2).transpose(1, 2)
    assert regularisers.alignment_loss(3 * tokens, features.bfloat16()).item() == pytest.approx(0, abs=1e-4)
    assert regularisers.alignment_loss(-tokens, features).item() == pytest.approx(2)
    expected = 1 - F.cosine_similarity(tokens.roll(1, dims=1), tokens, dim=2).mean()
    assert regularisers.alignment_loss(tokens.roll(1, dims=1), features).item() == pytest.approx(expected.item())
    pytest.raises(UsageError, regularisers.alignment_loss, tokens[..., :5], features).match("6 tokens of 5 channels")


@pytest.mark.parametrize("recompute", [False, True])
def test_taps_are_the_outputs_of_blocks_and_change_nothing(recompute: bool) -> None:
    model = randomised(LightningDiT(SPEC, gradient_checkpointing=recompute))
    x, t, y = batch()
    caught: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: caught.append(closed(output)))
    output = model.forward_features(x, t, y, taps=(2, 4))
    prediction, (second, fourth) = output.prediction, output.hidden.values()
    assert torch.equal(second, caught[1]) and torch.equal(fourth, caught[3])
    assert torch.equal(prediction, model(x, t, y))
    second.sum().backward()
    assert model.blocks[1].mlp.w3.weight.grad is not None and model.blocks[2].mlp.w3.weight.grad is None


@pytest.mark.parametrize("recompute", [False, True])
def test_value_residual_mixes_the_first_blocks_values_in(recompute: bool) -> None:
    spec = dataclasses.replace(SPEC, value_residual=True)
    model = randomised(LightningDiT(spec, gradient_checkpointing=recompute))
    plain = randomised(LightningDiT(SPEC))
    missing = plain.load_state_dict({k: v for k, v in model.state_dict().items() if "value_share" not in k})
    assert not missing.missing_keys
    x, t, y = batch()
    assert not torch.allclose(model(x, t, y), plain(x, t, y), atol=1e-3)
    used: list[Tensor] = []
    for block in model.blocks:
        attend = block.attn.attend
        block.attn.attend = lambda q, k, v, attend=attend: (used.append(v), attend(q, k, v))[1]
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.attn.value_share.fill_(1.0)
        model(x, t, y)
        assert all(torch.equal(v, used[0]) for v in used[1:4])
        for block in model.blocks:
            block.attn.value_share.fill_(0.0)
        torch.testing.assert_close(model(x, t, y), plain(x, t, y))
    for block in model.blocks:
        block.attn.value_share.data.fill_(0.5)
    model(x, t, y).square().sum().backward()
    assert all(block.attn.value_share.grad.abs() > 0 for block in model.blocks[1:])


def test_the_projector_sees_the_aligned_block() -> None:
    repa = RepaSpec(weight=0.5, block=3, projector_width=16)
    model = randomised(AlignedDiT(SPEC, repa, 7))
    x, t, y = batch()
    plain = LightningDiT(SPEC)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("projector.")})
    output = model.forward_features(x, t, y, taps=(1, 3))
    assert torch.equal(output.prediction, plain.eval()(x, t, y)) and torch.equal(output.prediction, model(x, t, y))
    assert output.projected is not None and output.projected.shape == (3, 16, 7)
    assert torch.equal(output.projected, model.projector(output.hidden[3]))
    assert model.forward_features(x, t, y, taps=(1,)).projected is None


RUN = {"total_images": 16, "save_every_images": 8}
ALIGNED = RepaSpec(weight=0.5, block=1, projector_width=16, foundation=FoundationSpec(name="dinov2"))


def config(folder: Path, **groups: Any) -> DiTConfig:
    return vary(get_recipe("lightningdit-b-debug"), run=RUN | {"out": str(folder)}, **groups)


@pytest.mark.parametrize(("aligned", "dispersed"), [(1, 2), (2, 1), (2, 2)])
def test_each_loss_gets_its_own_block(aligned: int, dispersed: int) -> None:
    repa = RepaSpec(weight=0.25, block=aligned)
    both = config(Path("unused"), model={"depth": 4 * dispersed}, flow={"dispersive_weight": 0.5}, repa=repa)
    generator = torch.Generator().manual_seed(0)
    outputs = {block: torch.randn(3, 4, 8, generator=generator) for block in (1, 2)}
    projected, features = (torch.randn(3, 4, 6, generator=generator) for _ in range(2))
    features = features.transpose(1, 2).reshape(3, 6, 2, 2)
    hidden = {block: outputs[block] for block in trainer.tapped_blocks(both)}
    terms = trainer._with_regularisers(
        both,
        {"loss": torch.tensor(1.0)},
        DiTOutput(torch.empty(0), hidden, projected),
        [features],
        trainer.Features(6, None),
    )
    dispersive = regularisers.dispersive_loss(outputs[dispersed], 0.5)
    alignment = regularisers.alignment_loss(projected, features)
    assert torch.equal(terms["dispersive"], dispersive) and torch.equal(terms["alignment"], alignment)
    torch.testing.assert_close(terms["loss"], 1 + 0.5 * dispersive + 0.25 * alignment)


def trained_in_two_parts(whole: DiTConfig, folder: Path) -> dict[str, Tensor]:
    """The weights of a run that goes on in mid-way; they are those of the run at once, which trains, too."""
    trainer.train(whole)
    for images in (8, 16):
        trainer.train(vary(whole, run={"out": str(folder), "total_images": images}))
    at_once, in_two = (runs.read_weights(run)[0] for run in (whole.run.out, folder))
    assert at_once.keys() == in_two.keys()
    assert all(torch.equal(value, at_once[name]) for name, value in in_two.items())
    return in_two


def test_all_terms_train_go_on_to_the_bit_and_leave_no_projector(tmp_path: Path) -> None:
    flow = {"contrastive_weight": 0.05, "dispersive_weight": 0.5, "time_shift": 1.4}
    whole = config(tmp_path / "whole", flow=flow, repa=ALIGNED)
    weights = trained_in_two_parts(whole, tmp_path / "half")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    for line in lines:
        total = line["mse"] + line["direction"] - 0.05 * line["contrastive"]
        total += 0.5 * line["dispersive"] + 0.5 * line["alignment"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert 0 < line["alignment"] < 2 and line["dispersive"] <= 0
    fresh = trainer.training_network(whole, 16)
    assert not torch.equal(weights["projector.0.weight"], fresh.state_dict()["projector.0.weight"])
    export.load_network(tmp_path / "whole").save_pretrained(tmp_path / "exported")
    assert not any(name.startswith("projector.") for name in export.load_generator(tmp_path / "exported").state_dict())
    # the projector starts anew
    trainer.train(vary(whole, run={"out": str(tmp_path / "on"), "init_from": str(tmp_path / "exported")}))


def test_online_features_are_the_foundation_models() -> None:
    class Model(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * 2

    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    found = trainer.Features(3, Model())(pixels)  # type: ignore[arg-type]
    assert found.flatten().tolist() == pytest.approx([-2.0, 2.0, -1.2])
    assert trainer.Features(3, None)(found) is found


def test_several_averages_train_at_once_and_each_can_be_had(tmp_path: Path) -> None:
    trainer.train(config(tmp_path / "run", engine={"ema_decays": (0.5, 0.9), "ema_warmup": False}))
    plain, fast, slow = (export.load_generator(tmp_path / "run", ema).state_dict() for ema in (0.0, 0.5, 0.9))
    name = "final_layer.linear.bias"
    assert not torch.equal(plain[name], fast[name]) and not torch.equal(fast[name], slow[name])
    assert torch.equal(export.load_generator(tmp_path / "run").state_dict()[name], fast[name])


def test_muon_trains_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    optimizer, engine = {"kind": "muon", "lr": 1e-2}, {"zero_stage": 0, "ema_decays": ()}
    trained_in_two_parts(config(tmp_path / "whole", optimizer=optimizer, engine=engine), tmp_path / "half")


def test_muon_is_torchs_muon_at_adamws_size() -> None:
    matrix, bias = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((256, 64), (64,)))
    spec = OptimizerSpec(kind="muon", lr=0.1)
    optimizer, choice = optimizers.build([matrix, bias], spec, device=torch.device("cpu"), matrices=[matrix])
    assert choice.name == "muon"
    generator = torch.Generator().manual_seed(0)
    matrix.grad, bias.grad = torch.randn(256, 64, generator=generator), torch.randn(64, generator=generator)
    optimizer.step()
    singular = torch.linalg.svdvals(matrix.detach()) / (0.1 * 0.2 * 16)  # rate x 0.2 x sqrt(256)
    assert singular.min() > 0.6 and singular.max() < 1.3  # Newton-Schulz leaves them near 1
    torch.testing.assert_close(bias.detach(), -0.1 * bias.grad.sign(), rtol=1e-3, atol=1e-5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = matrix.detach().clone()
    optimizer.step()
    assert torch.equal(matrix, before) and "momentum_buffer" in optimizer.state[matrix]

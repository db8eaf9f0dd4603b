"""Masked runs under DeepSpeed: against plain torch, resumed, tuned without masks, exported and drawn from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_plain import BATCH, logged, tiny_dit

from vadit.config import DiTConfig, MaskSpec
from vadit.latents.dataset import open_latents
from vadit.latents.loader import LatentLoader
from vadit.models.dit import LightningDiT
from vadit.models.interop import save_reference
from vadit.models.masked import MDT, MaskDiT, build_generator
from vadit.objectives import ddpm, flow, masked
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.sampling.solvers import sample_ode
from vadit.train import dit, runs
from vadit.train.checkpoint import export

MASKDIT = MaskSpec(kind="maskdit", ratio=0.5, decoder_depth=1, decoder_width=32, decoder_heads=2)
MDT_MASK = MaskSpec(kind="mdt", ratio=0.3, decoder_depth=1)


def config(out: Path, mask: MaskSpec, *, steps: int = 4, model: dict[str, Any] | None = None, **options: Any) -> Any:
    """The debug twin with masks; MDT as published: without rotary tables, so with its relative bias."""
    plain = tiny_dit(out, steps=steps, **options)
    switches = {"rope": mask.kind == "maskdit", **(model or {})}
    return dataclasses.replace(plain, mask=mask, model=dataclasses.replace(plain.model, **switches))


def plain_losses(config: DiTConfig) -> tuple[list[float], dict[str, Tensor]]:
    """The same run in plain torch: losses of each step, and the weights at the end."""
    dataset = open_latents(config.data, config.model)
    runs.seed_everything(config.run)
    model = build_generator(config.model, config.mask).train()
    options = config.optimizer
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(trained, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    stream = LatentLoader(dataset, config.run.batch_size, seed=config.run.seed, rank=0, world_size=1).stream()
    torch.manual_seed(rng.fold(config.run.seed, 0))
    losses = []
    for seen in range(0, config.run.total_images, config.run.batch_size):
        latents, labels = next(stream)[:2]
        late = config.mask.unmasked_after_images
        if config.mask.kind == "maskdit" and (late is None or seen < late):
            drawn = flow.draw(config.flow, latents, seen)
            output = model.forward_features(drawn.x_t, drawn.t, labels, masked=True)
            assert output.mask_BN is not None
            weight = config.mask.reconstruction_weight
            found = masked.loss(config.flow, drawn, output.prediction, output.mask_BN, weight)
            loss = found.mse + found.direction + weight * found.reconstruction
        elif config.mask.kind == "maskdit":
            loss = flow.training_loss(config.flow, model, latents, labels, images_seen=seen).total
        else:
            loss = torch.zeros(())
            for masks in (False, True):
                if config.flow.objective == "ddpm":
                    noised = ddpm.draw(latents)
                    output = model.forward_features(noised.x_t, noised.t, labels, with_variance=True, masked=masks)
                    loss = loss + ddpm.loss(noised, output.prediction).total
                else:
                    drawn = flow.draw(config.flow, latents, seen)
                    output = model.forward_features(drawn.x_t, drawn.t, labels, masked=masks)
                    loss = loss + flow.loss(config.flow, drawn, output.prediction).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.engine.max_grad_norm)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def check_against_plain(config: DiTConfig) -> None:
    expected, weights = plain_losses(config)
    assert logged(dit.train(config)) == pytest.approx(expected, rel=1e-5)
    state, _ = runs.read_weights(config.run.out)
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_maskdit_trains_as_plain_adamw_does_through_both_stages(zero_stage: int, tmp_path: Path) -> None:
    late = dataclasses.replace(MASKDIT, unmasked_after_images=2 * BATCH)
    check_against_plain(config(tmp_path, late, zero_stage=zero_stage))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [("reconstruction" in line) for line in lines] == [True, True, False, False]


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_mdt_trains_as_plain_adamw_does(zero_stage: int, tmp_path: Path) -> None:
    check_against_plain(config(tmp_path, MDT_MASK, zero_stage=zero_stage))
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(line["mse"] + line["masked_mse"], rel=1e-6)


def test_mdt_trains_with_ddpm(tmp_path: Path) -> None:
    base = config(tmp_path, MDT_MASK, steps=2, model={"learn_sigma": True}, zero_stage=2)
    check_against_plain(dataclasses.replace(base, flow=dataclasses.replace(base.flow, objective="ddpm")))


@pytest.mark.parametrize(("mask", "kind"), [(MASKDIT, MaskDiT), (MDT_MASK, MDT)])
def test_a_run_is_exported_and_drawn_from_and_begun_from(mask: MaskSpec, kind: type, tmp_path: Path) -> None:
    run = dit.train(config(tmp_path / "run", mask, steps=2))
    export.export_run(run, tmp_path / "out")
    networks = [export.load_generator(run), export.load_generator(tmp_path / "out")]
    assert all(type(network) is kind for network in networks)
    spec = networks[0].spec
    noise = torch.randn(2, spec.in_channels, spec.input_size, spec.input_size)
    labels = torch.tensor([1, 2])
    drawn = [sample_ode(network, noise, labels, num_steps=3, cfg_scale=2.0) for network in networks]
    assert torch.equal(*drawn) and drawn[0].isfinite().all() and not torch.equal(drawn[0], noise)
    with pytest.raises(UsageError, match="tensor"):
        LightningDiT.from_pretrained(tmp_path / "out")
    with pytest.raises(UsageError, match="masked generator"):
        save_reference(networks[0], tmp_path / "authors.pt")
    if kind is MaskDiT:
        tune = dataclasses.replace(mask, unmasked_after_images=0)
        tuned = config(tmp_path / "tuned", tune, steps=1, run={"init_from": str(tmp_path / "out")})
        log = json.loads((dit.train(tuned) / "log.jsonl").read_text())
        assert "reconstruction" not in log

"""The trainers against plain PyTorch, in one process and in two under DeepSpeed's launcher."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_worker import assert_same_end
from guard_help import same
from launched import GENERATOR, LIMIT_S, environment, launch_two, run_ranks
from PIL import Image
from torch import Tensor
from training_plain import logged, plain_dit, plain_tokenizer, tiny_dit, tiny_tokenizer
from training_worker import LOOK

from vadit import cli
from vadit.config import MAX_BUCKET, EngineSpec, OptimizerSpec, TokenizerConfig
from vadit.images.pixels import channels_last, image_grid
from vadit.models.autoencoder import Autoencoder
from vadit.recipes import get_recipe
from vadit.sampling.draw import decode, draw
from vadit.train import dit, loop, optimizers, runs, tokenizer
from vadit.train.checkpoint import export, publish
from vadit.train.checkpoint.export import load_autoencoder, load_generator
from vadit.train.checkpoint.shares import WEIGHTS, Shares
from vadit.train.ema import ShardedEMA, start_share
from vadit.train.engine import Engine, deepspeed_config
from vadit.train.evaluation import quick_sampler
from vadit.train.runs import read_weights
from vadit.train.watchdog import HANG_CODE

CPU = torch.device("cpu")


def newest(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    path = publish.newest(folder / "checkpoints")
    assert path is not None
    return path


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_generator_trains_as_plain_adamw_does(zero_stage: int, tmp_path: Path) -> None:
    config = tiny_dit(tmp_path, steps=5, zero_stage=zero_stage)
    expected, weights = plain_dit(config)
    assert max(expected) > 1.05 * min(expected)  # a curve, not a constant
    found = logged(dit.train(config))
    assert found == pytest.approx(expected, rel=1e-5)
    state, _ = runs.read_weights(tmp_path)
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        # Adam divides by a root: rounding of a gradient near 0 can turn a step of lr 3e-3.
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_tokenizer_trains_as_plain_adamw_does(zero_stage: int, tmp_path: Path) -> None:
    config = tiny_tokenizer(tmp_path, steps=2 if zero_stage == 3 else 3, zero_stage=zero_stage)
    expected, expected_disc = plain_tokenizer(config)
    tokenizer.train(config)
    assert logged(tmp_path) == pytest.approx(expected, rel=1e-4)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert "disc" not in lines[0]
    assert expected_disc == pytest.approx([json.loads(line)["disc"] for line in lines[1:]], rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_accumulation_is_a_mean_over_micro_batches(zero_stage: int, tmp_path: Path) -> None:
    config = tiny_dit(tmp_path, zero_stage=zero_stage, gradient_accumulation=2)
    expected, _ = plain_dit(config)
    assert logged(dit.train(config)) == pytest.approx(expected, rel=1e-5)


def test_tokenizer_accumulates_in_both_networks(tmp_path: Path) -> None:
    config = tiny_tokenizer(tmp_path, zero_stage=1, gradient_accumulation=2, loss={"disc_start_step": 1})
    expected, expected_disc = plain_tokenizer(config)
    tokenizer.train(config)
    assert logged(tmp_path) == pytest.approx(expected, rel=1e-4)
    assert logged(tmp_path, "disc") == pytest.approx(expected_disc, rel=1e-4)


@pytest.mark.parametrize(("precision", "zero_stage"), [("bf16", 0), ("bf16", 1), ("bf16", 3), ("autocast", 1)])
def test_half_precision_stays_near(precision: Any, zero_stage: int, tmp_path: Path) -> None:
    expected, _ = plain_dit(tiny_dit(tmp_path))
    found = logged(dit.train(tiny_dit(tmp_path / "dit", zero_stage=zero_stage, precision=precision)))
    assert found == pytest.approx(expected, rel=0.02)
    assert found != pytest.approx(expected, rel=1e-6)  # it did run in bf16
    expected, _ = plain_tokenizer(tiny_tokenizer(tmp_path, steps=2))
    found = logged(
        tokenizer.train(tiny_tokenizer(tmp_path / "vae", steps=2, zero_stage=zero_stage, precision=precision))
    )
    assert found == pytest.approx(expected, rel=0.05)
    state, _ = runs.read_weights(tmp_path / "vae")
    assert all(value.dtype == torch.float32 for value in state.values())
    assert any((value != value.bfloat16()).any() for value in state.values())  # the fp32 weights, not their copies


def test_learning_rate_schedules() -> None:
    def rates(total: int, *points: int, **spec: Any) -> list[float]:
        made = OptimizerSpec(lr=1.0, **spec)
        return [loop.learning_rate(made, images_seen=point, total_images=total) for point in points]

    assert rates(100, 0, 99) == [1.0, 1.0]
    assert rates(100, 0, 4, 9, 50, warmup_images=10) == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rates(100, 0, 50, 75, schedule="linear") == pytest.approx([1.0, 0.5, 0.25])
    assert rates(100, 0, 15, 30, 65, 100, schedule="one_cycle") == pytest.approx([0.04, 0.52, 1.0, 0.5, 0.0])


def test_deepspeeds_config() -> None:
    def made(num_weights: int = 101, **engine: Any) -> dict[str, Any]:
        return deepspeed_config(EngineSpec(**{"zero_stage": 1, **engine}), global_batch=8, num_weights=num_weights)

    config = made(zero_stage=2, gradient_accumulation=2, max_grad_norm=0.0, precision="bf16")
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (8, 4)
    assert config["gradient_clipping"] == 0.0
    assert config["zero_optimization"]["reduce_bucket_size"] == 102  # even, or ZeRO 1 and 2 refuse it
    assert made(num_weights=10**12)["zero_optimization"]["reduce_bucket_size"] == MAX_BUCKET
    # Micro-batches are summed in fp32, which takes stage 2.
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    stages = [made(precision="bf16", gradient_accumulation=n)["zero_optimization"]["stage"] for n in (1, 2)]
    assert stages == [1, 2]


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "fp32")])
def test_average_equals_a_plain_one(zero_stage: Any, precision: Any) -> None:
    warmup = zero_stage == 1
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.SiLU(), torch.nn.Linear(7, 3))
    engine = Engine(
        network,
        optimizer=OptimizerSpec(lr=0.1),
        spec=EngineSpec(zero_stage=zero_stage, precision=precision, ema_warmup=warmup),
        global_batch=4,
        device=CPU,
    )
    ema, shares = ShardedEMA(engine, (0.9, 0.5)), dict.fromkeys((0.9, 0.5), 1.0)
    plain = {decay: dict(engine.whole_weights(engine.masters())) for decay in (0.9, 0.5)}
    start = dict(engine.whole_weights(engine.masters()))
    for step in range(12):
        inputs = torch.randn(4, 5).to(engine.compute_dtype())
        for veto in [True, False] if step % 5 == 0 else [False]:  # a step left out moves no average
            ema.begin_step(step)
            engine.backward(engine(inputs).float().square().mean())
            assert engine.step(torch.tensor(veto)) != veto
        ema.update(step)
        weights = dict(engine.whole_weights(engine.masters()))
        for decay, average in plain.items():
            used = min(decay, (2 + step) / (11 + step)) if warmup else decay
            shares[decay] *= used
            for name, value in average.items():
                value.lerp_(weights[name], 1 - used)
    assert any((weights[name] - start[name]).abs().max() > 0.01 for name in weights)
    for decay, average in plain.items():
        found = dict(engine.whole_weights(ema.shards[decay]))
        assert found.keys() == average.keys()
        assert max((found[name] - value).abs().max().item() for name, value in average.items()) == 0
        assert start_share(12, decay, warmup) == pytest.approx(shares[decay], rel=1e-6, abs=1e-9)


def test_one_odd_weight_leaves_all_others_aligned() -> None:
    network = torch.nn.ModuleList(torch.nn.Linear(width, 8) for width in (8, 3))
    network.register_parameter("odd", torch.nn.Parameter(torch.ones(1)))  # the first of all parameters
    spec = EngineSpec(zero_stage=1, precision="bf16")
    engine = Engine(network, optimizer=OptimizerSpec(), spec=spec, global_batch=4, device=CPU)
    assert next(network.parameters()) is network.odd
    assert all(weight.data_ptr() % 16 == 0 for weight in network.parameters() if weight.numel() % 8 == 0)
    assert {piece.name for (pieces,) in [engine.layout()] for piece in pieces} == set(engine.shapes())


def test_adamw_goes_on_from_torchs_state_and_back() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(5, 7), torch.randn(3)]
    mixed, plain = ([torch.nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    takers = [optimizers.AdamW(mixed, **settings), torch.optim.AdamW(mixed, fused=True, **settings)]
    takers[1].state = takers[0].state
    alone = torch.optim.AdamW(plain, **settings)
    for step in range(6):
        for weight, other in zip(mixed, plain, strict=True):
            weight.grad = other.grad = torch.randn_like(weight)
        takers[step % 2].step()
        alone.step()
    for weight, other in zip(mixed, plain, strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


def test_stages_follow_each_other_and_export(tmp_path: Path, monkeypatch) -> None:
    config = get_recipe("vavae-f16d32-dinov2-debug")
    assert isinstance(config, TokenizerConfig) and len(config.stages) == 3
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(tmp_path)))
    starts = []
    original = tokenizer._build

    def build(*args: Any) -> tokenizer.Networks:
        networks = original(*args)
        assert networks.discriminator is not None
        starts.append((args[0].loss, _state(networks.model), _state(networks.discriminator)))
        return networks

    monkeypatch.setattr(tokenizer, "_build", build)
    assert tokenizer.train(config) == tmp_path
    for index in (1, 2):
        loss, model, discriminator = starts[index]
        assert (loss.vf_weight, loss.cos_margin) == (config.stages[index].vf_weight, config.stages[index].cos_margin)
        before = newest(tmp_path / f"stage-{index}")
        assert same(model, Shares(before, "model").whole(WEIGHTS))
        assert same(discriminator, Shares(before, "discriminator").whole(WEIGHTS))
        assert not same(model, starts[index - 1][1])

    final, _ = runs.read_weights(tmp_path)
    final.pop("linear_proj.weight")
    assert same(export.load_autoencoder(tmp_path).state_dict(), final)
    export.load_network(tmp_path).save_pretrained(tmp_path / "exported")
    assert same(Autoencoder.from_pretrained(tmp_path / "exported").state_dict(), final)


def _state(engine: Engine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.state_dict().items()}


def test_a_loader_that_counts_otherwise_ends_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    loader = dit.LatentLoader
    monkeypatch.setattr(dit, "LatentLoader", lambda dataset, size, *rest: loader(dataset, size // 2, *rest))
    assert cli.main(["train", *GENERATOR, "--run.out", str(tmp_path)]) == 1
    assert "from 0 to 4 images and the loader's own from 0 to 2" in capsys.readouterr().err
    assert publish.newest(tmp_path / "checkpoints") is None


def test_a_start_is_quiet(tmp_path: Path) -> None:
    arguments = ["train", "lightningdit-b-debug", "--run.out", str(tmp_path / "run"), "--engine.zero-stage", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "vadit", *arguments], capture_output=True, text=True, env=environment(), timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    told = [
        line
        for line in done.stderr.splitlines()
        if line and not line.startswith(("train ", "  run folder ", "  latents of ", "  engine."))
    ]
    assert told == []


WORKER = Path(__file__).parent / "training_worker.py"
STAGES = (1, 2, 3)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders dit-K and tokenizer-K of two processes at ZeRO K, and two resumed ones, from one launch."""
    out = tmp_path_factory.mktemp("ranks")
    done = launch_two(WORKER, "ranks", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out


@pytest.mark.parametrize("zero_stage", STAGES)
def test_generator_on_two_processes_is_one_of_the_same_batch(zero_stage: int, ranks: Path) -> None:
    expected, weights = plain_dit(tiny_dit(ranks), world_size=2)
    assert logged(ranks / f"dit-{zero_stage}") == pytest.approx(expected, rel=1e-5)
    state, path = read_weights(ranks / f"dit-{zero_stage}")
    assert len(list(path.glob("model-*-of-00002.safetensors"))) == 2
    assert state.keys() == weights.keys()
    for name, value in weights.items():
        assert (state[name] - value).norm() <= 1e-3 * value.norm() + 1e-3, name


@pytest.mark.parametrize("zero_stage", STAGES)
def test_tokenizer_on_two_processes_is_one_of_the_same_batch(zero_stage: int, ranks: Path) -> None:
    expected, expected_disc = plain_tokenizer(tiny_tokenizer(ranks, steps=2), world_size=2)
    folder = ranks / f"tokenizer-{zero_stage}"
    assert logged(folder) == pytest.approx(expected, rel=1e-4)
    assert logged(folder, "step") == [1, 2]  # one log, by the main process
    last = (folder / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["disc"] == pytest.approx(expected_disc[0], rel=1e-4)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_many_buckets_are_as_one(zero_stage: int, ranks: Path) -> None:
    found, expected = (logged(ranks / f"dit-{zero_stage}{name}") for name in ("-buckets", ""))
    assert found == pytest.approx(expected, rel=1e-6)
    folders = (ranks / f"dit-{zero_stage}{name}" for name in ("-buckets", ""))
    sizes = [json.loads((folder / "deepspeed.json").read_text()) for folder in folders]
    few, many = (size["model"]["zero_optimization"]["reduce_bucket_size"] for size in sizes)
    assert few == 5_000 and many > 10 * few


@pytest.mark.parametrize("network", ["dit", "tokenizer"])
def test_two_processes_go_on_to_the_bit(network: str, ranks: Path) -> None:
    assert_same_end(ranks / f"{network}-resumed" / "killed", ranks / f"{network}-resumed" / "straight")


def test_a_process_that_dies_between_two_stages_is_named(tmp_path: Path) -> None:
    codes, said = run_ranks([sys.executable, str(WORKER), "dies_between_stages", str(tmp_path)])
    assert codes[0] in (1, HANG_CODE) and codes[1] == -9, said[0]
    assert "rank 1 is gone" in said[0]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_look_of_two_processes_is_what_the_checkpoint_draws(zero_stage: int, ranks: Path) -> None:
    run = ranks / f"dit-{zero_stage}"
    (line,) = (json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines())
    config = tiny_dit(run)
    network, autoencoder = load_generator(run, 0.9), load_autoencoder(ranks / f"tokenizer-{zero_stage}")
    sampler = quick_sampler(config.sample, LOOK)
    with torch.no_grad():
        parts = draw(network, sampler, num_samples=70, flow=config.flow)
        images = torch.cat([decode(autoencoder, part.latents) for part in parts])
    found = np.asarray(Image.open(run / line["grid"])).astype(int)
    expected = np.asarray(image_grid(channels_last(images).numpy())).astype(int)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1  # attention of other kernels, perhaps
    assert np.mean(found == expected) > 0.999
    shares = [json.loads(line)["comm_share"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 < share < 1 for share in shares)

"""Benchmarks of the training step: what a row says, that rows are compared and projected soundly, bytes and rings."""

import contextlib
import copy
import csv
import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vadit.config import DiTSpec, EngineSpec, OptimizerSpec, SampleSpec, vary
from vadit.estimate.flops import dit_flops
from vadit.kernels import dispatch
from vadit.kernels.testing import relative_error
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.sampling.solvers import sample_ode
from vadit.train import dit
from vadit.train.checkpoint.checkpoints import Position
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODULES = (
    "bench_step", "step_timing", "plain_engine", "plain_networks", "convergence", "scaling", "scaling_validation",
    "harness",
)  # fmt: skip


@pytest.fixture
def load(monkeypatch) -> Iterator[Any]:
    """A benchmark's module by name, as its script finds it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


CASE = {
    "recipe": "lightningdit-b-debug", "batch": 4, "precision": None, "compile": None, "kernels": "auto",
    "engine": "torch", "data": "resident", "settings": (), "device": "cpu", "threads": 1, "rounds": 5, "warmup": 1,
}  # fmt: skip


def step_row(**changes: Any) -> dict[str, str]:
    """A line of steps-*.csv: 128 images in a step of half a second, a tenth of it in the optimizer."""
    values = {
        "date": "2026-01-01", "commit": "aaaaaaa", "device": "cuda", "hardware": "nvidia-h100", "processes": 1,
        "threads": 1, "versions": "torch 2", "recipe": "lightningdit-xl-64ep", "trainer": "dit",
        "engine": "deepspeed ZeRO 1", "precision": "autocast", "compile": True, "kernels": "auto", "batch": 128,
        "settings": "", "data": "resident", "images_per_s": 256.0, "q1_images_per_s": 250.0, "q3_images_per_s": 260.0,
        "step_ms": 500.0, "forward_ms": 150.0, "backward_ms": 300.0, "optimizer_ms": 50.0, "data_ms": 0.0,
        "peak_gib": 40.0, "gflops_per_image": 714.0, "tflops_per_s": 183.0, "matmul_tflops_per_s": 700.0,
        "share_of_matmul": 0.26, "share_of_peak": "" if changes.get("device") == "cpu" else 0.19, "rounds": 15,
        "steps": 15,
    }  # fmt: skip
    return {name: str(value) for name, value in (values | changes).items()}


class Clock:
    """A clock that stands still but for what it is set to."""

    def __init__(self, scale: float) -> None:
        self.now, self.scale = 0.0, scale

    def __call__(self) -> float:
        return self.now

    def pass_ms(self, milliseconds: float) -> None:
        self.now += milliseconds / 1e3 * self.scale


@pytest.mark.parametrize("scale", [1.0, 0.1], ids=["a step a round", "four steps a round"])
@pytest.mark.parametrize("data", ["resident", "loader"])
def test_parts_of_a_step_are_where_its_time_went(load: Any, monkeypatch, data: str, scale: float) -> None:
    timing = load("step_timing")
    clock = Clock(scale)
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    monkeypatch.setattr(timing, "_product", lambda precision, device: lambda: 1.0)

    def stream() -> Iterator[torch.Tensor]:
        while True:
            clock.pass_ms(3)
            yield torch.zeros(2)

    engines = {
        name: SimpleNamespace(backward=lambda: clock.pass_ms(20), begin_step=lambda lr: None) for name in ("a", "b")
    }
    guard, ema = (
        SimpleNamespace(step=lambda: clock.pass_ms(7)),
        SimpleNamespace(begin_step=lambda step: None, update=lambda: clock.pass_ms(5)),
    )

    def step(batches: Iterator[Any], position: Any) -> None:
        for _ in range(2):
            next(batches)
            clock.pass_ms(10)
            for engine in engines.values():
                engine.backward()
            guard.step()
        ema.update()

    loader = SimpleNamespace(stream=stream)
    task = SimpleNamespace(engines=engines, guard=guard, ema=ema, loader=loader, step=step)
    found = timing.measure(
        task, precision="fp32", device=torch.device("cpu"), resident=data == "resident", rounds=5, warmup=1
    )
    waited = 6.0 if data == "loader" else 0.0
    for name, expected in (("data", waited), ("forward", 20), ("backward", 80), ("optimizer", 19)):
        assert found.parts_ms[name] == pytest.approx([expected * scale] * 5), name
    assert found.step_s == pytest.approx([(119 + waited) / 1e3 * scale] * 5)
    assert found.steps == (5 if scale == 1 else 20) and found.peak_gib > 0


def test_a_row_follows_from_what_was_measured(load: Any) -> None:
    bench = load("bench_step")
    case = bench.Case(**{**CASE, "engine": "deepspeed", "settings": ("engine.gradient_accumulation=2",)})
    config = bench.configure(case, Path("unused"))
    parts = {"forward": [50.0], "backward": [100.0], "optimizer": [40.0], "data": [10.0]}
    row = bench.row_of(case, config, bench.Measured([0.1, 0.2, 0.2, 0.2, 0.4], parts, [0.5], 5, 1.5))
    assert list(row) == list(step_row())
    assert (row["images_per_s"], row["step_ms"]) == (2 * 4 / 0.2, 200)
    assert row["q1_images_per_s"] < row["images_per_s"] < row["q3_images_per_s"]
    assert row["gflops_per_image"] == pytest.approx(3 * dit_flops(config.model) / 1e9, abs=1e-3)
    assert row["tflops_per_s"] == pytest.approx(row["gflops_per_image"] * 40 / 1e3, rel=0.05)
    assert row["matmul_tflops_per_s"] == pytest.approx(2 * 1024**3 / 0.5 / 1e12, abs=1e-5)
    assert row["share_of_matmul"] == pytest.approx(row["tflops_per_s"] / row["matmul_tflops_per_s"], rel=0.05)
    assert (row["forward_ms"], row["backward_ms"], row["optimizer_ms"], row["data_ms"]) == (50, 100, 40, 10)
    assert (row["engine"], row["trainer"], row["share_of_peak"]) == ("deepspeed ZeRO 0", "dit", None)


def test_settings_of_a_case_reach_the_config(load: Any, tmp_path: Path) -> None:
    bench = load("bench_step")
    case = bench.Case(
        **{**CASE, "precision": "bf16", "compile": True, "settings": ("model.qk_norm=true", "engine.attention=math")}
    )
    config = bench.configure(case, tmp_path)
    assert (config.engine.precision, config.engine.compile, config.engine.attention) == ("bf16", True, "math")
    assert config.model.qk_norm and config.run.batch_size == 4 and config.data.path == "debug:16"
    for wrong in ("model.qk_nrm=true", "modl.qk_norm=true", "qk_norm"):
        pytest.raises(SystemExit, bench.override, config, wrong).match("no setting")
    tokenizer = bench.configure(bench.Case(**{**CASE, "recipe": "vavae-f16d32-dinov2"}), tmp_path)
    assert tokenizer.loss.disc_start_step == 1 and not tokenizer.stages and tokenizer.foundation.weights == "random"
    assert Path(tokenizer.loss.vgg_weights or "").is_file()


def test_a_day_with_a_gpu_is_rehearsed_on_a_bare_machine(tmp_path: Path) -> None:
    # What a machine for measurements may lack must not be needed.
    lacking = ["deepspeed", "pydantic", "tyro", "torch_fidelity", "lpips", "torchao", "ffcv", "flash_attn", "diffusers"]
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {lacking}:\n    sys.modules[name] = None\n")
    sanitizer = tmp_path / "bin/compute-sanitizer"  # stands for the program, and runs what it is asked to watch
    sanitizer.parent.mkdir()
    sanitizer.write_text('#!/bin/sh\nshift 2\n"$@" || exit 1\nexit ${FOUND:-0}\n')
    sanitizer.chmod(0o755)
    results = tmp_path / "results"
    environment = os.environ | {
        "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "PATH": f"{sanitizer.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1", "VADIT_RESULTS": str(results),
        "TORCHDYNAMO_DISABLE": "1",  # inductor takes most of a minute, and other tests run it
    }  # fmt: skip

    def rehearse(*parts: str) -> tuple[int, dict[str, list[str]]]:
        command = ["bash", str(BENCHMARKS / "gpu_day.sh"), "--rehearse", *parts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
        (folder,) = results.glob("gpu-day-*")
        lines = [line.split(maxsplit=3) for line in (folder / "summary.txt").read_text().splitlines()[1:]]
        assert all((folder / f"{part}.log").exists() for part, *_ in lines), done.stderr
        return done.returncode, {part: rest for part, *rest in lines}

    code, parts = rehearse()
    logs = "".join(path.read_text() for path in results.glob("*/*.log"))
    assert code == 0 and {result for *_, result in parts.values()} == {"done"}, logs[-5000:]
    kernels, samples, steps = ([*csv.DictReader(path.open())] for path in sorted(results.glob("[ks]*.csv")))
    assert {row["op"] for row in kernels} == set(dispatch.OPS)
    assert {row["contender"] for row in kernels} >= {"eager", "compile", "triton", "copy"}
    assert [(row["trainer"], row["engine"], row["precision"]) for row in steps] == [
        ("dit", "torch", "autocast"), ("dit", "plain", "autocast"), ("dit", "torch", "bf16"),
        ("tokenizer", "torch", "bf16"),
    ]  # fmt: skip
    assert list(steps[0]) == list(step_row()) and all(float(row["images_per_s"]) > 0 for row in steps)
    exact, rounded = (float(row["difference"]) for row in samples)
    assert exact < 1e-6 < rounded < 0.1 and [row["precision"] for row in samples] == ["fp32", "bf16"]
    counts = [int(parts[part][1]) for part in ("kernels", "steps", "samples", "tokenizer")]
    assert counts == [len(kernels), 3, 2, 1]
    environment["FOUND"] = "3"
    code, parts = rehearse("sanitizer", "build")
    assert code == 1 and [result for *_, result in parts.values()] == ["FAILED", "done"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_plain_network_step_and_sampler_are_ours(load: Any, qk_norm: bool) -> None:
    plain = load("plain_networks")
    config = get_recipe("lightningdit-xl-64ep-debug")
    # two patches a side and an average that moves
    config = vary(config, model={"qk_norm": qk_norm, "patch_size": 2},
                  engine={"ema_decays": (0.5,), "zero_stage": 1},
                  optimizer={"lr": 1e-3})  # fmt: skip
    torch.manual_seed(0)
    ours, cpu = LightningDiT(config.model), torch.device("cpu")
    for weight in ours.parameters():  # the last layers start at zero, which would hide all before them
        torch.nn.init.normal_(weight, std=0.2)
    training = plain.PlainTraining(config, ours.state_dict(), cpu)
    network = copy.deepcopy(training.network).eval()
    noise, labels = torch.randn(3, 32, 4, 4), torch.tensor([0, 9, 10])
    with torch.no_grad():
        expected, found = (each(noise, torch.tensor([0.1, 0.5, 0.9]), labels) for each in (ours.eval(), network))
    assert relative_error(found, expected) < 1e-6
    spec = SampleSpec(num_steps=9, timestep_shift=0.3, cfg_scale=4.0, cfg_interval=(0.11, 1.0), cfg_channels=3)
    found = plain.plain_samples(network, noise, labels, spec)
    assert relative_error(found, sample_ode(ours, noise, labels, spec)) < 1e-5

    engine = Engine(ours.train(), optimizer=config.optimizer, spec=config.engine, global_batch=4, device=cpu,
                    forward=ours.forward_features)  # fmt: skip
    ema, guard = ShardedEMA(engine, (0.5,)), SimpleNamespace(step=lambda engines: engines["model"].step())

    def our_step(batches: Iterator[Any], position: Position) -> float:
        ema.begin_step(position.step)
        return dit.train_step(engine, ema, guard, config, batches, position)["loss"].item()  # type: ignore[arg-type]

    losses = []
    for step in (our_step, training.step):
        torch.manual_seed(1)
        for number in range(3):
            engine.begin_step(1e-3)
            losses.append(step(itertools.repeat((noise, labels)), Position(number, 4 * number)))
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-5) and abs(losses[0] - losses[1]) > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_a_step_in_plain_torch_is_the_engines(load: Any, precision: str, max_grad_norm: float) -> None:
    plain = load("plain_engine").without_deepspeed
    settings = {"precision": precision, "max_grad_norm": max_grad_norm, "gradient_accumulation": 2, "ema_decays": ()}
    model = DiTSpec(input_size=4, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=3)
    weights, norms = [], []
    for stage, kind in ((1, contextlib.nullcontext), (0, plain)):
        torch.manual_seed(0)
        network = LightningDiT(model).train()
        torch.nn.init.normal_(network.final_layer.linear.weight, std=0.1)
        with kind():
            engine = Engine(
                network,
                optimizer=OptimizerSpec(lr=1e-2, weight_decay=0.1),
                spec=EngineSpec(zero_stage=stage, **settings),
                global_batch=4,
                device=torch.device("cpu"),
            )
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            engine.begin_step(1e-2)
            for _ in range(2):
                x = torch.randn(2, 4, 4, 4, generator=generator).to(engine.compute_dtype())
                y, drop = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.bool)
                engine.backward(engine(x, torch.rand(2, generator=generator), y, drop).float().square().mean())
                engine.step()
        weights.append(torch.cat([value.detach().float().flatten() for value in engine.module.parameters()]))
        norms.append(engine.grad_norm())
    # Adam's step has the size of the rate, whatever the gradient: where that is all rounding, its sign may differ.
    far = (weights[0] - weights[1]).abs() > (1e-5 if precision == "fp32" else 1e-2)
    assert far.float().mean() < 0.002
    assert norms[1] == pytest.approx(norms[0], rel=1e-4 if precision == "fp32" else 0.05)


def test_rows_with_other_columns_are_not_appended(load: Any, tmp_path: Path) -> None:
    harness = load("harness")
    path = tmp_path / "rows.csv"
    harness.append(path, [{"speed": 1}])
    harness.append(path, [{"speed": 2}, {"speed": 3}])
    before = path.read_text()
    assert before == "speed\n1\n2\n3\n"
    pytest.raises(ValueError, harness.append, path, [{"pace": 4}]).match("columns")
    assert path.read_text() == before


def test_published_rates_are_those_of_their_sources(load: Any) -> None:
    convergence = load("convergence")
    lines = {row.system: convergence.of_published(row) for row in convergence.PUBLISHED}
    rates = {"LightningDiT-XL/1, log": 170, "LightningDiT-XL/1, headline": 284, "MaskDiT-XL/2": 273}
    for system, rate in (rates | {"fast-DiT, DiT-XL/2": 107}).items():
        assert lines[system]["img_per_s_per_gpu"] == pytest.approx(rate, abs=0.6), system
    headline = lines["LightningDiT-XL/1, headline"]
    assert headline["hours_8"] == 10 and headline["hours_8_origin"] == "published"
    assert headline["hours_64"] == pytest.approx(1.25) and headline["hours_64_origin"] == "projected"
    # 284 images of 3 x 238 GFLOP at 989 TFLOP/s
    assert headline["share_of_roofline"] == pytest.approx(284.4 * 3 * dit_flops(DiTSpec()) / 989e12, rel=1e-3)
    assert lines["LightningDiT-XL/1, log"]["share_of_roofline"] == ""  # on hardware that is not named
    assert {line["origin"] for line in lines.values()} == {"published"}


def test_a_cpu_never_becomes_gpus(load: Any) -> None:
    convergence = load("convergence")
    row = step_row(device="cpu", hardware="a-cpu", processes=2)
    line = convergence.of_measured(row, convergence.scaling.Cluster())
    assert line["origin"] == "measured" and line["img_per_s_per_gpu"] == 128 and "a-cpu" in line["hardware"]
    assert line["hours_8"] == line["hours_8_origin"] == "" and line["share_of_roofline"] == 0.26
    assert convergence.of_measured(step_row(), convergence.scaling.Cluster())["share_of_roofline"] == 0.19


def test_measured_steps_are_projected_with_the_messages_of_many(load: Any) -> None:
    convergence = load("convergence")
    scaling = convergence.scaling
    free = scaling.Cluster(nvlink_gbs=math.inf, link_gbs=math.inf, nvlink_us=0, link_us=0)
    line = convergence.of_measured(step_row(), free)
    # 80,000 steps of 1024 images: on 8 GPUs one micro-batch of 128 each, as measured
    assert line["hours_8"] == pytest.approx(80_000 * 0.5 / 3600)
    # on 64 GPUs 16 images each: an eighth of the arithmetic, the whole optimizer
    assert line["hours_64"] == pytest.approx(80_000 * (0.45 / 8 + 0.05) / 3600)
    origins = [line[f"hours_{gpus}_origin"] for gpus in (8, 64, 256)]
    assert origins == ["projected", *["projected, better than can be"] * 2]
    smaller = convergence.of_measured(step_row(batch=32, images_per_s=64.0), free)
    assert smaller["hours_8"] == pytest.approx(80_000 * (4 * 0.45 + 0.05) / 3600)
    assert smaller["hours_8_origin"] == "projected"
    slow = scaling.Cluster(overlap=0.5)
    sent = scaling.messages_s(get_recipe("lightningdit-xl-64ep"), 1, 64, slow) * 0.5
    later = convergence.of_measured(step_row(), slow)
    assert later["hours_64"] - line["hours_64"] == pytest.approx(80_000 * sent / 3600)
    # what eight processes sent is in their step
    already = convergence.of_measured(step_row(processes=8, images_per_s=2048.0), slow)
    assert already["hours_8"] == pytest.approx(line["hours_8"])
    assert not convergence.of_measured(step_row(recipe="vavae-f16d32-dinov2"), slow)["hours_8"]


def test_the_table_has_the_newest_rows_and_the_origin_of_every_number(load: Any, tmp_path: Path) -> None:
    convergence = load("convergence")
    rows = [step_row(images_per_s=200, commit="old"), step_row(), step_row(device="cpu", hardware="c")]
    rows += [step_row(trainer="tokenizer"), step_row(recipe="lightningdit-b-debug")]
    load("harness").write(tmp_path / "steps-a.csv", rows)
    found = convergence.newest(tmp_path)
    assert [(row["device"], float(row["images_per_s"])) for row in found] == [("cuda", 256), ("cpu", 256)]
    cluster = convergence.scaling.Cluster()
    model = convergence.modelled("lightningdit-xl-64ep", cluster)
    assert model["share_of_roofline"] == pytest.approx(cluster.mfu, rel=0.1)
    lines = [*map(convergence.of_published, convergence.PUBLISHED), model]
    for line in [*lines, *(convergence.of_measured(row, cluster) for row in found)]:
        assert line["origin"] in convergence.MARKS and line["source"]
        for gpus in convergence.GPUS:
            assert bool(line[f"hours_{gpus}"]) == (line[f"hours_{gpus}_origin"] in convergence.MARKS)


@pytest.mark.parametrize(
    ("stage", "accumulation"),
    [
        pytest.param(1, 1, id="ZeRO 1"),
        pytest.param(3, 2, marks=pytest.mark.faults, id="ZeRO 3, two micro-batches"),
        pytest.param(0, 1, marks=pytest.mark.faults, id="ZeRO 0"),
        pytest.param(2, 2, marks=pytest.mark.faults, id="ZeRO 2, two micro-batches"),
        pytest.param(3, 1, marks=pytest.mark.faults, id="ZeRO 3"),
    ],
)
def test_bytes_are_what_two_processes_send(stage: int, accumulation: int, load: Any) -> None:
    rows = load("scaling_validation").compare(stage, "fp32", accumulation)
    assert {row["what"] for row in rows} >= {"bytes of all_gather" if stage else "bytes of all_reduce"}
    for row in rows:
        # ZeRO 3 pads each weight to the number of processes, and flags below 4 KiB are not counted.
        assert row["formula"] == pytest.approx(row["measured"], rel=0.005 if stage == 3 else 0), row


def test_rings(load: Any) -> None:
    scaling = load("scaling")
    cluster = scaling.Cluster(nvlink_gbs=100, link_gbs=10, nvlink_us=0, link_us=0)
    # Each of 8 GPUs receives 7 eighths; over 2 nodes the 8 adapters of a node carry 15 sixteenths together.
    assert cluster.collective_s(8e9, 8) == pytest.approx(7e9 / 100e9)
    assert cluster.collective_s(16e9, 16) == pytest.approx(15e9 / 80e9)
    assert cluster.collective_s(16e9, 16, passes=2) == pytest.approx(30e9 / 80e9)
    slow = scaling.Cluster(nvlink_us=1, link_us=10)
    assert slow.collective_s(0, 16) == pytest.approx((14 * 1 + 2 * 10) * 1e-6)


def test_a_step_is_arithmetic_optimizer_and_what_nothing_hides(load: Any) -> None:
    scaling = load("scaling")
    config = get_recipe("lightningdit-xl-64ep")
    cluster = scaling.Cluster(peak_tflops=1000, mfu=0.5, memory_gbs=1000, nvlink_us=0, overlap=0.25)
    row = scaling.step(config, cluster, 1, 8, 100)
    weights = scaling.num_weights(config.model, config.mask)
    assert weights == pytest.approx(675e6, rel=0.01)
    assert row["arithmetic_ms"] == pytest.approx(100 * 3 * 237.25e9 / 500e12 * 1e3, rel=1e-3)
    assert row["optimizer_ms"] == pytest.approx(weights / 8 * 36 / 1e12 * 1e3)
    # autocast: bf16 gradients all-reduced, fp32 weights gathered
    assert row["messages_ms"] == pytest.approx((2 * 2 + 4) * weights * 7 / 8 / 360e9 * 1e3, rel=1e-3)
    hidden = row["arithmetic_ms"] + row["optimizer_ms"] + 0.75 * row["messages_ms"]
    assert row["step_ms"] == pytest.approx(hidden) and row["images_per_s"] == pytest.approx(800 / hidden * 1e3)
    low = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    assert scaling.messages_s(low, 1, 8, cluster) / scaling.messages_s(config, 1, 8, cluster) == pytest.approx(6 / 8)
    assert scaling.step(config, cluster, 1, 8, 1)["arithmetic_ms"] == cluster.launch_ms

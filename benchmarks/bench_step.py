"""Training steps per second of either trainer, for any recipe: python benchmarks/bench_step.py [--recipe NAME ...].

    python benchmarks/bench_step.py --recipe lightningdit-xl-64ep --batch 64 128 --compile off on
    torchrun --nproc-per-node 8 benchmarks/bench_step.py --recipe lightningdit-xl-64ep --batch 128
    PYTHONPATH=. python benchmarks/bench_step.py       a bare checkout: torch, rich, safetensors; timm for tokenizers

What is measured is the trainer's own step: `vadit.train` builds its networks, engine and loader as for a run, and this
script takes the place of the loop. Without DeepSpeed, or with --engine torch, `plain_engine` takes the engine's place;
the row says which. Every combination of the settings is measured in a process of its own, --repeats times in turns.

A round is one or more steps between two looks at the clock (on a GPU, waits for it). Parts: data is the wait for the
next batch; backward and optimizer are those calls, with the messages in them and the averages; forward is the rest:
noise, networks, losses, frozen networks. By default one batch stays in the device's memory (--data resident): no data
is waited for. --data loader reads made-up data through the run's loader, --data PATH real data.
Weights of frozen networks are random, a tokenizer's discriminator counts from the first step, stages are left out.

share_of_matmul is FLOPs of the step's products (vadit.estimate.flops; nothing for recomputed activations) over the
speed of one large product in the step's precision, measured in turns with the rounds: the machine's roofline then.
share_of_peak is the same over the data sheet's speed. Both are left out where masks end in mid-run.
peak_gib is what torch allocated on a GPU, on a CPU the process's resident peak. Rows: results/steps-HARDWARE.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from step_timing import SIDE, Measured, measure

from vadit.config import Config, DiTConfig, TokenizerConfig
from vadit.estimate.flops import named_peak, tracked_flops
from vadit.kernels import dispatch
from vadit.recipes import get_recipe
from vadit.runtime import distributed

RECIPES = {
    "cpu": ("lightningdit-b-debug", "vavae-f16d32-dinov2-debug"),
    "cuda": ("lightningdit-xl-64ep", "vavae-f16d32-dinov2"),
}
"""What is measured where no recipe is named."""
BATCH = {"cpu": 4, "cuda": 32}
SOURCES = ("../csrc", "../kernels", "../vadit", "../benchmarks/*.py")


@dataclass(frozen=True)
class Case:
    """One combination of settings."""

    recipe: str
    batch: int
    """Images per process and micro-batch."""
    precision: str | None
    compile: bool | None
    kernels: str
    engine: str
    """deepspeed or torch."""
    data: str
    settings: tuple[str, ...]
    """Further settings, as section.name=value."""
    device: str
    threads: int
    rounds: int
    warmup: int


@dataclass(frozen=True)
class Row:
    """One line of the CSV; times are medians over rounds, per optimizer step. Images are of all processes."""

    date: str
    commit: str
    device: str
    hardware: str
    processes: int
    threads: int
    versions: str
    recipe: str
    trainer: str
    engine: str
    precision: str
    compile: bool
    kernels: str
    batch: int
    """Images per process and micro-batch."""
    settings: str
    data: str
    images_per_s: float
    q1_images_per_s: float
    q3_images_per_s: float
    step_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    data_ms: float
    peak_gib: float
    gflops_per_image: float | None
    """None, and so are the shares, where masks end in mid-run: no one number counts the steps."""
    tflops_per_s: float | None
    """Of one process."""
    matmul_tflops_per_s: float
    share_of_matmul: float | None
    share_of_peak: float | None
    """Of the GPU's dense bf16 speed by its data sheet; None for a CPU, or a GPU that is not known."""
    rounds: int
    steps: int


# ------------------------------------------------------------------------------------------------ settings


def configure(case: Case, folder: Path) -> Config:
    """The recipe's config with the case's settings, on data that it makes or reads, with random frozen networks."""
    config = get_recipe(case.recipe)
    for setting in case.settings:
        config = override(config, setting)
    engine = config.engine
    if case.precision is not None:
        engine = dataclasses.replace(engine, precision=case.precision)  # type: ignore[arg-type]
    if case.compile is not None:
        engine = dataclasses.replace(engine, compile=case.compile)
    path = f"debug:{4 * case.batch}" if case.data in ("resident", "loader") else case.data
    run = dataclasses.replace(
        config.run,
        out=str(folder),
        batch_size=case.batch * distributed.world_size() * engine.gradient_accumulation,
        device=case.device,  # type: ignore[arg-type]
        init_from=None,
    )
    data = dataclasses.replace(config.data, path=path)
    if isinstance(config, DiTConfig):
        # features of frozen networks come from a network of random weights, where they are made online
        repa = dataclasses.replace(
            config.repa, foundation=dataclasses.replace(config.repa.foundation, weights="random")
        )
        return dataclasses.replace(config, engine=engine, run=run, data=data, repa=repa)
    loss = dataclasses.replace(config.loss, disc_start_step=1)
    if loss.perceptual_weight > 0:
        loss = dataclasses.replace(loss, vgg_weights=str(_random_vgg(folder)))
    foundation = dataclasses.replace(config.foundation, weights="random")
    return dataclasses.replace(config, engine=engine, run=run, data=data, loss=loss, foundation=foundation, stages=())


def override(config: Config, setting: str) -> Config:
    """`config` with section.name=value; the value is JSON, or else a string."""
    name, _, text = setting.partition("=")
    section, _, field = name.partition(".")
    part = getattr(config, section, None)
    if not dataclasses.is_dataclass(part) or field not in {each.name for each in dataclasses.fields(part)}:
        raise SystemExit(f"--with {setting}: {config.kind} has no setting {name}; write section.name=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    value = tuple(value) if isinstance(value, list) else value
    return dataclasses.replace(config, **{section: dataclasses.replace(part, **{field: value})})  # type: ignore[type-var]


def _random_vgg(folder: Path) -> Path:
    """A file of VGG16's layers with random weights: LPIPS takes as long with these."""
    from vadit.models.lpips import _vgg_features

    path = folder / "vgg16-random.pth"
    torch.save({f"features.{name}": value for name, value in _vgg_features().state_dict().items()}, path)
    return path


# ------------------------------------------------------------------------------------------------ one case


def run(case: Case) -> Row:
    """Build the trainer of one case and measure it, in this process."""
    torch.set_num_threads(case.threads)
    from vadit.train import loop, runs

    with tempfile.TemporaryDirectory() as name, dispatch.setting(case.kernels):
        folder = Path(name)
        config = configure(case, folder)
        found: list[Measured] = []

        def instead_of_loop(task: Any, *_: Any, device: torch.device, **__: Any) -> None:
            found.append(
                measure(
                    task,
                    precision=config.engine.precision,
                    device=device,
                    resident=case.data == "resident",
                    rounds=case.rounds,
                    warmup=case.warmup,
                )
            )

        with mock.patch.object(loop, "run", instead_of_loop), mock.patch.object(runs, "open_folder", lambda _: folder):
            if isinstance(config, TokenizerConfig):
                from vadit.train import tokenizer as trainer
            else:
                from vadit.train import dit as trainer  # type: ignore[no-redef]
            if case.engine == "torch":
                from plain_engine import PlainEngine

                with mock.patch.object(trainer, "Engine", PlainEngine):
                    trainer.train(config)  # type: ignore[arg-type]
            else:
                trainer.train(config)  # type: ignore[arg-type]
        (measured,) = found
        return row_of(case, config, measured)


def row_of(case: Case, config: Config, measured: Measured) -> Row:
    """The line of the CSV."""
    world, accumulation = distributed.world_size(), config.engine.gradient_accumulation
    images = case.batch * world * accumulation
    fast, middle, slow = statistics.quantiles(measured.step_s, n=4)
    flops = tracked_flops(config)
    peak = named_peak(torch.cuda.get_device_name()) if case.device == "cuda" else None
    matmul = 2 * SIDE[case.device] ** 3 / statistics.median(measured.matmul_s) / 1e12
    achieved = None if flops is None else flops * images / world / middle / 1e12
    parts = {name: round(statistics.median(values), 3) for name, values in measured.parts_ms.items()}
    zero = f" ZeRO {config.engine.zero_stage}" if case.engine == "deepspeed" else ""
    return Row(
        date=datetime.date.today().isoformat(),
        commit=harness.commit(*SOURCES),
        device=case.device,
        hardware=harness.hardware(case.device),
        processes=world,
        threads=case.threads,
        versions=harness.versions(case.device, "deepspeed"),
        recipe=case.recipe,
        trainer=config.kind,
        engine=f"{case.engine}{zero}",
        precision=config.engine.precision,
        compile=config.engine.compile,
        kernels=case.kernels,
        batch=case.batch,
        settings=" ".join(case.settings),
        data="loader of " + case.data if case.data not in ("resident", "loader") else case.data,
        images_per_s=round(images / middle, 3),
        q1_images_per_s=round(images / slow, 3),
        q3_images_per_s=round(images / fast, 3),
        step_ms=round(middle * 1e3, 3),
        forward_ms=parts["forward"],
        backward_ms=parts["backward"],
        optimizer_ms=parts["optimizer"],
        data_ms=parts["data"],
        peak_gib=round(measured.peak_gib, 3),
        gflops_per_image=None if flops is None else round(flops / 1e9, 3),
        tflops_per_s=None if achieved is None else round(achieved, 5),
        matmul_tflops_per_s=round(matmul, 5),
        share_of_matmul=None if achieved is None else round(achieved / matmul, 4),
        share_of_peak=None if achieved is None or peak is None else round(achieved / (peak / 1e12), 4),
        rounds=len(measured.step_s),
        steps=measured.steps,
    )


def show(row: Row) -> None:
    """Print one row."""
    share = "" if row.share_of_matmul is None else f", {row.share_of_matmul:.0%} of a large product"
    parts = " + ".join(
        f"{name} {getattr(row, f'{name}_ms'):.1f}" for name in ("data", "forward", "backward", "optimizer")
    )
    print(
        f"{row.recipe} batch {row.batch} x {row.processes} {row.precision}{' compiled' if row.compile else ''} "
        f"{row.kernels} {row.engine}{' ' + row.settings if row.settings else ''}: "
        f"{row.images_per_s:.2f} img/s ({row.q1_images_per_s:.2f}-{row.q3_images_per_s:.2f}), "
        f"{row.step_ms:.1f} ms = {parts}; {row.peak_gib:.2f} GiB{share}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------ command line


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for."""
    engine = options.engine
    if engine == "auto":
        engine = "deepspeed" if importlib.util.find_spec("deepspeed") else "torch"
    switches = {"off": False, "on": True, "recipe": None}
    return [
        Case(
            recipe=recipe,
            batch=batch,
            precision=None if precision == "recipe" else precision,
            compile=switches[compiled],
            kernels=kernels,
            engine=engine,
            data=options.data,
            settings=tuple(options.settings),
            device=options.device,
            threads=options.threads,
            rounds=options.rounds,
            warmup=options.warmup,
        )
        for recipe, batch, precision, compiled, kernels in itertools.product(
            options.recipe or RECIPES[options.device],
            options.batch or (BATCH[options.device],),
            options.precision,
            options.compile,
            options.kernels,
        )
    ]


def in_own_process(case: Case) -> Row | None:
    """Measure one case in a process of its own; None where that failed, which is told."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONSAFEPATH": ""}
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case.recipe} batch {case.batch}: failed\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return None
    return Row(**json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> int:
    """Measure, print and save; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", help="names of recipes; a small generator and tokenizer if left out")
    parser.add_argument("--batch", type=int, nargs="*", help="images per process and micro-batch")
    parser.add_argument("--precision", nargs="*", default=["recipe"], choices=("recipe", "fp32", "bf16", "autocast"))
    parser.add_argument("--compile", nargs="*", default=["recipe"], choices=("recipe", "off", "on"))
    parser.add_argument("--kernels", nargs="*", default=["auto"], choices=dispatch.SETTINGS, help="as VADIT_KERNELS")
    parser.add_argument("--engine", default="auto", choices=("auto", "deepspeed", "torch"))
    parser.add_argument("--data", default="resident", help="resident, loader, or the path of real data")
    parser.add_argument("--with", nargs="*", default=[], dest="settings", metavar="SECTION.NAME=VALUE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--repeats", type=int, default=1, help="measure everything so many times, in turns")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        fields = json.loads(options.case)
        row = run(Case(**{**fields, "settings": tuple(fields["settings"])}))
        print("\n" + json.dumps(dataclasses.asdict(row)))
        return 0
    wanted, failed = cases(options), 0
    launched = distributed.world_size() > 1
    if launched and len(wanted) * options.repeats > 1:
        parser.error("under a launcher one combination is measured at a time")
    for case in wanted * options.repeats:
        row = run(case) if launched else in_own_process(case)
        if row is None:
            failed += 1
        elif distributed.is_main():
            show(row)
            if not options.no_save:
                harness.append(harness.RESULTS / f"steps-{row.hardware}.csv", [row])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

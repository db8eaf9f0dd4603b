"""Training steps per second of either trainer, for any recipe: python benchmarks/bench_step.py [--recipe NAME ...].

    python benchmarks/bench_step.py --recipe lightningdit-xl-64ep --batch 64 128 --compile off on
    torchrun --nproc-per-node 8 benchmarks/bench_step.py --recipe lightningdit-xl-64ep --batch 128
    python benchmarks/bench_step.py --recipe lightningdit-b --batch 8 --threads 2 --contender plain --repeats 3
    PYTHONPATH=. python benchmarks/bench_step.py       a bare checkout: torch, rich, safetensors; timm for tokenizers

What is measured is the trainer's own step: `vadit.train` builds its networks, engine and loader as for a run, and this
script takes the place of the loop. Without DeepSpeed, or with --engine torch, `plain_engine` takes its place, at ZeRO
0; the row says which. Every combination of the settings is measured in a process of its own, --repeats times in turns.
With --contender plain the authors' loop over a network of plain torch modules (`plain_networks`) takes its turn with
each, compiled where that is, and a line at the end prints the ratio of the medians. A generator's, fp32 or autocast.

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
import contextlib
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import torch
from step_timing import SIDE, Measured, measure

from vadit.config import Config, DiTConfig, TokenizerConfig, settled, vary
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
    batch: int  # Images per process and micro-batch.
    precision: str | None
    compile: bool | None
    kernels: str
    engine: str  # deepspeed, torch (vadit's networks without it) or plain (the authors' loop).
    data: str
    settings: tuple[str, ...]  # Further settings, as section.name=value.
    device: str
    threads: int
    rounds: int
    warmup: int


Row = dict[str, Any]  # One line of the CSV, see `row_of`.


# ------------------------------------------------------------------------------------------------ settings


def configure(case: Case, folder: Path) -> Config:
    """The recipe's config with the case's settings, on data that it makes or reads, with random frozen networks."""
    config = get_recipe(case.recipe)
    for setting in case.settings:
        config = override(config, setting)
    if isinstance(config, TokenizerConfig):
        config = vary(config, foundation={"weights": "random"}, loss={"disc_start_step": 1}, stages=())
        if config.loss.perceptual_weight > 0:
            config = vary(config, loss={"vgg_weights": str(_random_vgg(folder))})
    else:  # features of frozen networks come from random weights, where made online
        foundation = dataclasses.replace(config.repa.foundation, weights="random")
        config = vary(config, repa={"foundation": foundation})
    engine = {"precision": case.precision, "compile": case.compile, "zero_stage": 0 if case.engine == "torch" else None}
    images = case.batch * distributed.world_size() * config.engine.gradient_accumulation
    made_up = case.data in ("resident", "loader")
    config = vary(
        config,
        engine={name: value for name, value in engine.items() if value is not None},
        run={"out": str(folder), "batch_size": images, "device": case.device, "init_from": None},
        data={"path": f"debug:{4 * case.batch}" if made_up else case.data},
    )
    return settled(config, processes=distributed.world_size(), device=case.device)


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
    from vadit.models.lpips import vgg_features

    path = folder / "vgg16-random.pth"
    torch.save({f"features.{name}": value for name, value in vgg_features().state_dict().items()}, path)
    return path


# ------------------------------------------------------------------------------------------------ one case


def run(case: Case) -> Row:
    """Build the trainer of one case and measure it, in this process."""
    torch.set_num_threads(case.threads)
    from plain_engine import without_deepspeed

    from vadit.train import loop, runs

    lengths = {"resident": case.data == "resident", "rounds": case.rounds, "warmup": case.warmup}
    with contextlib.ExitStack() as stack:
        stack.enter_context(dispatch.setting(case.kernels))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = configure(case, folder)
        if case.engine == "plain":
            assert isinstance(config, DiTConfig), "cases() asks for generators alone"
            device = torch.device(case.device)
            task = _plain_task(config, device)
            return row_of(case, config, measure(task, precision=config.engine.precision, device=device, **lengths))
        if isinstance(config, TokenizerConfig):
            from vadit.train import tokenizer as trainer
        else:
            from vadit.train import dit as trainer  # type: ignore[no-redef]

            build = _on(case.device, trainer.training_network)
            stack.enter_context(mock.patch.object(trainer, "training_network", build))
        found: list[Measured] = []

        def instead_of_loop(task: Any, **_: Any) -> None:
            device = task.engine.device
            found.append(measure(task, precision=config.engine.precision, device=device, **lengths))

        stack.enter_context(mock.patch.object(loop, "run", instead_of_loop))
        stack.enter_context(mock.patch.object(runs, "check_folder", lambda *_: None))
        if case.engine == "torch":
            stack.enter_context(without_deepspeed())
        trainer.train(config)  # type: ignore[arg-type]
    return row_of(case, config, *found)


def _plain_task(config: DiTConfig, device: torch.device) -> Any:
    """The authors' loop, from the weights that vadit's network starts with."""
    from plain_networks import PlainTraining

    from vadit.models.dit import LightningDiT

    torch.manual_seed(config.run.seed)
    return PlainTraining(config, _on(device, LightningDiT)(config.model).state_dict(), device)


def _on(device: torch.device | str, build: Callable[..., Any]) -> Callable[..., Any]:
    """`build`, whose weights are drawn on the device: those of XL take a CPU ten seconds."""

    def built(*args: Any) -> Any:
        with torch.device(device):
            return build(*args)

    return built


def row_of(case: Case, config: Config, measured: Measured) -> Row:
    """The line of the CSV: times are medians over rounds, per optimizer step. Images are of all processes.

    FLOPs and shares are None where masks end in mid-run: no one number counts the steps. tflops_per_s are those of one
    process, share_of_peak is None for a CPU, or a GPU that is not known.
    """
    world = distributed.world_size()
    images = case.batch * world * config.engine.gradient_accumulation
    fast, middle, slow = statistics.quantiles(measured.step_s, n=4)
    flops = tracked_flops(config)
    peak = named_peak(torch.cuda.get_device_name()) if case.device == "cuda" else None
    matmul = 2 * SIDE[case.device] ** 3 / statistics.median(measured.matmul_s)
    achieved = None if flops is None else flops * images / world / middle
    parts = {name: round(statistics.median(values), 3) for name, values in measured.parts_ms.items()}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": harness.commit(*SOURCES),
        "device": case.device,
        "hardware": harness.hardware(case.device),
        "processes": world,
        "threads": case.threads,
        "versions": harness.versions(case.device, "deepspeed"),
        "recipe": case.recipe,
        "trainer": config.kind,
        "engine": case.engine + f" ZeRO {config.engine.zero_stage}" * (case.engine == "deepspeed"),
        "precision": config.engine.precision,
        "compile": config.engine.compile,
        "kernels": case.kernels,
        "batch": case.batch,
        "settings": " ".join(case.settings),
        "data": case.data if case.data in ("resident", "loader") else f"loader of {case.data}",
        "images_per_s": round(images / middle, 3),
        "q1_images_per_s": round(images / slow, 3),
        "q3_images_per_s": round(images / fast, 3),
        "step_ms": round(middle * 1e3, 3),
        **{f"{name}_ms": parts[name] for name in ("forward", "backward", "optimizer", "data")},
        "peak_gib": round(measured.peak_gib, 3),
        "gflops_per_image": flops and round(flops / 1e9, 3),
        "tflops_per_s": achieved and round(achieved / 1e12, 5),
        "matmul_tflops_per_s": round(matmul / 1e12, 5),
        "share_of_matmul": achieved and round(achieved / matmul, 4),
        "share_of_peak": achieved and peak and round(achieved / peak, 4),
        "rounds": len(measured.step_s),
        "steps": measured.steps,
    }


def show(row: Row) -> None:
    """Print one row."""
    share = "" if row["share_of_matmul"] is None else f", {row['share_of_matmul']:.0%} of a large product"
    parts = " + ".join(f"{name} {row[f'{name}_ms']:.1f}" for name in ("data", "forward", "backward", "optimizer"))
    what = (row["precision"], "compiled" * row["compile"], row["kernels"], row["engine"], row["settings"])
    print(
        f"{row['recipe']} batch {row['batch']} x {row['processes']} {' '.join(filter(None, what))}: "
        f"{row['images_per_s']:.2f} img/s ({row['q1_images_per_s']:.2f}-{row['q3_images_per_s']:.2f}), "
        f"{row['step_ms']:.1f} ms = {parts}; {row['peak_gib']:.2f} GiB{share}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------ command line


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for."""
    engine = options.engine
    if engine == "auto":
        engine = "deepspeed" if importlib.util.find_spec("deepspeed") else "torch"
    switches = {"off": False, "on": True, "recipe": None}
    fixed = {name: getattr(options, name) for name in ("data", "device", "threads", "rounds", "warmup")}
    choices = itertools.product(
        options.recipe or RECIPES[options.device], options.batch or (BATCH[options.device],),
        options.precision, options.compile, options.kernels,
    )  # fmt: skip
    return [
        Case(recipe, batch, None if precision == "recipe" else precision, switches[compiled], kernels, engine,
             settings=tuple(options.settings), **fixed)
        for recipe, batch, precision, compiled, kernels in choices
    ]  # fmt: skip


def contender(case: Case) -> Case:
    """The plain loop that a case is compared with: compiled if asked for by name, autocast where ours is bf16."""
    precision = "autocast" if case.precision == "bf16" else case.precision
    settings = tuple(setting for setting in case.settings if not setting.startswith("engine."))
    return dataclasses.replace(
        case, precision=precision, compile=bool(case.compile), kernels="reference", engine="plain", settings=settings
    )


def compare(found: dict[Case, list[Row]]) -> None:
    """Print the speed of each case over that of its contender."""
    for case, rows in found.items():
        if case.engine != "plain" and (plain := found.get(contender(case))):
            ours, theirs = (statistics.median(row["images_per_s"] for row in each) for each in (rows, plain))
            print(f"{ours / theirs:.2f}x the plain loop ({plain[0]['precision']}): ", end="")
            show(rows[-1])


def in_own_process(case: Case) -> Row | None:
    """Measure one case in a process of its own; None where that failed, which is printed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(case.threads), "PYTHONSAFEPATH": ""}
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case.recipe} batch {case.batch}: failed\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return None
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def main() -> int:
    """Measure, print and save; 1 where a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", help="names of recipes; a small generator and tokenizer if left out")
    parser.add_argument("--batch", type=int, nargs="*", help="images per process and micro-batch")
    parser.add_argument("--precision", nargs="*", default=["recipe"], choices=("recipe", "fp32", "bf16", "autocast"))
    parser.add_argument("--compile", nargs="*", default=["recipe"], choices=("recipe", "off", "on"))
    parser.add_argument("--kernels", nargs="*", default=["auto"], choices=dispatch.SETTINGS, help="as VADIT_KERNELS")
    parser.add_argument("--engine", default="auto", choices=("auto", "deepspeed", "torch"))
    parser.add_argument("--contender", choices=("plain",), help="measure this in turns, too, and print the ratio")
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
        print("\n" + json.dumps(row))
        return 0
    wanted, failed = cases(options), 0
    if options.contender:
        with_contender = {each: None for case in wanted for each in (case, contender(case))}
        wanted = [case for case in with_contender if case.engine != "plain" or get_recipe(case.recipe).kind == "dit"]
    found: dict[Case, list[Row]] = {}
    launched = distributed.world_size() > 1
    if launched and len(wanted) * options.repeats > 1:
        parser.error("under a launcher one combination is measured at a time")
    for case in wanted * options.repeats:
        row = run(case) if launched else in_own_process(case)
        if row is None:
            failed += 1
        elif distributed.is_main():
            show(row)
            found.setdefault(case, []).append(row)
            if not options.no_save:
                harness.append(harness.RESULTS / f"steps-{row['hardware']}.csv", [row])
    compare(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

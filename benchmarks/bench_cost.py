"""What a step would cost on a GPU, counted without one: python benchmarks/bench_cost.py [--recipe NAME ...] [--save]

    python benchmarks/bench_cost.py --precision autocast bf16 --compile off on       the headline recipe's step
    python benchmarks/bench_cost.py --recipe vavae-f16d32-dinov2 --batch 32          a tokenizer's
    python benchmarks/bench_cost.py --what sample --precision tf32 bf16              sampling, with and without guidance

The trainer's own step (or the sampler's) runs on `virtual_gpu`, a device that computes nothing and counts what is
launched on it: launches, bytes, FLOPs, memory kept for the backward pass, and where the host waits. These numbers are
exact for what the code asks for. Times are MODELLED from them and from the ceilings below, never measured: a product
takes its FLOPs or its bytes, whichever is longer, everything else its bytes and a launch. A generator is counted at
depth 2 and 3: their difference is a block, and the whole step is as many of those as the recipe has, and the ends.

The optimizer's part (what the engine does after the network's backward pass: copies of gradients, their norm, AdamW,
averages, copies of weights) is counted where it runs without a GPU, on a CPU with one process: per weight and tensor of
a small network, times those of the recipe's. Without DeepSpeed it is left out.
Rows of --save: results/cost-modelled.csv.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # under PYTHONSAFEPATH, too
import harness
from cost_steps import Case, Counted, configure, count, count_optimizer
from virtual_gpu import Launch, OtherInternals

from vadit.config import DiTConfig
from vadit.runtime.errors import UsageError

BUDGET = Path(__file__).with_name("cost_budget.json")
"""What a compiled step of the default recipe may take, per precision: tests/test_cost.py holds it."""
LIMITED = ("launches", "gb", "kept_gb", "host_waits", "graph_breaks", "recompilations", "optimizer_launches",
           "optimizer_gb", "optimizer_host_waits")  # fmt: skip
"""The columns that have a budget."""
SLACK = 0.02  # How far launches, bytes and memory may grow beyond it; what is counted in ones may not grow at all.
SOURCES = ("../csrc", "../kernels", "../vadit")


@dataclass(frozen=True)
class Ceilings:
    """Speeds that the model takes for granted. Sources: NVIDIA's data sheet of the H200 SXM, and the share of it that
    large kernels are commonly reported to reach; none was measured here."""

    bf16: float = 780.0  # TFLOP/s of large bf16 products: 79% of the data sheet's 989.
    fp8: float = 1400.0  # Of float8 products: 71% of 1,979.
    tf32: float = 390.0  # Of fp32 products in TF32: 79% of 495.
    fp32: float = 55.0  # Of fp32 products without tensor cores: 82% of 67.
    attention: float = 0.6
    """Share of a product's speed that attention reaches: cuDNN's and FlashAttention-3's on short sequences."""
    conv: float = 0.7  # The same of convolutions.
    memory: float = 4.3  # TB/s of a kernel that reads and writes: 90% of 4.8.
    launch_us: float = 2.0
    """Start and end of a kernel that moves bytes, not hidden by the next; the host is taken to be fast enough."""

    def seconds(self, launch: Launch) -> float:
        """Modelled time of one launch."""
        moved = launch.bytes / (self.memory * 1e12)
        if launch.kind == "other":
            return moved + self.launch_us * 1e-6
        if not launch.flops:
            return 0.0
        share = {"matmul": 1.0, "attention": self.attention, "conv": self.conv}[launch.kind]
        return max(launch.flops / (getattr(self, launch.arithmetic) * 1e12 * share), moved)


# ------------------------------------------------------------------------------------------------ whole steps

Tally = collections.Counter[Launch]


def tally(counted: Counted) -> Tally:
    """Launches alike together; the numbers that inductor gives its kernels are left out."""
    launches = (Launch(*fields) for fields in counted["launches"])
    return Tally(launch._replace(name=re.sub(r"_\d+$", "", launch.name)) for launch in launches)


@dataclass(frozen=True)
class Part:
    """Sums over launches."""

    launches: float
    gb: float
    tflop: float
    ms: float  # Modelled.


def sums(launches: Tally, ceilings: Ceilings, kind: str | None = None) -> Part:
    """Of one kind of launches, or of all."""
    found = [(launch, n) for launch, n in launches.items() if kind in (None, launch.kind)]
    sizes = (sum(n * launch.bytes for launch, n in found) / 1e9, sum(n * launch.flops for launch, n in found) / 1e12)
    return Part(sum(n for _, n in found), *sizes, sum(n * ceilings.seconds(launch) for launch, n in found) * 1e3)


def extrapolate(low: Counted, high: Counted, depth: int) -> tuple[Tally, Tally, dict[str, int]]:
    """Launches of a block and of a step of `depth` blocks, and the step's other numbers, out of two depths."""
    a, b, more = tally(low), tally(high), depth - low["depth"]
    assert not a - b, f"not in the deeper step: {list((a - b).items())[:3]}"
    step = Tally({launch: a[launch] + more * (n - a[launch]) for launch, n in b.items()})
    numbers = {name: low[name] + more * (high[name] - low[name]) for name in ("kept", "weights", "tensors")}
    waits = [len(each["host_waits"]) for each in (low, high)]
    numbers |= {"kept_block": high["kept"] - low["kept"], "host_waits": waits[0] + more * (waits[1] - waits[0])}
    return b - a, step, numbers | {name: high[name] for name in ("graph_breaks", "recompilations")}


def optimizer_part(low: Counted, high: Counted, numbers: dict[str, int], ceilings: Ceilings) -> Part:
    """The optimizer's part for a network of so many weights and tensors."""
    (n, size), (more_n, more_size) = ((len(c["launches"]), sum(f[3] for f in c["launches"])) for c in (low, high))
    per_tensor = (more_n - n) / (high["tensors"] - low["tensors"])
    launches = n + per_tensor * (numbers["tensors"] - low["tensors"])
    moved = (more_size - size) / (high["weights"] - low["weights"]) * numbers["weights"]
    return Part(launches, moved / 1e9, 0.0, moved / ceilings.memory / 1e9 + launches * ceilings.launch_us / 1e3)


def guided_steps(config: DiTConfig) -> tuple[int, int]:
    """Steps of the recipe's sampler, and those of them that guidance acts in."""
    from vadit.sampling.solvers import Guidance, time_grid

    times = time_grid(config.sample.num_steps, shift=config.sample.timestep_shift)[:-1]
    return len(times), sum(Guidance(config.sample).active(t) for t in times)


Row = dict[str, Any]


@functools.cache
def optimizer_of(case: Case) -> list[Counted] | None:
    """Its part, counted once for all that share it; None without DeepSpeed."""
    return in_own_process("--count-optimizer", case) if importlib.util.find_spec("deepspeed") else None


def rows_of(case: Case, ceilings: Ceilings) -> list[tuple[Row, Tally, Tally]]:
    """Count a case: its lines of the CSV, each with the launches of a block and of the step.

    One line for training; for sampling one without guidance, and one with the recipe's.
    """
    config: Any = configure(case)
    found = in_own_process("--count", case)
    if case.what == "train":
        low, high = found[0], found[-1]
        block, step, numbers = extrapolate(low, high, config.model.depth if low is not high else 0)
        row = row_of(case, block, step, numbers, ceilings)
        optimizer = optimizer_of(dataclasses.replace(case, batch=1, kernels="reference", compile=False))
        if optimizer:  # to which batch, kernels and compilation of the network are nothing
            after = optimizer_part(*optimizer, numbers, ceilings)
            row |= {
                "optimizer_launches": round(after.launches),
                "optimizer_gb": round(after.gb, 3),
                "optimizer_ms": round(after.ms, 2),
                "optimizer_host_waits": len(optimizer[1]["host_waits"]),
                "images_per_s": round(case.batch / (row["network_ms"] + after.ms) * 1e3, 1),
            }
        return [(row, block, step)]
    steps = [extrapolate(*found[i : i + 2], config.model.depth) for i in (0, 2)]
    decoding = sums(tally(found[4]), ceilings).ms / case.batch
    plain_ms, guided_ms = (sums(step, ceilings).ms / case.batch for _, step, _ in steps)
    number, guided = guided_steps(config)
    rows = []
    for (block, step, numbers), what, ms in (
        (steps[0], "sample", number * plain_ms),
        (steps[1], "sample guided", guided * guided_ms + (number - guided) * plain_ms),
    ):
        row = row_of(dataclasses.replace(case, what=what), block, step, numbers, ceilings)
        hours = {
            "images_per_s": round(1e3 / (ms + decoding), 2),
            "hours_50k": round(50_000 * (ms + decoding) / 3.6e6, 2),
        }
        rows.append((row | hours, block, step))
    return rows


def row_of(case: Case, block: Tally, step: Tally, numbers: dict[str, int], ceilings: Ceilings) -> Row:
    """A line, without what is only known of a training step, or of sampling."""
    one, whole, others = sums(block, ceilings), sums(step, ceilings), sums(block, ceilings, "other")
    counted = {"block_other_launches": others.launches, "block_other_gb": round(others.gb, 4)}
    for prefix, part, kept in (("block_", one, "kept_block"), ("", whole, "kept")):
        values = {"launches": part.launches, "gb": part.gb, "tflop": part.tflop, "kept_gb": numbers[kept] / 1e9}
        counted |= {prefix + name: round(value, 4) for name, value in values.items()}
    counted |= {name: numbers[name] for name in ("host_waits", "graph_breaks", "recompilations")}
    later = [f"optimizer_{name}" for name in ("launches", "gb", "host_waits", "ms")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": harness.commit(*SOURCES),
        "origin": "modelled",
        "versions": harness.versions("cpu"),
        "ceilings": " ".join(f"{name}={value:g}" for name, value in dataclasses.asdict(ceilings).items()),
        **dataclasses.asdict(case),
        "settings": " ".join(case.settings),
        **counted,
        "block_ms": round(one.ms, 4),
        "network_ms": round(whole.ms, 2),
        **dict.fromkeys([*later, "images_per_s", "hours_50k"], ""),
    }


def show(row: Row, block: Tally, step: Tally, ceilings: Ceilings, every: bool) -> None:
    """Print a step: kinds of launches of a block and in all, its phases, and every launch of a block."""
    print(
        f"\n{' '.join(row[name] for name in ('recipe', 'what', 'precision', 'kernels', 'settings'))} "
        f"{'compiled' if row['compile'] else 'eager'} batch {row['batch']}: modelled {row['network_ms']} ms, "
        f"optimizer {row['optimizer_ms'] or '-'} ms, {row['images_per_s'] or '-'} img/s, "
        f"{row['hours_50k'] or '-'} hours for 50,000"
    )
    parts = {"a block": block, "the step": step}
    if not block:  # a tokenizer has phases in place of blocks
        phases = dict.fromkeys(launch.phase for launch in step)
        parts = {phase: Tally({launch: n for launch, n in step.items() if launch.phase == phase}) for phase in phases}
        parts["the step"] = step
    for title, launches in parts.items():
        for kind in [*sorted({launch.kind for launch in launches}), None]:
            part = sums(launches, ceilings, kind)
            amounts = f"{part.launches:6} launches {part.gb:9.3f} GB {part.tflop:8.3f} TFLOP {part.ms:9.3f} ms"
            print(f"  {title:32}{kind or 'all':10}{amounts}")
    times = sorted(
        ((n * ceilings.seconds(launch) * 1e6, launch, n) for launch, n in (block or step).items()), reverse=True
    )
    for us, launch, n in times if every else ():
        what = f"{launch.phase:9}{launch.kind:10}{launch.name[:70]:71}x{n:3}"
        print(f"    {what} {n * launch.bytes / 1e6:8.1f} MB {us:7.1f} us")
    names = [name for name in row if re.search("kept|waits|breaks|recomp|optimizer", name)]
    print(" ", ", ".join(f"{name} {row[name]}" for name in names if row[name] != ""))


def over_budget(row: Row, budget: dict[str, float]) -> list[str]:
    """What of a step is above its budget, a line each."""
    grown = {name: (budget[name], row[name]) for name in LIMITED if row[name] > budget[name] * (1 + SLACK)}
    return [f"{row['precision']}: {name} was {before:g}, is {now:g}" for name, (before, now) in grown.items()]


def in_own_process(what: str, case: Case) -> list[Counted]:
    """Count a case in a process of its own, which the virtual GPU takes over.

    Raises OtherInternals, and RuntimeError for whatever else goes wrong there.
    """
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, what, json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if OtherInternals.__name__ in last:
            raise OtherInternals(last.partition(": ")[2])
        raise RuntimeError(f"{case}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    """Count, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="*", default=["lightningdit-xl-64ep"], help="names of recipes")
    parser.add_argument("--what", nargs="*", default=["train"], choices=("train", "sample"))
    parser.add_argument("--batch", type=int, nargs="*", default=[128], help="images per process and micro-batch")
    parser.add_argument("--precision", nargs="*", default=["bf16"], choices=("fp32", "tf32", "bf16", "autocast"))
    parser.add_argument("--compile", nargs="*", default=["on"], choices=("off", "on"))
    parser.add_argument("--kernels", nargs="*", default=["triton"], choices=("triton", "reference"))
    parser.add_argument("--with", nargs="*", default=[], dest="settings", metavar="SECTION.NAME=VALUE")
    parser.add_argument("--launches", action="store_true", help="print every launch of a block")
    parser.add_argument("--save", action="store_true", help="add rows to results/cost-modelled.csv")
    for field in dataclasses.fields(Ceilings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=float, default=field.default, help="a ceiling")
    parser.add_argument("--budget", action="store_true", help=f"make this run's numbers those of {BUDGET.name}")
    parser.add_argument("--count", help=argparse.SUPPRESS)
    parser.add_argument("--count-optimizer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for call, text in ((count, options.count), (count_optimizer, options.count_optimizer)):
        if text:
            fields = json.loads(text)
            print("\n" + json.dumps(call(Case(**{**fields, "settings": tuple(fields["settings"])}))))
            return 0
    ceilings = Ceilings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Ceilings)})
    choices = (options.recipe, options.what, options.batch, options.precision, options.kernels, options.compile)
    cases = [
        Case(*choice, compiled == "on", tuple(options.settings)) for *choice, compiled in itertools.product(*choices)
    ]
    try:
        for case in cases:
            configure(case)
    except (UsageError, SystemExit) as error:  # SystemExit: of a setting that there is not
        parser.error(str(error))
    budget = {}
    for case in cases:
        try:
            counted = rows_of(case, ceilings)
        except OtherInternals as error:
            parser.error(str(error))
        for row, block, step in counted:
            show(row, block, step, ceilings, options.launches)
            budget[case.precision] = {name: row[name] for name in LIMITED}
            if options.save:
                harness.append(harness.RESULTS / "cost-modelled.csv", [row])
    if options.budget:
        BUDGET.write_text(json.dumps({"torch": torch.__version__, "steps": budget}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

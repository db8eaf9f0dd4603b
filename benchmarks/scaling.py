"""Step time against GPUs, on paper: a model, not a measurement. Which ZeRO stage is worth its messages, and when.

    python benchmarks/scaling.py [--recipe lightningdit-xl-64ep] [--link-gbs 50] [--mfu 0.4] [--overlap 0] ...
    python benchmarks/scaling_validation.py      what can be checked on one machine: bytes, and two processes over gloo

Time of a step = arithmetic + optimizer + messages that nothing hides. Arithmetic: FLOPs (`vadit.estimate.flops`) over
peak x MFU, and never less than the launching of the kernels. Optimizer: bytes that AdamW and the average move, over the
memory's speed. Messages: what DeepSpeed sends as vadit sets it up (`messages`, checked byte by byte against two real
processes), by ring: bytes over bandwidth, hops times latency. Defaults stand for H100 nodes of eight and are
assumptions, with their sources in `Cluster`; H200 has the same arithmetic and links.

Writes benchmarks/results/scaling.csv and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from vadit.config import MAX_BUCKET, DiTConfig, DiTSpec, MaskSpec
from vadit.estimate.flops import training_flops
from vadit.models.masked import build_generator
from vadit.recipes import get_recipe

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STAGES = (1, 2, 3)
ADAM_BYTES = 4 + 2 * 12 + 2 * 4  # Read or written per weight and step: the gradient, master and moments, one average.
PREFETCH, MAX_LIVE, PERSISTENT = 50_000_000, 1_000_000_000, 100_000
"""DeepSpeed's defaults for ZeRO 3: weights that are gathered ahead of their use, that stay gathered from the forward to
the backward pass, and elements up to which a weight is left whole from step to step."""


@dataclass(frozen=True)
class Cluster:
    """Assumptions; every one is a flag. GB are 10^9 bytes, per GPU and direction."""

    node: int = 8  # GPUs per node (DGX/HGX H100 and H200).
    peak_tflops: float = 989.0  # Dense bf16 (NVIDIA's H100 SXM and H200 data sheets: 1,979 with sparsity).
    mfu: float = 0.4
    """Share of the peak that training reaches; ordinary for transformers of this width, not measured here."""
    memory_gbs: float = 3350.0  # HBM3 of an H100 SXM (data sheet; an H200 has 4,800).
    nvlink_gbs: float = 360.0
    """Of NVLink 4's 450 GB/s per direction (data sheet: 900 both ways), what collectives reach: 80%, assumed."""
    link_gbs: float = 40.0
    """Between nodes: one 400 Gb/s adapter per GPU (ConnectX-7, DGX H100 data sheet) is 50 GB/s; 80% of it, assumed."""
    nvlink_us: float = 2.0  # Latency of one hop within a node, assumed.
    link_us: float = 8.0  # Latency of one hop between nodes over InfiniBand or RoCE, assumed.
    launch_ms: float = 15.0
    """Least time of a micro-batch: launching some thousand kernels of forward and backward pass, assumed."""
    overlap: float = 0.0
    """Share of the messages' time that arithmetic hides; 0 is engine.overlap_comm off, vadit's default."""

    def collective_s(self, num_bytes: float, gpus: int, *, passes: int = 1) -> float:
        """Seconds of a ring over `gpus`: all-gather or reduce-scatter of `num_bytes` in all, all-reduce with passes=2.

        A ring crosses each node's border once per adapter, so all adapters of a node work side by side.
        """
        nodes = math.ceil(gpus / self.node)
        bandwidth = self.nvlink_gbs if nodes == 1 else min(self.nvlink_gbs, self.node * self.link_gbs)
        hops_us = (gpus - nodes) * self.nvlink_us + (nodes if nodes > 1 else 0) * self.link_us
        return passes * (num_bytes * (gpus - 1) / gpus / (bandwidth * 1e9) + hops_us * 1e-6)


# ------------------------------------------------------------------------------------------------ messages


@dataclass(frozen=True)
class Message:
    """One kind of message of a step, over all of its parts."""

    kind: str  # all_reduce, all_gather or reduce_scatter.
    num_bytes: float  # The whole tensor: what a process has after an all-gather, or gives to a reduction.
    parts: int = 1  # Collectives that it is sent in.

    def sent(self, gpus: int) -> float:
        """Bytes that each GPU sends by ring."""
        return (2 if self.kind == "all_reduce" else 1) * self.num_bytes * (gpus - 1) / gpus


def messages(
    stage: int,
    weights: float,
    *,
    number: int,
    gradient: float | None = None,
    accumulation: int = 1,
    whole: float = 0,
) -> list[Message]:
    """What one step sends, as DeepSpeed 0.19 does it with vadit's settings.

    weights: trained weights; number: bytes of each; gradient: bytes that a gradient is sent in (default: the same);
    whole: weights that ZeRO 3 leaves whole, gathered once per step.
    ZeRO 1 and 2 all-reduce their gradients in buckets and keep a share (DeepSpeed's multi-rank buckets), rather than
    scatter them: 3 x weights in all where ZeRO's paper counts 2. ZeRO 3 gathers weights once per micro-batch while they
    are fewer than 10^9, and keeps them for the backward pass.
    """
    sent = number if gradient is None else gradient
    buckets = math.ceil(weights / MAX_BUCKET)
    if stage == 3:
        gathers = accumulation * (1 if weights < MAX_LIVE else 2)
        ahead = math.ceil(weights / PREFETCH)
        return [
            Message("all_gather", (weights + (gathers - 1) * (weights - whole)) * number, gathers * ahead),
            Message("reduce_scatter", accumulation * weights * sent, accumulation * buckets),
        ]
    reductions = accumulation if stage == 2 else 1
    reduced = Message("all_reduce", reductions * weights * sent, reductions * buckets)
    return [reduced] if stage == 0 else [reduced, Message("all_gather", weights * number, buckets)]


def messages_s(config: DiTConfig, stage: int, gpus: int, cluster: Cluster) -> float:
    """Seconds of a step's messages, one micro-batch per step, nothing hidden."""
    number = 2 if config.engine.precision == "bf16" else 4
    # Under autocast DeepSpeed sends gradients of products in bf16, which are nearly all.
    gradient = 2 if config.engine.precision == "autocast" else number
    total = 0.0
    for message in messages(stage, num_weights(config.model, config.mask), number=number, gradient=gradient):
        passes = 2 if message.kind == "all_reduce" else 1
        total += message.parts * cluster.collective_s(message.num_bytes / message.parts, gpus, passes=passes)
    return total


@functools.cache
def num_weights(spec: DiTSpec, mask: MaskSpec) -> int:
    """Trained weights of a generator."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in build_generator(spec, mask).parameters() if weight.requires_grad)


# ------------------------------------------------------------------------------------------------ one step


def step(config: DiTConfig, cluster: Cluster, stage: int, gpus: int, images: int) -> dict[str, float]:
    """One modelled step of `images` per GPU. None of its numbers was measured."""
    arithmetic = images * training_flops(config) / (cluster.peak_tflops * 1e12 * cluster.mfu)
    arithmetic = max(arithmetic, cluster.launch_ms * 1e-3)
    optimizer = num_weights(config.model, config.mask) / gpus * ADAM_BYTES / (cluster.memory_gbs * 1e9)
    sent = messages_s(config, stage, gpus, cluster)
    seconds = arithmetic + optimizer + sent * (1 - cluster.overlap)
    parts = {"arithmetic_ms": arithmetic, "optimizer_ms": optimizer, "messages_ms": sent, "step_ms": seconds}
    return {name: value * 1e3 for name, value in parts.items()} | {"images_per_s": gpus * images / seconds}


def model(recipe: str, config: DiTConfig, cluster: Cluster, *, global_batch: int, per_gpu: int) -> list[dict[str, Any]]:
    """Strong scaling with `global_batch` images per step, weak with `per_gpu` images on each GPU.

    efficiency: images per second and GPU over those of ZeRO 1 on 8 GPUs of the same scaling.
    """
    rows = []
    for scaling in ("strong", "weak"):
        base: float | None = None
        for gpus in (count for count in GPUS if scaling == "weak" or count <= global_batch):
            images = global_batch // gpus if scaling == "strong" else per_gpu
            for stage in STAGES:
                found = step(config, cluster, stage, gpus, images)
                base = base or found["images_per_s"] / gpus
                what = {"origin": "modelled", "recipe": recipe, "scaling": scaling, "stage": stage, "gpus": gpus}
                efficiency = found["images_per_s"] / gpus / base
                rows.append(what | {"images_per_gpu": images} | found | {"efficiency": efficiency})
    return rows


# ------------------------------------------------------------------------------------------------ output


def table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of each scaling."""
    for scaling in ("strong", "weak"):
        same = "per step on all GPUs" if scaling == "strong" else "on each GPU"
        print(f"\nMODELLED ms per step, the same images {same} ({scaling} scaling)")
        names = ("GPUs", "images each", "arithmetic", *(f"ZeRO {stage}" for stage in STAGES))
        print("".join(f"{name:>13}" for name in names))
        for gpus in GPUS:
            line = [row for row in rows if (row["scaling"], row["gpus"]) == (scaling, gpus)]
            cells = (gpus, line[0]["images_per_gpu"], line[0]["arithmetic_ms"], *(row["step_ms"] for row in line))
            print("".join(f"{cell:>13,.1f}" if isinstance(cell, float) else f"{cell:>13,}" for cell in cells))


def plot(rows: list[dict[str, Any]], cluster: Cluster, name: str, path: Path) -> None:
    """Step time and efficiency against GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    strong, weak = ([row for row in rows if row["scaling"] == scaling] for scaling in ("strong", "weak"))
    left, right = figure.subplots(1, 2)
    for plot, of, what in ((left, strong, "step_ms"), (right, weak, "efficiency")):
        for stage, color, mark in zip(STAGES, ("#1b6ca8", "#5aa9e6", "#d1495b"), "osD", strict=True):
            points = [(row["gpus"], row[what]) for row in of if row["stage"] == stage]
            plot.plot(*zip(*points, strict=True), color=color, marker=mark, ms=5, lw=1.8, label=f"ZeRO {stage}")
        plot.set_xscale("log", base=2)
        plot.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        plot.set_xlabel("GPUs")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    line = [(row["gpus"], row["arithmetic_ms"]) for row in strong if row["stage"] == 1]
    left.plot(*zip(*line, strict=True), color="0.45", ls=":", lw=1.6, label="arithmetic alone")
    left.legend(frameon=False, fontsize=9)
    batch = strong[0]["gpus"] * strong[0]["images_per_gpu"]
    left.set(title=f"{batch:,} images per step", ylabel="ms per step", ylim=(0, None))
    per_gpu = weak[0]["images_per_gpu"]
    right.set(title=f"{per_gpu} images on each GPU", ylabel="images/s/GPU over ZeRO 1 on 8 GPUs", ylim=(0, 1.15))
    hidden = f"{cluster.overlap:.0%} of messages hidden" if cluster.overlap else "no message hidden behind arithmetic"
    figure.suptitle(
        f"{name}: MODELLED, not measured (nodes of {cluster.node}, {cluster.nvlink_gbs:g} GB/s within, "
        f"{cluster.link_gbs:g} GB/s per GPU between, MFU {cluster.mfu:.0%}, {hidden})",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with a flag for each assumption."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(Cluster):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The assumptions that the flags say."""
    return Cluster(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Cluster)})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="lightningdit-xl-64ep")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32", "autocast"))
    parser.add_argument("--batch", type=int, default=1024, help="images per step, strong scaling")
    parser.add_argument("--per-gpu", type=int, default=32, help="images on each GPU, weak scaling")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    cluster = cluster_of(options)
    config = get_recipe(options.recipe)
    if not isinstance(config, DiTConfig):
        parser.error("only generators are modelled; name one with --recipe")
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=options.precision))
    rows = model(options.recipe, config, cluster, global_batch=options.batch, per_gpu=options.per_gpu)
    table(rows)
    harness.write(options.out / "scaling.csv", rows)
    plot(rows, cluster, options.recipe, options.out / "scaling.png")


if __name__ == "__main__":
    main()

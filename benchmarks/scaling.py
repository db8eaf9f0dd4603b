"""Step time against GPUs, on paper: a model, not a measurement. Which ZeRO stage is worth its messages, and when.

    python benchmarks/scaling.py [--recipe lightningdit-xl-64ep] [--link-gbs 50] [--mfu 0.4] [--overlap 0] ...
    python benchmarks/scaling.py --validate      what can be checked on one machine: bytes, and two processes over gloo

Time of a step = arithmetic + optimizer + messages that nothing hides. Arithmetic: FLOPs (counted by formula, checked
against torch's counter) over peak x MFU, and never less than the launching of the kernels. Optimizer: bytes that AdamW
and the average move, over the memory's speed. Messages: what DeepSpeed sends as vadit sets it up (`messages`, checked
byte by byte against two real processes), by ring: bytes over bandwidth, hops times latency. Defaults stand for H100
nodes of eight and are assumptions, with their sources in `Cluster`; H200 has the same arithmetic and links.

Writes benchmarks/results/scaling.csv and .png; --validate writes benchmarks/results/scaling-validation.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vadit.config import Config
from vadit.estimate import memory
from vadit.estimate.flops import training_flops
from vadit.recipes import get_recipe

RESULTS = Path(__file__).parent / "results"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCHEMES = ("ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO++")
ADAM_BYTES = 4 + 2 * 12 + 2 * 4
"""Read or written per weight and step: the gradient, master and moments, one average."""
QUANTIZED_BLOCK = 2048
"""Weights per fp32 scale in ZeRO++'s quantized messages (Wang et al. 2023); the scales hardly count."""


PERSISTENT = 100_000
"""Elements up to which ZeRO 3 leaves a weight whole from step to step (DeepSpeed's default)."""


@dataclass(frozen=True)
class Cluster:
    """Assumptions; every one is a flag. GB are 10^9 bytes, per GPU and direction."""

    node: int = 8
    """GPUs per node (DGX/HGX H100 and H200)."""
    peak_tflops: float = 989.0
    """Dense bf16 (NVIDIA's H100 SXM and H200 data sheets: 1,979 with sparsity)."""
    mfu: float = 0.4
    """Share of the peak that training reaches; ordinary for transformers of this width, not measured here."""
    memory_gbs: float = 3350.0
    """HBM3 of an H100 SXM (data sheet; an H200 has 4,800)."""
    nvlink_gbs: float = 360.0
    """Of NVLink 4's 450 GB/s per direction (data sheet: 900 both ways), what collectives reach: 80%, assumed."""
    link_gbs: float = 40.0
    """Between nodes: one 400 Gb/s adapter per GPU (ConnectX-7, DGX H100 data sheet) is 50 GB/s; 80% of it, assumed."""
    nvlink_us: float = 2.0
    """Latency of one hop within a node, assumed."""
    link_us: float = 8.0
    """Latency of one hop between nodes over InfiniBand or RoCE, assumed."""
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

    kind: str
    """all_reduce, all_gather or reduce_scatter."""
    num_bytes: float
    """The whole tensor: what a process has after an all-gather, or gives to a reduction."""
    parts: int = 1
    """Collectives that it is sent in."""

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
    buckets = math.ceil(weights / memory.MAX_BUCKET)
    if stage == 3:
        gathers = accumulation * (1 if weights < memory.MAX_LIVE else 2)
        ahead = math.ceil(weights / memory.PREFETCH)
        return [
            Message("all_gather", (weights + (gathers - 1) * (weights - whole)) * number, gathers * ahead),
            Message("reduce_scatter", accumulation * weights * sent, accumulation * buckets),
        ]
    reductions = accumulation if stage == 2 else 1
    reduced = Message("all_reduce", reductions * weights * sent, reductions * buckets)
    return [reduced] if stage == 0 else [reduced, Message("all_gather", weights * number, buckets)]


def messages_s(
    scheme: str, weights: float, number: int, gpus: int, cluster: Cluster, gradient: float | None = None
) -> float:
    """Seconds of a step's messages, one micro-batch per step, nothing hidden."""
    if scheme != "ZeRO++":
        total = 0.0
        for message in messages(int(scheme[-1]), weights, number=number, gradient=gradient):
            part = message.num_bytes / message.parts
            passes = 2 if message.kind == "all_reduce" else 1
            total += message.parts * cluster.collective_s(part, gpus, passes=passes)
        return total
    # ZeRO++ (Wang et al. 2023): qwZ gathers int8 for the forward pass; hpZ keeps a second copy of the weights in each
    # node, which the backward pass would gather from (here it has them still); qgZ sends int4 gradients twice, all to
    # all: within the node, and what is left of them, an eighth, between nodes.
    scale = 4 / QUANTIZED_BLOCK
    ahead = math.ceil(weights / memory.PREFETCH)
    gather = ahead * cluster.collective_s(weights * (1 + scale) / ahead, gpus)
    half = weights * (0.5 + scale)
    inside = min(gpus, cluster.node)
    nodes = math.ceil(gpus / cluster.node)
    scatter = half * (inside - 1) / inside / (cluster.nvlink_gbs * 1e9) + inside * cluster.nvlink_us * 1e-6
    if nodes > 1:
        scatter += half / inside * (nodes - 1) / nodes / (cluster.link_gbs * 1e9) + nodes * cluster.link_us * 1e-6
    return gather + scatter


# ------------------------------------------------------------------------------------------------ one step


@dataclass(frozen=True)
class Row:
    """One modelled step. None of these numbers was measured."""

    origin: str
    """Always "modelled": rows may be read away from this file."""
    recipe: str
    scaling: str
    scheme: str
    gpus: int
    images_per_gpu: int
    arithmetic_ms: float
    optimizer_ms: float
    messages_ms: float
    step_ms: float
    images_per_s: float
    efficiency: float
    """Images per second and GPU over those of ZeRO 1 on 8 GPUs of the same scaling."""
    gib_per_gpu: float


def model(recipe: str, config: Config, cluster: Cluster, *, global_batch: int, per_gpu: int) -> list[Row]:
    """Strong scaling with `global_batch` images per step, weak with `per_gpu` images on each GPU."""
    trace = functools.cache(functools.partial(memory.trace, config))
    weights = float(sum(network.num_trained for network in trace(per_gpu)[0]))
    number = memory.BF16 if config.engine.precision == "bf16" else memory.FP32
    # Under autocast DeepSpeed sends gradients of products in bf16, which are nearly all.
    gradient = memory.BF16 if config.engine.precision == "autocast" else number
    flops, rows = training_flops(config), []
    for scaling in ("strong", "weak"):
        base: float | None = None
        for gpus in GPUS:
            images = global_batch // gpus if scaling == "strong" else per_gpu
            if images < 1:
                continue
            held = memory.stages(config, *trace(images), gpus)
            arithmetic = max(images * flops / (cluster.peak_tflops * 1e12 * cluster.mfu), cluster.launch_ms * 1e-3)
            optimizer = weights / gpus * ADAM_BYTES / (cluster.memory_gbs * 1e9)
            for scheme in SCHEMES:
                sent = messages_s(scheme, weights, number, gpus, cluster, gradient)
                step = arithmetic + optimizer + sent * (1 - cluster.overlap)
                base = base or images / step
                row = Row(
                    origin="modelled",
                    recipe=recipe,
                    scaling=scaling,
                    scheme=scheme,
                    gpus=gpus,
                    images_per_gpu=images,
                    arithmetic_ms=arithmetic * 1e3,
                    optimizer_ms=optimizer * 1e3,
                    messages_ms=sent * 1e3,
                    step_ms=step * 1e3,
                    images_per_s=gpus * images / step,
                    efficiency=images / step / base,
                    gib_per_gpu=_held(scheme, held, weights, number, gpus, cluster) / 2**30,
                )
                rows.append(row)
    return rows


def _held(
    scheme: str, held: tuple[memory.StageMemory, ...], weights: float, number: int, gpus: int, cluster: Cluster
) -> float:
    if scheme != "ZeRO++":
        return held[int(scheme[-1])].total
    return held[3].total + weights * number / min(gpus, cluster.node)  # hpZ's second copy, cut over the node


def advice(rows: list[Row], gpu_gib: float) -> str:
    """Which stage to use when, from the modelled rows."""
    strong = [row for row in rows if row.scaling == "strong"]
    images = strong[0].gpus * strong[0].images_per_gpu
    fits = []
    for scheme in SCHEMES:
        gpus = [row.gpus for row in strong if row.scheme == scheme and row.gib_per_gpu < 0.9 * gpu_gib]
        fits.append(f"{scheme} " + (f"from {min(gpus)} GPUs" if gpus else "on none"))
    pairs = list(_against(strong, "ZeRO 3", "ZeRO 1"))
    ahead = [row.gpus for row, other in pairs if row.step_ms < other.step_ms]
    ratios = [row.step_ms / other.step_ms for row, other in pairs]
    return (
        f"Modelled, at {images:,} images per step and {gpu_gib:.0f} GiB a GPU (a tenth left free), "
        f"there is room for {', '.join(fits)}. "
        f"A step of ZeRO 3 takes {min(ratios):.2f} to {max(ratios):.2f} times one of ZeRO 1"
        + (f", less up to {max(ahead)} GPUs" if ahead else "")
        + ". Use ZeRO 1 where the run fits; ZeRO 2 where ZeRO 1's whole gradients are what does not fit; "
        "ZeRO 3 where the weights themselves do not. ZeRO++ is for slow links between nodes, and vadit does not set it."
    )


def _against(rows: list[Row], scheme: str, other: str) -> Iterator[tuple[Row, Row]]:
    by = {(row.scheme, row.gpus): row for row in rows}
    for (name, gpus), row in by.items():
        if name == scheme:
            yield row, by[other, gpus]


# ------------------------------------------------------------------------------------------------ output


def table(rows: list[Row]) -> None:
    """Print the rows of one scaling."""
    from rich.console import Console
    from rich.table import Table

    for scaling in ("strong", "weak"):
        shown = [row for row in rows if row.scaling == scaling]
        title = {"strong": "the same images per step on all GPUs", "weak": "the same images on each GPU"}[scaling]
        printed = Table(title=f"MODELLED ms per step, {title} ({scaling} scaling); in brackets GiB per GPU")
        for column in ("GPUs", "images each", "arithmetic", *SCHEMES):
            printed.add_column(column, justify="right")
        for gpus in sorted({row.gpus for row in shown}):
            of = {row.scheme: row for row in shown if row.gpus == gpus}
            first = of[SCHEMES[0]]
            cells = [f"{of[s].step_ms:,.1f} ({of[s].gib_per_gpu:.0f})" for s in SCHEMES]
            printed.add_row(f"{gpus:,}", str(first.images_per_gpu), f"{first.arithmetic_ms:,.1f}", *cells)
        Console(width=120).print(printed)


def save(rows: list[Row], path: Path) -> None:
    """Write rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(rows[0])])
        writer.writeheader()
        for row in rows:
            values = dataclasses.asdict(row).items()
            writer.writerow({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in values})


def plot(rows: list[Row], cluster: Cluster, name: str, gpu_gib: float, path: Path) -> None:
    """Step time and efficiency against GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(SCHEMES, ("#1b6ca8", "#5aa9e6", "#d1495b", "#edae49"), strict=True))
    marks = dict(zip(SCHEMES, "osD^", strict=True))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.4), constrained_layout=True)
    for scheme in SCHEMES:
        style = {"color": colours[scheme], "marker": marks[scheme], "ms": 5, "lw": 1.8, "label": scheme}
        strong = [row for row in rows if (row.scaling, row.scheme) == ("strong", scheme)]
        weak = [row for row in rows if (row.scaling, row.scheme) == ("weak", scheme)]
        dashed = style | {"ls": "--" if scheme == "ZeRO 2" else "-"}
        left.plot([r.gpus for r in strong], [r.step_ms for r in strong], **dashed)
        middle.plot([r.gpus for r in weak], [100 * r.efficiency for r in weak], **dashed)
        right.plot([r.gpus for r in strong], [r.gib_per_gpu for r in strong], **style)
    strong = [row for row in rows if (row.scaling, row.scheme) == ("strong", SCHEMES[0])]
    weak = [row for row in rows if row.scaling == "weak"]
    left.plot(
        [r.gpus for r in strong],
        [r.arithmetic_ms for r in strong],
        color="0.45",
        ls=":",
        lw=1.6,
        label="arithmetic alone",
    )
    left.set(yscale="log", ylabel="ms per step", title=f"{strong[0].gpus * strong[0].images_per_gpu:,} images per step")
    middle.set(
        ylim=(0, 115),
        ylabel="images/s/GPU, % of ZeRO 1 on 8 GPUs",
        title=f"{weak[0].images_per_gpu} images on each GPU",
    )
    right.set(
        yscale="log",
        ylabel="GiB per GPU",
        title=f"memory, {strong[0].gpus * strong[0].images_per_gpu:,} images per step",
    )
    right.axhline(gpu_gib, color="0.45", ls=":", lw=1.6)
    right.annotate(f"a GPU: {gpu_gib:.0f} GiB", (GPUS[-1], gpu_gib), ha="right", va="bottom", color="0.35", fontsize=9)
    for axis in (left, middle, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(GPUS, [f"{gpus:,}" for gpus in GPUS])
        axis.minorticks_off()
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    left.set_yticks(ticks := [20, 50, 100, 200], [str(tick) for tick in ticks])
    right.set_yticks(ticks := [2, 5, 10, 20, 50], [str(tick) for tick in ticks])
    left.legend(frameon=False, fontsize=9)
    hidden = (
        "no message hidden behind arithmetic" if not cluster.overlap else f"{cluster.overlap:.0%} of messages hidden"
    )
    figure.suptitle(
        f"{name}: MODELLED, not measured (nodes of {cluster.node}, {cluster.nvlink_gbs:g} GB/s within, "
        f"{cluster.link_gbs:g} GB/s per GPU between, MFU {cluster.mfu:.0%}, {hidden})",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """A flag for each assumption."""
    for field in dataclasses.fields(Cluster):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The assumptions that the flags say."""
    return Cluster(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Cluster)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--validate", action="store_true", help="check bytes and time against two processes here")
    parser.add_argument("--recipe", default="lightningdit-xl-64ep")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32", "autocast"))
    parser.add_argument("--batch", type=int, default=1024, help="images per step, strong scaling")
    parser.add_argument("--per-gpu", type=int, default=32, help="images on each GPU, weak scaling")
    parser.add_argument("--gpu-gib", type=float, default=80e9 / 2**30, help="memory of a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    add_cluster(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.validate:
        import scaling_validation

        scaling_validation.main(arguments.out / "scaling-validation.csv")
        return
    cluster = cluster_of(arguments)
    config = get_recipe(arguments.recipe)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=arguments.precision))
    rows = model(arguments.recipe, config, cluster, global_batch=arguments.batch, per_gpu=arguments.per_gpu)
    table(rows)
    print(advice(rows, arguments.gpu_gib))
    save(rows, arguments.out / "scaling.csv")
    plot(rows, cluster, arguments.recipe, arguments.gpu_gib, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()

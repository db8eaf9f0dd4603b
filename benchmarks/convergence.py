"""How long to the 64-epoch result, and on what: python benchmarks/convergence.py [--link-gbs 40] [--overlap 0] ...

Prints: system | img/s per GPU | hours to 64 epochs of ImageNet (81,920,000 images) on 8, 64 and 256 GPUs | share of the
roofline. Every number says where it is from:

    measured    rows of bench_step.py (benchmarks/results/steps-*.csv), as they are
    published   what others tell, with its source; hours only where they tell hours
    projected   computed here: hours of published rates are those rates times GPUs; hours of our GPU rows add the
                messages of as many GPUs to the measured step; rows without a measurement are modelled whole, and say so

Messages are those of `scaling.messages` by ZeRO stage, over links whose speeds are flags (`scaling.Cluster`). Their
bytes are checked against two real processes (scaling.py --validate), their times are not. The images of a step are the
recipe's on any number of GPUs: a GPU's share is made of micro-batches of the measured size; where the share is smaller
than what was measured, the step is taken to shrink with it, which is too good to be true, and marked "<".
A CPU's rows are shown as what they are, and never become hours of GPUs.

The roofline is arithmetic: FLOPs of the products of a training step, without recomputation, over the data sheet's dense
16-bit speed; for a CPU over a large product timed beside it. Writes benchmarks/results/convergence.csv.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import scaling
import torch

from vadit.config import DiTConfig, DiTSpec, MaskSpec
from vadit.estimate import flops, memory
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe

RESULTS = Path(__file__).parent / "results"
IMAGES = 80_000 * 1024
"""64 epochs, as the authors count them."""
GPUS = (8, 64, 256)
SUBJECT = "lightningdit-xl-64ep"
DIT_XL2 = DiTSpec(patch_size=2, in_channels=4, input_size=32, learn_sigma=True, swiglu=False, rope=False, rmsnorm=False)
LIGHTNING_XL1 = DiTSpec()


@dataclass(frozen=True)
class Published:
    """What others tell of their own training."""

    system: str
    rate: float
    """Images per second and GPU (TPU: chip)."""
    hardware: str
    peak_tflops: float | None
    """Dense 16-bit speed by the data sheet; None where the hardware is not told."""
    forward_flops: float
    source: str
    hours: dict[int, float] = dataclasses.field(default_factory=dict)
    """Hours to 64 epochs that they tell, by GPUs."""


def published() -> list[Published]:
    """The rows of others."""
    xl2, xl1 = flops.dit_flops(DIT_XL2), flops.dit_flops(LIGHTNING_XL1)
    return [
        Published(
            "DiT-XL/2", 5.7 * 256 / 128, "TPU v3 (128 chips)", 123, xl2,
            "Peebles & Xie 2023, section 4: 5.7 steps/s of 256 images on a v3-256",
        ),
        Published(
            "SiT-XL/2", 6.8 * 256 / 32, "TPU v4 (32 chips)", 275, xl2,
            "Ma et al. 2024: 6.8 steps/s of 256 images on a v4-64",
        ),
        Published(
            "fast-DiT, DiT-XL/2", 0.84 * 128, "A100", flops.PEAK_TFLOPS["A100"], xl2,
            "fast-DiT's README: 0.84 steps/s of 128 images, fp16, checkpointing",
        ),
        Published(
            "MaskDiT-XL/2", 2_000_000 * 1024 / (260 * 3600 * 8), "A100 (8)", flops.PEAK_TFLOPS["A100"],
            flops.dit_flops(DIT_XL2, MaskSpec(kind="maskdit"), masked=True),
            "MaskDiT's README: 2M steps of 1024 images in 260 h on 8 GPUs",
        ),
        Published(
            "LightningDiT-XL/1, log", 5.3 * 1024 / 32, "not told (32 GPUs)", None, xl1,
            "the authors' training log: 5.3 steps/s of 1024 images on 32 GPUs",
        ),
        Published(
            "LightningDiT-XL/1, headline", IMAGES / (10 * 3600 * 8), "H800 (8)", flops.PEAK_TFLOPS["H800"], xl1,
            "the authors: about 10 h on 8 H800", {8: 10.0},
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Entry:
    """One line: numbers, each with its origin."""

    system: str
    hardware: str
    rate: float | None
    """Images per second and GPU (a CPU: of the whole process)."""
    rate_origin: str
    hours: dict[int, float]
    hours_origin: dict[int, str]
    """published, projected, or "projected <": better than can be."""
    roofline: float | None
    source: str


def of_published(row: Published) -> Entry:
    """A row of others: its rate times GPUs, where it does not tell the hours."""
    linear = {gpus: IMAGES / (row.rate * gpus) / 3600 for gpus in GPUS}
    share = None
    if row.peak_tflops is not None:
        share = row.rate * flops.TRAINING * row.forward_flops / (row.peak_tflops * 1e12)
    return Entry(
        system=row.system,
        hardware=row.hardware,
        rate=row.rate,
        rate_origin="published",
        hours=linear | row.hours,
        hours_origin={gpus: "published" if gpus in row.hours else "projected" for gpus in GPUS},
        roofline=share,
        source=row.source,
    )


def of_measured(row: dict[str, str], cluster: scaling.Cluster) -> Entry:
    """A row of bench_step.py; only one of a GPU and of a generator is projected."""
    config = get_recipe(row["recipe"])
    processes, rate = int(row["processes"]), float(row["images_per_s"]) / int(row["processes"])
    on_gpu = row["device"] == "cuda"
    setting = " ".join(filter(None, (row["precision"], "compiled" * (row["compile"] == "True"), row["settings"])))
    hours: dict[int, float] = {}
    origins: dict[int, str] = {}
    if on_gpu and isinstance(config, DiTConfig) and not row["recipe"].endswith("-debug"):
        for gpus in GPUS:
            step_s, images, exact = projected_step(row, config, gpus, cluster)
            hours[gpus] = IMAGES / images * step_s / 3600
            origins[gpus] = "projected" if exact else "projected <"
    # A card that the table of data sheets lacks is held, as a CPU is, against what it reached in one large product.
    roofline = row["share_of_peak"] or row["share_of_matmul"]
    return Entry(
        system=f"vadit {row['recipe']}, batch {row['batch']}, {setting}",
        hardware=f"{row['hardware']} ({processes} x {row['threads']} threads)" if not on_gpu else row["hardware"],
        rate=rate,
        rate_origin="measured",
        hours=hours,
        hours_origin=origins,
        roofline=float(roofline) if roofline else None,
        source=f"bench_step.py at {row['commit']}, {row['engine']}, {row['kernels']} kernels, {row['date']}",
    )


@functools.cache
def num_weights(spec: DiTSpec) -> int:
    """Trained weights of a generator."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in LightningDiT(spec).parameters() if weight.requires_grad)


def projected_step(
    row: dict[str, str], config: DiTConfig, gpus: int, cluster: scaling.Cluster
) -> tuple[float, int, bool]:
    """Seconds of a step of the recipe on `gpus`, its images, and whether a GPU's share is made of measured steps."""
    images = config.run.batch_size
    step_s, optimizer_s = float(row["step_ms"]) / 1e3, float(row["optimizer_ms"]) / 1e3
    measured = round(float(row["images_per_s"]) * step_s / int(row["processes"]))
    micro = images / gpus / measured
    stage = int(row["engine"].rpartition(" ")[2]) if "ZeRO" in row["engine"] else 1
    weights = num_weights(config.model)
    number = memory.BF16 if row["precision"] == "bf16" else memory.FP32
    gradient = memory.BF16 if row["precision"] == "autocast" else number
    sent = sum(
        sign * scaling.messages_s(f"ZeRO {stage}", weights, number, count, cluster, gradient)
        for sign, count in ((1, gpus), (-1, int(row["processes"])))
    )
    projected_s = micro * (step_s - optimizer_s) + optimizer_s + max(sent, 0.0) * (1 - cluster.overlap)
    return projected_s, images, micro >= 1 and math.isclose(micro, round(micro))


def modelled(recipe: str, cluster: scaling.Cluster) -> Entry:
    """The recipe without a measurement: arithmetic at the cluster's MFU, messages, nothing else known."""
    config = get_recipe(recipe)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="autocast"))
    rows = [
        row
        for row in scaling.model(recipe, config, cluster, global_batch=config.run.batch_size, per_gpu=32)
        if (row.scaling, row.scheme) == ("strong", "ZeRO 1") and row.gpus in GPUS
    ]
    first = rows[0]
    return Entry(
        system=f"vadit {recipe}, if MFU is {cluster.mfu:.0%}",
        hardware=f"{cluster.peak_tflops:g} TFLOP/s a GPU",
        rate=first.images_per_s / first.gpus,
        rate_origin="projected",
        hours={row.gpus: IMAGES / row.images_per_s / 3600 for row in rows},
        hours_origin={row.gpus: "projected" for row in rows},
        roofline=first.images_per_s / first.gpus * flops.training_flops(config) / (cluster.peak_tflops * 1e12),
        source="scaling.py: a model, nothing of it measured",
    )


def newest(folder: Path) -> list[dict[str, str]]:
    """Of every hardware and setting the newest row of bench_step.py."""
    import compare

    found: dict[compare.Settings, dict[str, str]] = {}
    for path in sorted(folder.glob("steps-*.csv")):
        for row in compare.read(path):
            found[compare.settings_of(row)] = row
    return list(found.values())


def validation(path: Path) -> str:
    """What two processes said of the model of messages."""
    if not path.is_file():
        return "The messages' model is not validated: run benchmarks/scaling.py --validate."
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes, times = ([float(row["ratio"]) for row in rows if row["what"].startswith(kind)] for kind in ("bytes", "ms"))
    told = f"Messages against two processes: bytes {min(sizes):.3f} to {max(sizes):.3f} of what was counted"
    return told + (f", times {min(times):.2f} to {max(times):.2f} of what a shared CPU took." if times else ".")


# ------------------------------------------------------------------------------------------------ output

MARKS = {"measured": "", "published": "p", "projected": "~", "projected <": "<"}


def show(entries: list[Entry], folder: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="To 64 epochs of ImageNet 256 (81,920,000 images)")
    table.add_column("system", overflow="fold")
    table.add_column("hardware", overflow="fold")
    table.add_column("img/s/GPU", justify="right")
    for gpus in GPUS:
        table.add_column(f"h on {gpus}", justify="right")
    table.add_column("roofline", justify="right")
    for entry in entries:
        cells = [
            f"{entry.hours[gpus]:,.1f} {MARKS[entry.hours_origin[gpus]]}".strip() if gpus in entry.hours else "-"
            for gpus in GPUS
        ]
        rate = "-" if entry.rate is None else f"{entry.rate:,.3g} {MARKS[entry.rate_origin]}".strip()
        table.add_row(
            entry.system, entry.hardware, rate, *cells, "-" if entry.roofline is None else f"{entry.roofline:.0%}"
        )
    Console(width=120).print(table)
    print(
        "no mark: measured here; p: published; ~: projected; <: projected, better than can be. A CPU's rate is of one"
    )
    print("process, and no hours of GPUs follow from it. Sources:")
    for entry in entries:
        print(f"  {entry.system}: {entry.source}")
    print(validation(folder / "scaling-validation.csv"))


def save(entries: list[Entry], path: Path) -> None:
    """Write the table as CSV: anew each time, since all of it follows from other files."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        hours = [name for gpus in GPUS for name in (f"hours_{gpus}", f"hours_{gpus}_origin")]
        writer.writerow(["system", "hardware", "img_per_s_per_gpu", "origin", *hours, "share_of_roofline", "source"])
        for entry in entries:
            cells = [
                cell
                for gpus in GPUS
                for cell in (
                    (f"{entry.hours[gpus]:.4g}", entry.hours_origin[gpus].replace(" <", ", better than can be"))
                    if gpus in entry.hours
                    else ("", "")
                )
            ]
            rate = "" if entry.rate is None else f"{entry.rate:.4g}"
            roofline = "" if entry.roofline is None else f"{entry.roofline:.4g}"
            writer.writerow([entry.system, entry.hardware, rate, entry.rate_origin, *cells, roofline, entry.source])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=SUBJECT, help="the recipe that is modelled while no GPU row is there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of steps-*.csv")
    parser.add_argument("--no-save", action="store_true", help="print only")
    scaling.add_cluster(parser)
    options = parser.parse_args()
    cluster = scaling.cluster_of(options)
    entries = [of_published(row) for row in published()]
    entries.append(modelled(options.recipe, cluster))
    # debug twins and tokenizers have no 64 epochs to go
    rows = [row for row in newest(options.results) if row["trainer"] == "dit" and not row["recipe"].endswith("-debug")]
    entries += [of_measured(row, cluster) for row in rows]
    show(entries, options.results)
    if not options.no_save:
        save(entries, options.results / "convergence.csv")


if __name__ == "__main__":
    main()

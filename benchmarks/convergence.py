"""How long to the 64-epoch result, and on what: python benchmarks/convergence.py [--link-gbs 40] [--overlap 0] ...

Prints: system | img/s per GPU | hours to 64 epochs of ImageNet (81,920,000 images) on 8, 64 and 256 GPUs | share of the
roofline. Every number says where it is from:

    measured    rows of bench_step.py (benchmarks/results/steps-*.csv), as they are
    published   what others report, with its source; hours only where they report hours
    projected   computed here: hours of published rates are those rates times GPUs; hours of our GPU rows add the
                messages of as many GPUs to the measured step; rows without a measurement are modelled whole, and say so

Messages are those of `scaling.messages` by ZeRO stage, over links whose speeds are flags (`scaling.Cluster`). Their
bytes are checked against two real processes (scaling_validation.py), their times are not. The images of a step are the
recipe's on any number of GPUs: a GPU's share is made of micro-batches of the measured size; where the share is smaller
than what was measured, the step is taken to shrink with it, which is too good to be true, and marked "<".
A CPU's rows are shown as what they are, and never become hours of GPUs.

The roofline is arithmetic: FLOPs of the products of a training step, without recomputation, over the data sheet's dense
16-bit speed; for a CPU over a large product timed beside it. Writes benchmarks/results/convergence.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import harness
import scaling

from vadit.config import DiTConfig
from vadit.estimate.flops import PEAK_TFLOPS, training_flops
from vadit.recipes import get_recipe

IMAGES = 80_000 * 1024  # 64 epochs, as the authors count them.
GPUS = (8, 64, 256)
SUBJECT = "lightningdit-xl-64ep"
MARKS = {"measured": "", "published": " p", "projected": " ~", "projected, better than can be": " <"}
NOT_SETTINGS = ("date", "commit", "versions", "rounds", "steps", "peak_gib", "gflops_per_image")


class Published(NamedTuple):
    """What others report of their own training."""

    system: str
    recipe: str  # Ours for the same step.
    rate: float  # Images per second and GPU (TPU: chip).
    hardware: str
    peak_tflops: float | None  # Dense 16-bit speed by the data sheet; None where the hardware is not named.
    source: str
    hours_on_8: float | None = None  # Hours to 64 epochs that they report.


PUBLISHED = (
    Published("DiT-XL/2", "dit-xl2", 5.7 * 256 / 128, "TPU v3 (128 chips)", 123,
              "Peebles & Xie 2023, section 4: 5.7 steps/s of 256 images on a v3-256"),
    Published("SiT-XL/2", "sit-xl2", 6.8 * 256 / 32, "TPU v4 (32 chips)", 275,
              "Ma et al. 2024: 6.8 steps/s of 256 images on a v4-64"),
    Published("fast-DiT, DiT-XL/2", "dit-xl2", 0.84 * 128, "A100", PEAK_TFLOPS["A100"],
              "fast-DiT's README: 0.84 steps/s of 128 images, fp16, checkpointing"),
    Published("MaskDiT-XL/2", "maskdit-xl2", 2_000_000 * 1024 / (260 * 3600 * 8), "A100 (8)", PEAK_TFLOPS["A100"],
              "MaskDiT's README: 2M steps of 1024 images in 260 h on 8 GPUs"),
    Published("LightningDiT-XL/1, log", SUBJECT, 5.3 * 1024 / 32, "not named (32 GPUs)", None,
              "the authors' training log: 5.3 steps/s of 1024 images on 32 GPUs"),
    Published("LightningDiT-XL/1, headline", SUBJECT, IMAGES / (10 * 3600 * 8), "H800 (8)", PEAK_TFLOPS["H800"],
              "the authors: about 10 h on 8 H800", 10.0),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ lines of the table


def line(
    system: str, hardware: str, rate: float, origin: str, hours: dict[int, tuple[float, str]],
    roofline: float | None, source: str,
) -> dict[str, Any]:  # fmt: skip
    """A line of the CSV; `hours` with the origin of each."""
    cells: dict[str, Any] = {}
    for gpus in GPUS:
        cells[f"hours_{gpus}"], cells[f"hours_{gpus}_origin"] = hours.get(gpus, ("", ""))
    first = {"system": system, "hardware": hardware, "img_per_s_per_gpu": rate, "origin": origin}
    return first | cells | {"share_of_roofline": "" if roofline is None else roofline, "source": source}


def of_published(row: Published) -> dict[str, Any]:
    """A row of others: its rate times GPUs, where they report no hours."""
    hours = {gpus: (IMAGES / (row.rate * gpus) / 3600, "projected") for gpus in GPUS}
    if row.hours_on_8 is not None:
        hours[8] = (row.hours_on_8, "published")
    flops = training_flops(get_recipe(row.recipe))
    share = None if row.peak_tflops is None else row.rate * flops / (row.peak_tflops * 1e12)
    return line(row.system, row.hardware, row.rate, "published", hours, share, row.source)


def of_measured(row: dict[str, str], cluster: scaling.Cluster) -> dict[str, Any]:
    """A row of bench_step.py; only one of a GPU and of a generator is projected."""
    config, processes = get_recipe(row["recipe"]), int(row["processes"])
    hardware, hours = row["hardware"], {}
    if row["device"] == "cuda" and isinstance(config, DiTConfig):
        hours = {gpus: projected(row, config, gpus, cluster) for gpus in GPUS}
    elif row["device"] != "cuda":
        hardware += f" ({processes} x {row['threads']} threads)"
    setting = " ".join(filter(None, (row["precision"], "compiled" * (row["compile"] == "True"), row["settings"])))
    # A card that the table of data sheets lacks is held, as a CPU is, against what it reached in one large product.
    roofline = row["share_of_peak"] or row["share_of_matmul"]
    return line(
        f"vadit {row['recipe']}, batch {row['batch']}, {setting}", hardware, float(row["images_per_s"]) / processes,
        "measured", hours, float(roofline) if roofline else None,
        f"bench_step.py at {row['commit']}, {row['engine']}, {row['kernels']} kernels, {row['date']}",
    )  # fmt: skip


def projected(row: dict[str, str], config: DiTConfig, gpus: int, cluster: scaling.Cluster) -> tuple[float, str]:
    """Hours on `gpus`, and whether a GPU's share of a step is made of measured steps."""
    step_s, optimizer_s = float(row["step_ms"]) / 1e3, float(row["optimizer_ms"]) / 1e3
    processes, batch = int(row["processes"]), config.run.batch_size
    micro = batch / gpus / round(float(row["images_per_s"]) * step_s / processes)
    stage = int(row["engine"].rpartition(" ")[2]) if "ZeRO" in row["engine"] else 1
    engine = dataclasses.replace(config.engine, precision=row["precision"])  # type: ignore[arg-type]
    config = dataclasses.replace(config, engine=engine)
    sent = [scaling.messages_s(config, stage, count, cluster) for count in (gpus, processes)]
    seconds = micro * (step_s - optimizer_s) + optimizer_s + max(sent[0] - sent[1], 0.0) * (1 - cluster.overlap)
    exact = micro >= 1 and math.isclose(micro, round(micro))
    return IMAGES / batch * seconds / 3600, "projected" if exact else "projected, better than can be"


def modelled(recipe: str, cluster: scaling.Cluster) -> dict[str, Any]:
    """The recipe without a measurement: arithmetic at the cluster's MFU, messages, nothing else known."""
    config = get_recipe(recipe)
    if not isinstance(config, DiTConfig):
        raise SystemExit("only generators are modelled; name one with --recipe")
    rates = {
        gpus: scaling.step(config, cluster, 1, gpus, config.run.batch_size // gpus)["images_per_s"] for gpus in GPUS
    }
    rate = rates[GPUS[0]] / GPUS[0]
    return line(
        f"vadit {recipe}, if MFU is {cluster.mfu:.0%}", f"{cluster.peak_tflops:g} TFLOP/s a GPU", rate, "projected",
        {gpus: (IMAGES / each / 3600, "projected") for gpus, each in rates.items()},
        rate * training_flops(config) / (cluster.peak_tflops * 1e12), "scaling.py: a model, nothing of it measured",
    )  # fmt: skip


def newest(folder: Path) -> list[dict[str, str]]:
    """Of every hardware and setting of a generator's recipe the newest row of bench_step.py."""
    found = {}
    for path in sorted(folder.glob("steps-*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                results = (*NOT_SETTINGS, *(name for name in row if name.endswith(("_ms", "_per_s"))))
                key = tuple(value for name, value in row.items() if name not in results and "share_of" not in name)
                # debug twins and tokenizers have no 64 epochs to go, the plain loop is the measure of others
                if row["trainer"] == "dit" and row["engine"] != "plain" and not row["recipe"].endswith("-debug"):
                    found[key] = row
    return list(found.values())


# ------------------------------------------------------------------------------------------------ output


def show(lines: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="To 64 epochs of ImageNet 256 (81,920,000 images)")
    for name in ("system", "hardware"):
        table.add_column(name, overflow="fold")
    for name in ("img/s/GPU", *(f"h on {gpus}" for gpus in GPUS), "roofline"):
        table.add_column(name, justify="right")
    for each in lines:
        hours = [(each[f"hours_{gpus}"], each[f"hours_{gpus}_origin"]) for gpus in GPUS]
        cells = [f"{value:,.1f}{MARKS[origin]}" if origin else "-" for value, origin in hours]
        rate = f"{each['img_per_s_per_gpu']:,.3g}{MARKS[each['origin']]}"
        share = "-" if each["share_of_roofline"] == "" else f"{each['share_of_roofline']:.0%}"
        table.add_row(each["system"], each["hardware"], rate, *cells, share)
    Console(width=120).print(table)
    print(
        "no mark: measured here; p: published; ~: projected; <: projected, better than can be. A CPU's rate is of one\n"
        "process, and no hours of GPUs follow from it. Sources:"
    )
    for each in lines:
        print(f"  {each['system']}: {each['source']}")


def main() -> None:
    parser = scaling.arguments(__doc__)
    parser.add_argument("--recipe", default=SUBJECT, help="the recipe that is modelled while no GPU row is there")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of steps-*.csv")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    cluster = scaling.cluster_of(options)
    lines = [*map(of_published, PUBLISHED), modelled(options.recipe, cluster)]
    lines += [of_measured(row, cluster) for row in newest(options.results)]
    show(lines)
    if not options.no_save:
        harness.write(options.results / "convergence.csv", lines)


if __name__ == "__main__":
    main()

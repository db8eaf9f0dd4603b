"""Hours that a recipe takes, from step throughput that `benchmarks/bench_step.py` measured on GPUs.

Rows are in benchmarks/results of a checkout; an installed package has none. A row of another recipe counts where its
step is the same work: the same networks, objective and engine, whatever the length. CPU rows never count.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vadit.config import Config, DiTConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPU_MAKERS = ("nvidia", "tesla", "amd-instinct", "amd-radeon")
"""How torch's names of GPUs begin, as in the names of the result files."""


@dataclass(frozen=True)
class Throughput:
    """Training steps of one recipe on one kind of GPU."""

    work: tuple[object, ...]
    """What `work` of the measured recipe gave."""
    hardware: str
    processes: int
    images_per_s: float
    """Per GPU."""

    def hours(self, images: int, gpus: int) -> float:
        """Of `images` on so many GPUs, each as fast as those measured: waiting for more messages is not in it."""
        return images / (self.images_per_s * gpus) / 3600


def work(config: Config) -> tuple[object, ...]:
    """What decides the cost of an image in training."""
    if isinstance(config, DiTConfig):
        aligned = config.repa if config.repa.weight > 0 else None
        disperses = config.flow.dispersive_weight > 0
        objective = (config.flow.objective, disperses, aligned, config.mask)
        return (config.model, objective, config.engine, config.optimizer.kind)
    aligns = config.loss.vf_weight > 0
    judged = config.loss.disc_weight > 0, config.loss.perceptual_weight > 0
    return (config.autoencoder, config.foundation.name, aligns, judged, config.engine, config.optimizer.kind)


def throughputs(folder: Path | None = None) -> list[Throughput]:
    """All GPU rows of recipes as they are, but for micro-batch, compilation and kernels, which each may choose."""
    found = []
    for path in sorted((folder or RESULTS).glob("steps-*.csv")):
        if path.stem.removeprefix("steps-").startswith(GPU_MAKERS):
            found += list(_rows(path))
    return found


def best(config: Config, rows: list[Throughput]) -> Throughput | None:
    """The fastest of `rows` for this config's work."""
    fitting = [row for row in rows if row.work == work(config)]
    return max(fitting, key=lambda row: row.images_per_s, default=None)


def _rows(path: Path) -> Iterator[Throughput]:
    from vadit.recipes import PAPER_RECIPES, SHORT_NAMES

    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            recipe = PAPER_RECIPES.get(SHORT_NAMES.get(row["recipe"], row["recipe"]))
            if recipe is None or row["settings"]:
                continue
            config = recipe()
            if row["precision"] == config.engine.precision and row["engine"] == "deepspeed":
                processes = int(row["processes"])
                yield Throughput(work(config), row["hardware"], processes, float(row["images_per_s"]) / processes)

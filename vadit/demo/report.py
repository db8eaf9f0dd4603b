"""The demo's pictures, its numbers in the folders of its runs, and the page that `vadit report` makes of them."""

from pathlib import Path
from typing import Any

import numpy as np

from vadit.demo.data import DemoData
from vadit.eval.samples import named
from vadit.images.pixels import image_grid, reconstruction_pairs, write_png
from vadit.report.sections import write_runs_report
from vadit.runtime.files import save_json
from vadit.runtime.npz_files import Npz

COLUMNS = 10  # one column per class: labels of balanced samples go round
ROWS = 8

LEAD = (
    "Everything here was made on this machine, from nothing, by the code that trains on a cluster: a small vision "
    "foundation model, a VA-VAE tokenizer aligned to it, its latents, and a LightningDiT that generates new ones."
)


def write(
    out: Path, data: DemoData, metrics: dict[str, Any], *, plain: Path, guided: Path, reconstructions: np.ndarray
) -> None:
    """Write samples.png, samples-plain.png, reconstructions.png and report.html into `out`.

    `reconstructions` uint8 (n, H, W, 3) are those of the first n held-out images; `plain` and `guided` are .npz files.
    """
    for name, npz in (("samples", guided), ("samples-plain", plain)):
        images = Npz(npz).array("arr_0", (None, None, None, 3), "u")[: COLUMNS * ROWS]
        write_png(out / f"{name}.png", image_grid(images, columns=COLUMNS, scale=2))
    originals = data.held_out_images[: len(reconstructions)]
    write_png(out / "reconstructions.png", reconstruction_pairs(originals, reconstructions, columns=12))
    of_samples: dict[str, float] = {}
    for name, found in metrics.items():
        if name.startswith("samples_"):
            _, count, sampler = name.split("_", 2)
            of_samples |= named(found, int(count), sampler)
    judge = f"an independent classifier, right on {metrics['judge_accuracy_held_out']:.1%} of real images"
    held_out = {"num_images": len(data.held_out_images)}
    for run, kind, scores, inputs in (
        ("generator", "samples", of_samples, {"judge": judge}),
        ("tokenizer", "tokenizer", metrics["tokenizer"], held_out),
    ):
        save_json(out / run / "metrics.json", {"kind": kind, "metrics": scores, "inputs": inputs})
    write_runs_report([out], out / "report.html", LEAD)

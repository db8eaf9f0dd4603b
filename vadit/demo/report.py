"""The demo's pictures and its report: what someone looks at when it is done."""

from pathlib import Path
from typing import Any

import numpy as np

from vadit.demo.data import DemoData
from vadit.images.pixels import image_grid, reconstruction_pairs, write_png
from vadit.report.page import Section, write_report
from vadit.report.runs import read_runs
from vadit.report.sections import quantity_charts
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
    _save_grid(out / "samples.png", guided)
    _save_grid(out / "samples-plain.png", plain)
    originals = data.held_out_images[: len(reconstructions)]
    write_png(out / "reconstructions.png", reconstruction_pairs(originals, reconstructions, columns=12))
    scores = [
        (f"{name.removeprefix('samples_')} {key}", f"{value:.3f}")
        for name, found in metrics.items()
        if name.startswith("samples_")
        for key, value in found.items()
    ]
    samples = Section(
        title="Samples",
        images=[
            (f"With guidance. One column per class: {', '.join(data.classes)}.", out / "samples.png"),
            ("Without guidance.", out / "samples-plain.png"),
        ],
        table=scores,
        text="The judge is a classifier that shares nothing with generator or foundation model; agreement is the "
        "share of samples that it reads as the class they were asked to be. Distances are in its features.",
    )
    tokenizer = Section(
        title="Tokenizer (VA-VAE)",
        images=[("Images that no network saw in training.", out / "reconstructions.png")],
        table=[(key, f"{value:.3f}") for key, value in metrics["tokenizer"].items()],
        **_logged(out / "tokenizer"),
    )
    generator = Section(title="Generator (LightningDiT)", **_logged(out / "generator"))
    write_report(out / "report.html", "vadit demo", LEAD, [samples, tokenizer, generator])


def _logged(run: Path) -> dict[str, Any]:
    """Every quantity that a run logged, and its settings."""
    return {"charts": quantity_charts(read_runs([run])), "settings": [("All settings", run / "config.json")]}


def _save_grid(path: Path, npz: Path) -> None:
    images = Npz(npz).array("arr_0", (None, None, None, 3), "u")[: COLUMNS * ROWS]
    write_png(path, image_grid(images, columns=COLUMNS, scale=2))

"""vadit demo: the whole system in small."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vadit.config.ranges import Checked, PathName, Seed
from vadit.runtime.files import check_output


@dataclass(frozen=True)
class DemoOptions(Checked):
    """The whole system in small: train, encode, sample and evaluate on real pictures, on any machine."""

    out: PathName = "runs/demo"  # Folder for everything that is made; the same command goes on from what is there.
    data: Literal["digits", "photos"] = "digits"
    """digits: 1,797 scanned handwritten digits; photos: crops of photographs, blurred after so few steps."""
    seed: Seed = 0  # Seed of every network but the judge, and of the samples.
    quick: bool = False  # A quarter of the training steps: everything runs, the pictures are worse.


def run(options: DemoOptions) -> None:
    """Run the demo."""
    check_output("--out", options.out)
    from vadit.demo.run import run_demo
    from vadit.runtime.owner import owned
    from vadit.train import engine

    try:
        with owned(options.out, "set another --out"):
            run_demo(Path(options.out), options.data, quick=options.quick, seed=options.seed)
    finally:
        engine.finish()

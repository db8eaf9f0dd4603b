"""The demo by seeds: python benchmarks/demo_seeds.py [--seeds 0 1 2 3 4]. Rows: results/demo-seeds.csv."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

SCORES = ("agreement", "frechet", "precision", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "vadit", "demo", "--out", f"{folder}/demo", "--seed", str(seed)]
            subprocess.run(command, check=True, cwd=harness.HERE.parent, stdout=subprocess.DEVNULL)
            metrics = json.loads(Path(folder, "demo/metrics.json").read_text())
        plain, guided = (scores for name, scores in metrics.items() if name.startswith("samples_"))
        row = harness.stamp("cpu", ("../csrc", "../kernels", "../vadit"), "deepspeed") | {
            "seed": seed,
            **{name: round(plain[name], 4) for name in SCORES},
            **{f"guided_{name}": round(guided[name], 4) for name in SCORES},
            "psnr": round(metrics["tokenizer"]["psnr"], 2),
            "seconds": metrics["seconds_this_start"],
        }
        harness.append(harness.RESULTS / "demo-seeds.csv", [row])
        print(
            " ".join(f"{name} {row[name]}" for name in ("seed", "agreement", "frechet", "psnr", "seconds")), flush=True
        )


if __name__ == "__main__":
    main()

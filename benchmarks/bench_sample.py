"""vadit's sampler against a plain one: the same weights, noise, labels and Euler steps, with the paper's guidance.

    python benchmarks/bench_sample.py [--device cpu|cuda] [--recipe NAME] [--images N] [--precision fp32 tf32 bf16]

"plain" is what the authors' script does (`plain_networks`): eager, both halves of guidance at every step, in TF32 on a
GPU and fp32 on a CPU. The two take turns; medians of seconds, and of the ratios of neighbours. In fp32 both must agree
to 1e-5. A row per case goes to benchmarks/results/sampling-HARDWARE.csv. Runs from a bare checkout: PYTHONPATH=.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from typing import Any

import harness
import torch
from plain_networks import PlainDiT, plain_samples

from vadit.config import SampleSpec
from vadit.models.dit import LightningDiT
from vadit.recipes import get_recipe
from vadit.runtime.compiled import compile_each
from vadit.runtime.precision import Precision, as_computed, computing
from vadit.sampling.solvers import sample_ode

AGREE = 1e-5  # largest difference of fp32 latents over the largest latent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", help="generator; default: XL on a GPU, B on a CPU, small in a rehearsal")
    parser.add_argument("--images", type=int, help="samples at once; default: 64 on a GPU, 4 on a CPU")
    parser.add_argument("--points", type=int, help="of the time grid, one more than steps; default: 8 on a GPU, 16")
    parser.add_argument("--precision", nargs="*", choices=("fp32", "tf32", "bf16"))
    parser.add_argument("--compile", nargs="*", choices=("off", "on"), default=["off"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    small = "-debug" if os.environ.get("VADIT_REHEARSE") else ""
    options.recipe = options.recipe or ("lightningdit-xl-64ep" if on_gpu else f"lightningdit-b{small}")
    options.images, options.points = options.images or (64 if on_gpu else 4), options.points or (8 if on_gpu else 16)
    options.precision = options.precision or (["tf32", "bf16"] if on_gpu else ["fp32"])
    return options


def networks(recipe: str, device: str) -> tuple[LightningDiT, PlainDiT]:
    """Ours and the plain one, of equal random weights; the last layers begin at zero, which would hide the others."""
    spec = get_recipe(recipe).model
    ours = LightningDiT(spec).eval()
    for weight in ours.parameters():
        if weight.requires_grad and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    plain = PlainDiT(spec).eval()
    plain.load_state_dict(ours.state_dict())
    return ours.to(device), plain.to(device)


def measure(options: argparse.Namespace, precision: Precision, compiled: bool) -> dict[str, Any]:
    """The row of one case."""
    torch.manual_seed(0)
    (ours, plain), device = networks(options.recipe, options.device), options.device
    guidance = {"cfg_scale": 4.0, "cfg_interval": (0.11, 1.0), "cfg_channels": 3}
    spec = SampleSpec(num_steps=options.points, timestep_shift=0.3, **guidance)
    side, found = ours.spec.input_size, {}
    noise = torch.randn(options.images, ours.in_channels, side, side).to(device)
    labels = torch.randint(ours.num_classes, (options.images,)).to(device)
    network = as_computed(ours, precision)
    if compiled:
        compile_each(network.compiled_blocks)
    allowed: Precision = "tf32" if device == "cuda" and precision != "fp32" else "fp32"

    def draw() -> None:
        with computing(precision, device):
            found["vadit"] = sample_ode(network, noise, labels, spec)

    @torch.no_grad()
    def draw_plainly() -> None:
        with computing(allowed, device):
            found["plain"] = plain_samples(plain, noise, labels, spec)

    calls, clock = {"vadit": draw, "plain": draw_plainly}, harness.Clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(1 + options.rounds):  # the first one warms up
        for name, call in calls.items():
            elapsed_s = clock(call, 1) / 1e3
            times[name] += [elapsed_s] if number else []
    difference = float((found["vadit"] - found["plain"]).abs().max() / found["plain"].abs().max())
    if precision == "fp32" and difference > AGREE:
        raise SystemExit(f"the samplers differ by {difference:.2g} of the largest latent, more than {AGREE:g}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [plain / own for own, plain in zip(times["vadit"], times["plain"], strict=True)]
    return harness.stamp(device, ("../vadit", "../kernels", "*.py")) | {
        "recipe": options.recipe, "images": options.images, "points": options.points, "precision": precision,
        "compile": compiled, "threads": options.threads, "vadit_s": round(medians["vadit"], 4),
        "plain_s": round(medians["plain"], 4),
        "plain_over_vadit": round(statistics.median(ratios), 3), "difference": f"{difference:.2g}",
        "images_per_s": round(options.images / medians["vadit"], 3), "rounds": options.rounds,
    }  # fmt: skip


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    for precision, compiled in itertools.product(options.precision, options.compile):
        row = measure(options, precision, compiled == "on")
        print(", ".join(f"{name} {row[name]}" for name in list(row)[4:]), flush=True)
        if not options.no_save:
            harness.append(harness.RESULTS / f"sampling-{row['hardware']}.csv", [row])


if __name__ == "__main__":
    main()

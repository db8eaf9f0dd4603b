"""`vadit demo --compare`: the tokenizer with and without the VF loss, all else equal, over several seeds.

A difference is called one only where a paired t-test over the seeds, corrected for the number of quantities (Holm),
gives p < 0.05. Otherwise the table says that these seeds do not tell the two apart: at this size they may well not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from scipy.stats import ttest_rel

from vadit.runtime.console import console
from vadit.runtime.errors import UsageError

if TYPE_CHECKING:
    from vadit.demo.networks import Judge
    from vadit.demo.run import Demo

VARIANTS = {"plain": 0.0, "vf": 0.1}
"""Name and weight of the VF loss."""
SIGNIFICANCE = 0.05
LAST_POINTS = 5
"""Log points at the end of the generator's run whose mean is its loss."""


def run_comparison(demo: Demo, judge: Judge) -> None:
    """Train, measure, print and write comparison.json."""
    seeds = demo.options.seeds
    if seeds < 2:
        raise UsageError(f"--seeds is {seeds}; a spread needs at least 2")
    scores = {name: [_measure(demo, judge, name, seed) for seed in range(seeds)] for name in VARIANTS}
    quantities = list(scores["vf"][0])
    values = {
        quantity: {name: [run[quantity] for run in runs] for name, runs in scores.items()} for quantity in quantities
    }
    p_values = holm([_p_value(values[quantity]["plain"], values[quantity]["vf"]) for quantity in quantities])
    table = Table(
        title=f"with and without the VF loss, {seeds} seeds, mean +- standard deviation", title_justify="left"
    )
    for column in ("quantity", "without VF", "with VF", "p (Holm)", "verdict"):
        table.add_column(column, justify="left" if column in ("quantity", "verdict") else "right")
    rows: dict[str, dict[str, object]] = {}
    for quantity, p in zip(quantities, p_values, strict=True):
        means = {
            name: (float(np.mean(found)), float(np.std(found, ddof=1))) for name, found in values[quantity].items()
        }
        said = verdict(means, p)
        rows[quantity] = {"values": values[quantity], "mean_and_std": means, "p_holm": p, "verdict": said}
        cells = (f"{means[name][0]:.4g} +- {means[name][1]:.2g}" for name in VARIANTS)
        table.add_row(quantity, *cells, f"{p:.2f}", said)
    path = demo.out / "comparison.json"
    path.write_text(json.dumps({"seeds": seeds, "quantities": rows}, indent=2) + "\n")
    console.print(table)
    console.print(f"  {path}")


def _measure(demo: Demo, judge: Judge, variant: str, seed: int) -> dict[str, float]:
    """Train one tokenizer and one generator, and measure both."""
    suffix = f"-{variant}-{seed}"
    result = demo.out / f"result{suffix}.json"
    if result.is_file():
        found: dict[str, float] = json.loads(result.read_text())
        return found
    tokenizer_run = demo.tokenizer("tokenizer" + suffix, vf_weight=VARIANTS[variant], seed=seed)
    latents = demo.latents(tokenizer_run, "latents" + suffix)
    generator = demo.generator(latents, "generator" + suffix, seed=seed)
    npz = demo.samples(generator, tokenizer_run, latents, "samples" + suffix, cfg_scale=1.0, seed=seed)
    scores = {
        **{f"tokenizer {name}": value for name, value in demo.judge_tokenizer(tokenizer_run, latents).items()},
        "generator loss": _last_loss(generator / "log.jsonl"),
        **{f"samples {name}": value for name, value in demo.judge_samples(judge, npz).items()},
    }
    result.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def _last_loss(log: Path) -> float:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return float(np.mean([line["loss"] for line in lines[-LAST_POINTS:]]))


def _p_value(before: list[float], after: list[float]) -> float:
    """Two-sided paired t-test; equal values everywhere are no difference."""
    if np.allclose(before, after):
        return 1.0
    return float(ttest_rel(before, after).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction: p-values that can each be compared with the one significance level."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def verdict(means: dict[str, tuple[float, float]], p: float) -> str:
    """What may be said of one quantity."""
    if p >= SIGNIFICANCE:
        return "not told apart by these seeds"
    return "higher with VF" if means["vf"][0] > means["plain"][0] else "lower with VF"

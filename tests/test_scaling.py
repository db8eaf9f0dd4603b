"""benchmarks/scaling.py: bytes against two processes, "modelled" on every row."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from vadit.recipes import get_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules, as its script finds them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling
    import scaling_validation

    yield scaling, scaling_validation
    for name in ("scaling", "scaling_validation"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    ("stage", "accumulation"),
    [
        pytest.param(1, 1, id="ZeRO 1"),
        pytest.param(3, 2, marks=pytest.mark.faults, id="ZeRO 3, two micro-batches"),
        pytest.param(0, 1, marks=pytest.mark.faults, id="ZeRO 0"),
        pytest.param(2, 2, marks=pytest.mark.faults, id="ZeRO 2, two micro-batches"),
        pytest.param(3, 1, marks=pytest.mark.faults, id="ZeRO 3"),
    ],
)
def test_bytes_are_what_two_processes_send(stage: int, accumulation: int, modules: Any) -> None:
    validation = modules[-1]
    found = validation.launch(2, stage=stage, precision="fp32", accumulation=accumulation, steps=2, gloo=False)
    rows = validation.compare(stage, "fp32", accumulation, found)
    assert {row["what"] for row in rows} >= {"bytes of all_gather" if stage else "bytes of all_reduce"}
    for row in rows:
        # ZeRO 3 pads each weight to the number of processes, and flags below 4 KiB are not counted.
        assert row["formula"] == pytest.approx(row["measured"], rel=0.005 if stage == 3 else 0), row


def test_rings(modules: Any) -> None:
    scaling = modules[0]
    cluster = scaling.Cluster(nvlink_gbs=100, link_gbs=10, nvlink_us=0, link_us=0)
    # Each of 8 GPUs receives 7 eighths; over 2 nodes the 8 adapters of a node carry 15 sixteenths together.
    assert cluster.collective_s(8e9, 8) == pytest.approx(7e9 / 100e9)
    assert cluster.collective_s(16e9, 16) == pytest.approx(15e9 / 80e9)
    assert cluster.collective_s(16e9, 16, passes=2) == pytest.approx(30e9 / 80e9)
    slow = scaling.Cluster(nvlink_us=1, link_us=10)
    assert slow.collective_s(0, 16) == pytest.approx((14 * 1 + 2 * 10) * 1e-6)


def test_what_was_modelled_says_so(modules: Any, tmp_path: Path) -> None:
    scaling = modules[0]
    config = get_recipe("lightningdit-b-debug")
    rows = scaling.model("lightningdit-b-debug", config, scaling.Cluster(), global_batch=1024, per_gpu=4)
    scaling.save(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert {row["origin"] for row in csv.DictReader(file)} == {"modelled"}
    assert {(row.scheme, row.gpus) for row in rows} == {(s, g) for s in scaling.SCHEMES for g in scaling.GPUS}
    assert scaling.advice(rows, 80).startswith("Modelled")
    first, last = (next(r for r in rows if r.scaling == "strong" and r.gpus == gpus) for gpus in (8, 1024))
    assert first.images_per_gpu == 128 and last.images_per_gpu == 1 and last.efficiency < first.efficiency == 1

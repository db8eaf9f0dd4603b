"""benchmarks/scaling.py: bytes against two processes, rings, and that nothing modelled looks measured."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from vadit.config import DiTConfig
from vadit.recipes import get_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's module by name, as its script finds it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__
    for name in ("scaling", "scaling_validation", "harness"):
        sys.modules.pop(name, None)


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
def test_bytes_are_what_two_processes_send(stage: int, accumulation: int, load: Any) -> None:
    rows = load("scaling_validation").compare(stage, "fp32", accumulation)
    assert {row["what"] for row in rows} >= {"bytes of all_gather" if stage else "bytes of all_reduce"}
    for row in rows:
        # ZeRO 3 pads each weight to the number of processes, and flags below 4 KiB are not counted.
        assert row["formula"] == pytest.approx(row["measured"], rel=0.005 if stage == 3 else 0), row


def test_rings(load: Any) -> None:
    scaling = load("scaling")
    cluster = scaling.Cluster(nvlink_gbs=100, link_gbs=10, nvlink_us=0, link_us=0)
    # Each of 8 GPUs receives 7 eighths; over 2 nodes the 8 adapters of a node carry 15 sixteenths together.
    assert cluster.collective_s(8e9, 8) == pytest.approx(7e9 / 100e9)
    assert cluster.collective_s(16e9, 16) == pytest.approx(15e9 / 80e9)
    assert cluster.collective_s(16e9, 16, passes=2) == pytest.approx(30e9 / 80e9)
    slow = scaling.Cluster(nvlink_us=1, link_us=10)
    assert slow.collective_s(0, 16) == pytest.approx((14 * 1 + 2 * 10) * 1e-6)


def test_a_step_is_arithmetic_optimizer_and_what_nothing_hides(load: Any) -> None:
    scaling = load("scaling")
    config = get_recipe("lightningdit-xl-64ep")
    assert isinstance(config, DiTConfig)
    cluster = scaling.Cluster(peak_tflops=1000, mfu=0.5, memory_gbs=1000, nvlink_us=0, overlap=0.25)
    row = scaling.step(config, cluster, 1, 8, 100)
    weights = scaling.num_weights(config.model, config.mask)
    assert weights == pytest.approx(675e6, rel=0.01)
    assert row["arithmetic_ms"] == pytest.approx(100 * 3 * 237.25e9 / 500e12 * 1e3, rel=1e-3)
    assert row["optimizer_ms"] == pytest.approx(weights / 8 * 36 / 1e12 * 1e3)
    # autocast: bf16 gradients all-reduced, fp32 weights gathered
    assert row["messages_ms"] == pytest.approx((2 * 2 + 4) * weights * 7 / 8 / 360e9 * 1e3, rel=1e-3)
    hidden = row["arithmetic_ms"] + row["optimizer_ms"] + 0.75 * row["messages_ms"]
    assert row["step_ms"] == pytest.approx(hidden) and row["images_per_s"] == pytest.approx(800 / hidden * 1e3)
    low = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision="bf16"))
    assert scaling.messages_s(low, 1, 8, cluster) / scaling.messages_s(config, 1, 8, cluster) == pytest.approx(6 / 8)
    assert scaling.step(config, cluster, 1, 8, 1)["arithmetic_ms"] == cluster.launch_ms


def test_what_was_modelled_says_so(load: Any) -> None:
    scaling = load("scaling")
    config = get_recipe("lightningdit-b-debug")
    rows = scaling.model("lightningdit-b-debug", config, scaling.Cluster(), global_batch=512, per_gpu=4)
    assert {row["origin"] for row in rows} == {"modelled"}
    counts = {("strong", gpus, 512 // gpus) for gpus in scaling.GPUS[:-1]} | {
        ("weak", gpus, 4) for gpus in scaling.GPUS
    }
    assert {(row["scaling"], row["gpus"], row["images_per_gpu"]) for row in rows} == counts
    assert len(rows) == 3 * len(counts)
    first, last = (next(r for r in rows if r["scaling"] == "strong" and r["gpus"] == gpus) for gpus in (8, 512))
    assert last["efficiency"] < first["efficiency"] == 1

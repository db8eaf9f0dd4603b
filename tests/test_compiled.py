"""Runs that are the same again to the bit, and blocks that are compiled once and never again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_help import events, faulty, newest, same
from torch import Tensor, nn
from training_plain import BATCH, logged, tiny_dit, tiny_tokenizer

from vadit.train import dit, tokenizer
from vadit.train.engine import Engine
from vadit.train.guard import Guard

EVERY_STEP = {"save_every_images": BATCH, "keep_checkpoints": 9}


def test_a_deterministic_run_is_the_same_to_the_bit(tmp_path: Path) -> None:
    try:
        for name in ("one", "other"):
            dit.train(tiny_dit(tmp_path / f"dit-{name}", run={"deterministic": True}))
            tokenizer.train(tiny_tokenizer(tmp_path / f"vae-{name}", steps=2, run={"deterministic": True}))
            assert torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)
    finally:
        torch.use_deterministic_algorithms(False)
    for network in ("dit", "vae"):
        one, other = tmp_path / f"{network}-one", tmp_path / f"{network}-other"
        assert logged(one) == logged(other)
        assert same(newest(one), newest(other))


def compiled(monkeypatch: pytest.MonkeyPatch, train: Callable[[], object]) -> tuple[int, list[int]]:
    """Blocks that were compiled while `train` ran, and the graphs that dynamo had made after each of its steps."""
    torch._dynamo.reset()
    blocks, graphs, after = 0, 0, []
    original, compile_one = Guard.step, torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def compile_with(function: Any, **options: Any) -> Any:
        nonlocal blocks
        if not isinstance(getattr(function, "__self__", None), nn.Module):  # what torch compiles of its own
            return compile_one(function, **options)
        blocks += 1
        return compile_one(function, backend=backend, fullgraph=True)  # more graphs than the limit would be an error

    def step(guard: Guard, engines: dict[str, Engine]) -> bool:
        applied = original(guard, engines)
        after.append(graphs)
        return applied

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", compile_with)
        patch.setattr(Guard, "step", step)
        train()
    torch._dynamo.reset()
    return blocks, after


@pytest.mark.parametrize(
    ("network", "zero_stage"), [("dit", 1), pytest.param("dit", 3, marks=pytest.mark.faults), ("tokenizer", 2)]
)
def test_blocks_are_compiled_once(
    network: str, zero_stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: dict[str, Any] = {"zero_stage": zero_stage, "compile": True}
    if network == "dit":
        faulty(monkeypatch, lambda call: call == 3)
        config = tiny_dit(tmp_path / "compiled", run=EVERY_STEP, **engine)
        blocks, graphs = compiled(monkeypatch, lambda: dit.train(config))
        assert blocks == 2 and graphs == [1] * 5  # both have the same shapes
    else:
        faulty_images(monkeypatch)
        small = tiny_tokenizer(tmp_path / "compiled", run=EVERY_STEP, **engine)
        blocks, graphs = compiled(monkeypatch, lambda: tokenizer.train(small))
        assert blocks > 20 and graphs[0] > 1 and graphs == [graphs[0]] * 4
    assert len(events(tmp_path / "compiled")) == 1


def test_compiled_blocks_train_as_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in ("plain", "compiled"):
        config = tiny_dit(tmp_path / name, zero_stage=3, compile=name == "compiled")
        compiled(monkeypatch, lambda config=config: dit.train(config))  # type: ignore[misc]
        found.append(logged(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def faulty_images(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = tokenizer.generator_step, 0

    def broken(networks: Any, loss: Any, images: Tensor, *, adversarial: bool) -> Any:
        nonlocal calls
        calls += 1
        return original(networks, loss, images * (math.nan if calls == 2 else 1), adversarial=adversarial)

    monkeypatch.setattr(tokenizer, "generator_step", broken)

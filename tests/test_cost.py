"""What a compiled step launches, moves and keeps on a GPU stays within its budget; counted without one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vadit.estimate.flops import dit_flops
from vadit.recipes import get_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RENEW = """
If the step is meant to take that: python benchmarks/bench_cost.py --precision bf16 autocast --budget"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__("bench_cost")


def test_it_finds_its_neighbours_on_a_safe_path() -> None:
    command = [sys.executable, "-P", str(BENCHMARKS / "bench_cost.py"), "--recipe", "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown recipe 'none'" in done.stderr


def test_settings_that_are_refused_are_refused_before_anything_is_counted(bench: Any, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "rows_of", lambda *_: pytest.fail("counted"))
    for given in (["--batch", "0"], ["--batch", "8", "-4"], ["--with", "model.depth=0"], ["--with", "nonsense"]):
        monkeypatch.setattr(sys, "argv", ["bench_cost.py", *given])
        assert pytest.raises(SystemExit, bench.main).value.code == 2, given
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("bench_cost.py: error: ")


def test_a_step_stays_within_its_budget(bench: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("the virtual GPU is for machines without one")
    committed = json.loads(bench.BUDGET.read_text())
    if committed["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(
            f"the budget is torch {committed['torch']}'s, whose compiler fuses otherwise than {torch.__version__}'s"
        )
    recipe, over = "lightningdit-xl-64ep", []
    for precision, budget in committed["steps"].items():
        case = bench.Case(recipe, "train", 128, precision, "triton", True)
        try:
            ((row, *_),) = bench.rows_of(case, bench.Ceilings())
        except bench.OtherInternals as error:
            pytest.skip(str(error))
        # three passes' products, counted otherwise; attention has half a pass more, some ends have no gradient
        assert row["tflop"] == pytest.approx(3 * 128 * dit_flops(get_recipe(recipe).model) / 1e12, rel=0.01)
        assert (
            row["host_waits"] == row["graph_breaks"] == row["recompilations"] == 0 and row["optimizer_host_waits"] <= 1
        )
        over += bench.over_budget(row, budget)
        for name in bench.LIMITED:  # growth is seen
            assert len(bench.over_budget(row, row | {name: row[name] / 1.03 - 0.01})) == 1, name
    assert not over, "\n".join(over) + RENEW

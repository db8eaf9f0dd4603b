"""Hours in the list of recipes: from which measured rows, and from which not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vadit.recipes import get_recipe
from vadit.recipes.measured import best, throughputs


def test_hours_come_from_rows_of_gpus_alone(tmp_path: Path) -> None:
    header = "hardware,processes,recipe,engine,precision,settings,images_per_s"
    rows = {
        "steps-nvidia-h100-80gb-hbm3.csv": [
            "nvidia-h100-80gb-hbm3,8,lightningdit-xl-64ep,deepspeed,autocast,,2000",
            "nvidia-h100-80gb-hbm3,8,lightningdit-xl-64ep,deepspeed,autocast,,1600",
            "nvidia-h100-80gb-hbm3,1,lightningdit-xl-64ep,torch,autocast,,900",  # another engine
            "nvidia-h100-80gb-hbm3,1,lightningdit-xl-64ep,deepspeed,bf16,,900",  # another precision
            "nvidia-h100-80gb-hbm3,1,lightningdit-xl-64ep,deepspeed,autocast,model.depth=2,900",  # another model
            "nvidia-h100-80gb-hbm3,1,lightningdit-b-debug,deepspeed,fp32,,90000",
        ],
        "steps-amd-epyc-avx2.csv": ["amd-epyc-avx2,1,lightningdit-xl-64ep,deepspeed,autocast,,9999"],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("\n".join([header, *lines]) + "\n")
    found = throughputs(tmp_path)
    headline = best(get_recipe("lightningdit-xl-64ep"), found)
    assert headline is not None and headline.images_per_s == 250
    assert headline.hours(81_920_000, 8) == pytest.approx(81_920_000 / 2000 / 3600)
    assert best(get_recipe("lightningdit-xl-800ep"), found) == headline  # the same step
    for other in ("lightningdit-b", "lightningdit-xl-f16d64", "lightningdit-xl-beyond", "table1-08-rope"):
        assert best(get_recipe(other), found) is None, other
    assert throughputs(tmp_path / "absent") == []

"""What an evaluation gives: means over seeds as a table, and as a JSON file with what they rest on."""

import statistics
from pathlib import Path
from typing import Any

from vadit.runtime import distributed
from vadit.runtime.console import say
from vadit.runtime.files import save_json


def report(kind: str, found: list[dict[str, float]], inputs: dict[str, Any], out: str | None) -> None:
    """Print the means of the numbers, one dict per seed, from the first process, and write them to `out`.

    The file holds kind, metrics, spread (standard deviation between seeds, where there are several) and inputs.
    """
    if not distributed.is_main():
        return
    metrics = {name: statistics.fmean(each[name] for each in found) for name in found[0]}
    spread = {name: statistics.stdev(each[name] for each in found) for name in metrics} if len(found) > 1 else {}
    width = max(map(len, metrics))
    for name, value in metrics.items():
        say(f"{name:<{width}}  {value:.6g}" + (f" +- {spread[name]:.2g}" if spread else ""))
    if spread:
        say(f"mean of {len(found)} +- standard deviation between them")
    if out is not None:
        content = {"kind": kind, "metrics": metrics, **({"spread": spread} if spread else {}), "inputs": inputs}
        save_json(Path(out), content, "set --out to a place with room")

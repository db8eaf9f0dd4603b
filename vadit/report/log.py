"""The files that runs leave, read for the report: log.jsonl, evaluations.jsonl and metrics*.json, damaged or not."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vadit.report.charts import Curve
from vadit.runtime.errors import RunError
from vadit.runtime.json_files import parse_json, read_json
from vadit.runtime.reading import read_lines


@dataclass
class Log:
    """The quantities of a log.jsonl by name, over images."""

    curves: dict[str, Curve] = field(default_factory=dict)
    skipped_lines: int = 0  # those that are no JSON objects with a count of images (a process killed while it wrote)
    lines: list[dict[str, Any]] = field(default_factory=list)
    """What is no number in a line (a path), by line; empty for log.jsonl, which has numbers only."""

    @property
    def images(self) -> float:
        """Images at the last point; 0 without points."""
        return max((float(curve.x[-1]) for curve in self.curves.values()), default=0.0)


def read_log(path: Path, before: float = 0.0) -> Log:
    """Read a log.jsonl or an evaluations.jsonl; where a resumed run was there before, the later lines count.

    before: images that were trained on before it, in the earlier stages of the run.
    """
    log = Log()
    lines: list[dict[str, Any]] = []
    # read line by line: a log of 80,000 points has 40 MB
    with path.open("rb") as stream:
        for text in read_lines(stream):
            line = _line(text)
            if line is None:
                log.skipped_lines += 1
                continue
            line["images"] += before
            while lines and lines[-1]["images"] >= line["images"]:
                lines.pop()
            lines.append(line)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        words = {name: value for name, value in line.items() if not isinstance(value, float)}
        if words:
            log.lines.append({"images": line["images"], **words})
        for name, value in line.items():
            if name not in words and name not in ("images", "step"):
                points[name].append((line["images"], value))
    log.curves = {name: Curve(*np.array(found).T) for name, found in points.items()}
    return log


def join_logs(logs: Sequence[Log]) -> Log:
    """The logs of a run's stages as one."""
    curves = {}
    for name in dict.fromkeys(name for log in logs for name in log.curves):
        found = [log.curves[name] for log in logs if name in log.curves]
        curves[name] = Curve(np.concatenate([each.x for each in found]), np.concatenate([each.y for each in found]))
    return Log(curves, sum(log.skipped_lines for log in logs), [line for log in logs for line in log.lines])


@dataclass(frozen=True)
class Scores:
    """One metrics.json of `vadit evaluate`."""

    kind: str  # samples, tokenizer or latents
    metrics: dict[str, Any]
    spread: dict[str, Any] = field(default_factory=dict)  # standard deviation over seeds, where there were several
    inputs: dict[str, Any] = field(default_factory=dict)  # what the numbers rest on


def read_scores(folder: Path) -> tuple[list[Scores], list[str]]:
    """The metrics*.json of a run folder, and a sentence for each that is none."""
    found, notes = [], []
    for path in sorted(folder.glob("metrics*.json")):
        try:
            scores = read_json(path, Scores, allow_nan=True)
        except RunError:
            notes.append(f"{path} is not what `vadit evaluate --out` writes, or is damaged; it was left out.")
            continue
        found.append(replace(scores, metrics=_finite(scores.metrics), spread=_finite(scores.spread)))
    return found, notes


def _finite(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in _floats(values).items() if type(value) is float and math.isfinite(value)}


def _line(text: bytes) -> dict[str, Any] | None:
    """A line of a log, all of its numbers floats, or None where it is damaged."""
    try:
        line = _floats(parse_json(text, dict[str, Any], "", allow_nan=True))
    except RunError:
        return None
    images = line.get("images")
    return line if isinstance(images, float) and 0 <= images < math.inf else None


def _floats(values: dict[str, Any]) -> dict[str, Any]:
    return {name: float(value) if type(value) is int else value for name, value in values.items()}

"""The files that runs leave, read for the report: log.jsonl, evaluations.jsonl and metrics*.json, damaged or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vadit.report.charts import Curve
from vadit.runtime.errors import UsageError

_NOT_CURVES = ("images", "step")


@dataclass
class Log:
    """The quantities of a log.jsonl by name, over images."""

    curves: dict[str, Curve] = field(default_factory=dict)
    skipped_lines: int = 0
    """Lines that are no JSON objects with a count of images (a process that was killed while it wrote)."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """What is no number in a line (a path), by line; empty for log.jsonl, which has numbers only."""

    @property
    def images(self) -> float:
        """Images at the last point; 0 without points."""
        return max((float(curve.x[-1]) for curve in self.curves.values()), default=0.0)


def read_log(path: str | Path) -> Log:
    """Read a log.jsonl or an evaluations.jsonl; where a resumed run was there before, the later lines count."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name the log.jsonl of a run")
    log = Log()
    lines: list[dict[str, Any]] = []
    # read line by line: a log of 80,000 points has 40 MB
    with path.open(encoding="utf-8", errors="replace") as stream:
        for text in stream:
            if not text.strip():
                continue
            line = _object(text)
            if line is None:
                log.skipped_lines += 1
                continue
            while lines and lines[-1]["images"] >= line["images"]:
                lines.pop()
            lines.append(line)
    # rows of lines with the same names, so that numpy takes in most of a log at once
    rows: dict[tuple[str, ...], list[list[float]]] = {}
    for line in lines:
        if not set(map(type, line.values())) <= {int, float}:
            words = {name: value for name, value in line.items() if not _is_number(value)}
            log.lines.append({"images": line["images"], **words})
            line = {name: value for name, value in line.items() if name not in words}
        rows.setdefault(tuple(line), []).append(list(line.values()))
    log.curves = _columns(rows)
    return log


def _columns(rows: dict[tuple[str, ...], list[list[float]]]) -> dict[str, Curve]:
    """Curves by name, in order of images, of rows of values under their names."""
    pieces: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for names, values in rows.items():
        try:
            table = np.array(values, np.float64).T
        except OverflowError:  # an integer that no float holds
            table = np.array([[x if _is_number(x) else math.nan for x in row] for row in values], np.float64).T
        images = table[names.index("images")]
        for name, column in zip(names, table, strict=True):
            if name not in _NOT_CURVES:
                pieces.setdefault(name, []).append((images, column))
    curves = {}
    for name, found in pieces.items():
        x, y = (np.concatenate(part) for part in zip(*found, strict=True))
        order = np.argsort(x, kind="stable")
        curves[name] = Curve(x[order], y[order])
    return curves


def join_logs(logs: Iterable[tuple[float, Log]]) -> Log:
    """The logs of a run's stages as one; each comes with the images that were trained on before it."""
    joined = Log()
    for before, log in logs:
        joined.skipped_lines += log.skipped_lines
        joined.lines += [{**line, "images": line["images"] + before} for line in log.lines]
        for name, curve in log.curves.items():
            x, y = curve.x + before, curve.y
            if (earlier := joined.curves.get(name)) is not None:
                x, y = np.concatenate([earlier.x, x]), np.concatenate([earlier.y, y])
            joined.curves[name] = Curve(x, y)
    return joined


@dataclass(frozen=True)
class Scores:
    """One metrics.json of `vadit evaluate`."""

    file: str
    kind: str
    """samples, tokenizer or latents."""
    metrics: dict[str, float]
    spread: dict[str, float]
    """Standard deviation over seeds, where there were several."""


def read_scores(folder: Path) -> tuple[list[Scores], list[str]]:
    """The metrics*.json of a run folder, and a sentence for each that is none."""
    found, notes = [], []
    for path in sorted(folder.glob("metrics*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
            kind, metrics = content["kind"], content["metrics"]
            spread = content.get("spread") or {}
            if not (isinstance(kind, str) and isinstance(metrics, dict) and isinstance(spread, dict)):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            notes.append(f"{path} is not what `vadit evaluate --out` writes, or is damaged; it was left out.")
            continue
        found.append(Scores(path.name, kind, _numbers(metrics), _numbers(spread)))
    return found, notes


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if _is_number(value) and math.isfinite(value)}


def _object(text: str) -> dict[str, Any] | None:
    """A line of a log, or None where it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not _is_number(line.get("images")):
        return None
    return line if math.isfinite(line["images"]) and line["images"] >= 0 else None


def _is_number(value: Any) -> bool:
    """Numbers that a float can hold; True is none."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1e300)

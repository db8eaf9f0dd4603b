"""Runs as the report sees them: their files, how far each is, what is still to come, and how they compare."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vadit.config import Config, DiTConfig, RepaSpec
from vadit.config.files import load_run_config
from vadit.recipes import get_recipe
from vadit.recipes.sizes import IMAGENET_IMAGES
from vadit.report.charts import Curve
from vadit.report.log import Log, Scores, join_logs, read_log, read_scores
from vadit.report.words import higher_is_better
from vadit.runtime.errors import UsageError
from vadit.runtime.files import flat

HEADLINE = "lightningdit-xl-64ep"
EPOCHS = 64
PROJECT = ("generator", "tokenizer")  # folders of the runs of a project
LARGE = 1_000_000  # images of an epoch, from which on a generator is to come to so many epochs
REFERENCE_STEPS = (100, 200, 300, 500, 1000, 2000, 3000, 4000, 80_000)
REFERENCE_BATCH = 1024
REFERENCE_MSE = (1.2133, 0.5402, 0.4637, 0.4186, 0.3854, 0.3604, 0.3500, 0.3424, 0.3045)
"""The authors' training log of LightningDiT-XL/1 (64 epochs): velocity MSE, mean over the last 100 steps."""
_RECENT = 0.2  # share of the log, from its end, that a projection goes by


@dataclass
class Run:
    """One run folder."""

    name: str
    color: int  # index into the palette
    folder: Path
    kind: str  # dit, tokenizer, or unknown where there is no readable config.json
    config: Config | None
    log: Log
    evaluations: Log
    grids: list[tuple[float, Path]]  # images seen, and the picture that was made then
    scores: list[Scores]
    notes: list[str]  # what could not be read

    def scored(self, kind: str, name: str) -> dict[str, float]:
        """Numbers of its metrics*.json of one kind whose names begin so."""
        found = [scores.metrics for scores in self.scores if scores.kind == kind]
        return {key: value for metrics in found for key, value in metrics.items() if key.startswith(name)}


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs under `folders`, named by the shortest ends of their paths that differ; a project's are two."""
    paths = [path for folder in folders for path in _runs_of(Path(folder))]
    resolved = [path.resolve() for path in paths]
    for path, whole in zip(paths, resolved, strict=True):
        if not path.is_dir():
            hint = f"; name its folder, {path.parent}" if path.is_file() else ""
            raise UsageError(f"{path} is no run folder{hint}")
        if resolved.count(whole) > 1:
            raise UsageError(f"{path} is named twice; name each run once")
    names = _names(resolved)
    runs = [_read_run(path, names[color], color) for color, path in enumerate(paths)]
    if not any(run.log.curves or run.evaluations.curves or run.grids or run.scores for run in runs):
        notes = "; ".join(note.rstrip(".") for run in runs for note in run.notes)
        raise UsageError(f"nothing to report yet: {notes or 'no log point, evaluation or metrics'}")
    return runs


def _runs_of(folder: Path) -> list[Path]:
    """The runs of a project, generator first, or the folder itself."""
    parts = [folder / name for name in PROJECT if any((folder / name).glob("config.json"))]
    return parts if parts and not _is_run(folder) else [folder]


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "log.jsonl"))


def _names(paths: Sequence[Path]) -> list[str]:
    depths = range(1, max(len(path.parts) for path in paths) + 1)
    candidates = (["/".join(path.parts[-depth:]) for path in paths] for depth in depths)
    return next(names for names in candidates if len(set(names)) == len(names))


def _read_run(folder: Path, name: str, color: int) -> Run:
    notes: list[str] = []
    config: Config | None = None
    stages = sorted(folder.glob("stage-*"), key=lambda path: (len(path.name), path.name))
    parts = [part for part in (folder, *stages) if (part / "log.jsonl").is_file()]
    if not parts and not _is_run(folder):
        raise UsageError(f"{folder} is no run folder: it holds neither config.json nor log.jsonl")
    try:
        config = load_run_config(folder)
    except (UsageError, ValueError, AttributeError, OSError) as error:
        notes.append(f"{name}: its config.json could not be read ({error}).")
    logs, evaluations, grids, before = [], [], [], 0.0
    for part in parts:
        logs.append(read_log(part / "log.jsonl", before))
        if (part / "evaluations.jsonl").is_file():
            evaluations.append(read_log(part / "evaluations.jsonl", before))
            grids += _grids(part, evaluations[-1])
        before = max(before, logs[-1].images)
    log, evaluation = join_logs(logs), join_logs(evaluations)
    for file, found in (("log.jsonl", log), ("evaluations.jsonl", evaluation)):
        if found.skipped_lines:
            notes.append(f"{name}: damaged lines of {file} left out: {found.skipped_lines}.")
    if not log.curves:
        notes.append(f"{name}: {'its log.jsonl holds no points' if parts else 'there is no log.jsonl'} yet.")
    scores, bad = read_scores(folder)
    guess = "dit" if "mse" in log.curves else "tokenizer" if "kl" in log.curves else "unknown"
    kind = config.kind if config else guess
    return Run(name, color, folder, kind, config, log, evaluation, grids, scores, notes + bad)


def _grids(part: Path, found: Log) -> list[tuple[float, Path]]:
    pictures = [(line["images"], part / line["grid"]) for line in found.lines if isinstance(line.get("grid"), str)]
    # a picture outside of the run folder is not one that the run made
    return [(images, path) for images, path in pictures if path.resolve().is_relative_to(part.resolve())]


@dataclass(frozen=True)
class Progress:
    """How far a run is, and when it will be done if it goes on at its latest speed."""

    images: float
    epochs: float
    target: float  # images of 64 epochs (a generator on a set of ImageNet's size), or of the whole run
    goal: str  # the target in words
    images_per_s: float  # median over the last fifth of the log, all devices together
    devices: int | None  # GPUs or processes that took part last; None where the log does not say
    hours: Curve  # hours of training since the start (y) over images (x), by the logged throughput

    @property
    def hours_left(self) -> float:
        """Hours to the target; 0 once there."""
        return max(self.target - self.images, 0) / self.images_per_s / 3600

    @property
    def hours_done(self) -> float:
        """Hours of training so far: stops, saves and evaluations that the throughput does not hold are not in it."""
        return float(self.hours.y[-1])


def progress(run: Run) -> Progress | None:
    """Progress by the log, or None where it holds no throughput."""
    rate = run.log.curves.get("images_per_s")
    good = np.zeros(0, bool) if rate is None else np.isfinite(rate.y) & (rate.y > 0)
    if rate is None or not good.any():
        return None
    x, y = rate.x[good], rate.y[good]
    images, epoch = run.log.images, _epoch_images(run)
    whole = run.config is not None and (run.kind == "tokenizer" or epoch < LARGE)
    return Progress(
        images=images,
        epochs=images / epoch,
        target=float(run.config.run.total_images) if whole else EPOCHS * epoch,  # type: ignore[union-attr]
        goal="the end" if whole else f"{EPOCHS} epochs",
        images_per_s=float(np.median(y[-max(int(len(y) * _RECENT), min(5, len(y))) :])),
        devices=_devices(run),
        hours=Curve(x, np.cumsum(np.diff(x, prepend=0.0) / y) / 3600),
    )


def _epoch_images(run: Run) -> float:
    """Images of an epoch, from a log point that has both counts."""
    epochs = run.log.curves.get("epochs")
    if epochs is not None and np.isfinite(epochs.y[-1]) and epochs.y[-1] > 0:
        return float(epochs.x[-1] / epochs.y[-1])
    return float(IMAGENET_IMAGES)


def _devices(run: Run) -> int | None:
    both, each = (run.log.curves.get(name) for name in ("images_per_s", "images_per_s_per_gpu"))
    if both is None or each is None or not np.isfinite([both.y[-1], each.y[-1]]).all() or each.y[-1] <= 0:
        return None
    return max(round(both.y[-1] / each.y[-1]), 1)


def is_headline(config: Config | None) -> bool:
    """Whether a run learns what the authors' logged run learnt: the headline recipe's network, loss and optimizer.

    Length, sampling and the way the work is spread may differ, and the data cannot be known from a config.
    """
    if not isinstance(config, DiTConfig):
        return False
    headline = get_recipe(HEADLINE)
    assert isinstance(headline, DiTConfig), HEADLINE
    flow = replace(config.flow, uniform_after_images=headline.flow.uniform_after_images)
    return (
        (config.model, flow, config.optimizer, config.run.batch_size, config.mask.kind)
        == (headline.model, headline.flow, headline.optimizer, headline.run.batch_size, headline.mask.kind)
        and config.repa.weight == RepaSpec().weight
        and config.data.normalize == headline.data.normalize
        and config.data.multiplier == headline.data.multiplier
    )  # fmt: skip


def loss_at(run: Run, images: float) -> float | None:
    """The logged velocity MSE at the log point nearest to `images`, where one lies within 2%."""
    curve = run.log.curves.get("mse")
    if curve is None:
        return None
    nearest = int(np.abs(curve.x - images).argmin())
    return float(curve.y[nearest]) if abs(curve.x[nearest] - images) <= 0.02 * images else None


def speedup(metric: str, curves: Sequence[Curve]) -> tuple[float, list[tuple[float, bool]]] | None:
    """The best value that two or more runs all reach, and the images that each needs to it (the paper's Figure 4).

    Images are interpolated between evaluations; True: the first evaluation was better already, it needs no more than
    that. None where there are not two runs, or one has no finite value.
    """
    sign = -1.0 if higher_is_better(metric) else 1.0
    found = [(curve.x[curve.finite], sign * curve.y[curve.finite]) for curve in curves]
    if len(found) < 2 or any(len(x) == 0 for x, _ in found):
        return None
    value = max(float(y.min()) for _, y in found)
    return sign * value, [_first_at(x, y, value) for x, y in found]


def _first_at(x: np.ndarray, y: np.ndarray, value: float) -> tuple[float, bool]:
    """x where y first comes down to `value`, on a straight line between two points."""
    index = int(np.argmax(y <= value))
    if index == 0:
        return float(x[0]), bool(y[0] < value)
    share = (y[index - 1] - value) / (y[index - 1] - y[index])
    return float(x[index - 1] + share * (x[index] - x[index - 1])), False


def different_settings(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows (setting, value in each run) of what differs between the configs of runs of one kind."""
    every = [flat(asdict(run.config)) if run.config else {} for run in runs]
    rows = []
    for name in dict.fromkeys(name for values in every for name in values):
        values = tuple(json.dumps(each[name]) if name in each else "-" for each in every)
        if len(set(values)) > 1 and name != "run.out" and not name.startswith("paper."):
            rows.append((name, *values))
    return rows

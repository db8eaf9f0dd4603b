"""The parts of the report of one or more runs: tables and charts, each run in a colour of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vadit.recipes.sizes import DIT_SIZES
from vadit.recipes.tokenizers import TOKENIZERS
from vadit.report.charts import Chart, Curve, Series, short_number
from vadit.report.page import Section, is_picture, write_report
from vadit.report.runs import (
    EPOCHS,
    HEADLINE,
    REFERENCE_MSE,
    REFERENCE_STEPS,
    Progress,
    Run,
    different_settings,
    higher_is_better,
    is_headline,
    loss_at,
    progress,
    read_runs,
    speedup,
)
from vadit.runtime.errors import UsageError

GRIDS_PER_RUN = 4
"""Sample grids of a run on the page: the first, the last, and between them."""
_KINDS = {"dit": "Generators", "tokenizer": "Tokenizers", "unknown": "Runs of unknown kind"}
_TITLES = {
    "images_per_s": "Throughput",
    "images_per_s_per_gpu": "Throughput per device",
    "mfu": "Model FLOP utilisation",
    "data_wait_share": "Time waiting for data",
    "comm_share": "Time in communication",
    "memory_gib": "Peak memory",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "loss": "Loss",
    "mse": "Velocity MSE",
}
_UNITS = {"images_per_s": "images/s", "images_per_s_per_gpu": "images/s", "memory_gib": "GiB"} | dict.fromkeys(
    ("mfu", "data_wait_share", "comm_share"), "%"
)
_SPEED = ("images_per_s", "images_per_s_per_gpu", "mfu", "data_wait_share", "comm_share", "memory_gib")
_TOLD_ELSEWHERE = (*_SPEED, "loss", "mse", "epochs", "hours_left", "hours_to_64_epochs")
_LINEAR = (*_SPEED, "lr")

_PALE = 7
"""Index of the palette's grey: published values."""


# ------------------------------------------------------------------------------------------ charts of one quantity


def quantity_charts(
    named: Sequence[tuple[str, dict[str, Curve]]],
    names: Iterable[str] | None = None,
    *,
    colors: Sequence[int] | None = None,
    without: Sequence[str] = (),
) -> list[Chart]:
    """A small chart per quantity, with a line for each run that has it; `named` are runs' names and curves by name.

    The default is every quantity of any of them, in the order of the logs, the loss and the throughput first.
    """
    if names is None:
        every = dict.fromkeys(name for _, curves in named for name in curves)
        names = [name for name in ("loss", "images_per_s") if name in every]
        names += [name for name in every if name not in names]
    colors = range(len(named)) if colors is None else colors
    charts = []
    for name in names:
        series = tuple(
            Series(run, curves[name], color=color)
            for color, (run, curves) in zip(colors, named, strict=True)
            if name in curves
        )
        if series and name not in without:
            charts.append(
                Chart(
                    _TITLES.get(name, name), series, y_label=_UNITS.get(name, ""), may_be_log=name not in _LINEAR,
                    file=name,
                )
            )  # fmt: skip
    return charts


# ------------------------------------------------------------------------------------------ the page


@dataclass(frozen=True)
class Written:
    """What a report left on disk."""

    page: Path
    folder: Path
    """Folder of the PNGs."""
    pngs: int
    notes: tuple[str, ...]
    """What could not be read, in sentences; they are on the page, too."""


def write_runs_report(folders: Sequence[str | Path], out: str | Path, *, title: str = "", pngs: bool = True) -> Written:
    """The report of the runs under `folders` into the HTML file `out`, its charts as PNGs beside it.

    Raises:
        UsageError: a folder is no run folder, none of them holds anything to show, or `out` is a folder.
    """
    out = Path(out)
    if not folders:
        raise UsageError("vadit report needs one or more run folders: vadit report RUN [RUN ...]")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name the HTML file to write, such as {out / 'report.html'}")
    runs = read_runs(folders)
    sections = run_sections(runs)
    names = ", ".join(run.name for run in runs)
    write_report(out, title or (names if len(names) < 80 else f"{len(runs)} runs"), _lead(runs), sections)
    folder, count = out.with_name(f"{out.stem}-charts"), 0
    if pngs:
        from vadit.report.chart_files import save_png

        # names of quantities come from files; as names of files they must be plain, and each its own
        named = {re.sub(r"[^\w.-]+", "_", chart.file): chart
                 for section in sections for chart in section.charts if chart.file}  # fmt: skip
        count = sum(save_png(chart, folder / f"{name}.png") for name, chart in named.items())
    return Written(out, folder, count, tuple(note for run in runs for note in run.notes))


def _lead(runs: Sequence[Run]) -> str:
    kinds = [run.kind for run in runs]
    words = {"dit": "generator", "tokenizer": "tokenizer", "unknown": "run of unknown kind"}
    counts = [f"{kinds.count(kind)} {word}{'s' * (kinds.count(kind) > 1)}" for kind, word in words.items()
              if kind in kinds]  # fmt: skip
    return f"{' and '.join(counts)}, as far as logged."


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """All sections of the report of `runs`; those of different kinds are told apart."""
    colors = {run.name: number for number, run in enumerate(runs)}
    sections = []
    for kind, title in _KINDS.items():
        group = [run for run in runs if run.kind == kind]
        if not group:
            continue
        prefix = "" if len({run.kind for run in runs}) == 1 else f"{title}: "
        found = [
            _progress_section(group, colors), _loss_section(group, colors), _speed_section(group, colors),
            _evaluation_section(group, colors), _scores_section(group), _frontier_section(group, colors),
            _grids_section(group), _rest_section(group, colors),
        ]  # fmt: skip
        sections += [_titled(section, prefix) for section in found if section is not None]
    return sections


def _titled(section: Section, prefix: str) -> Section:
    title = prefix + (section.title[0].lower() + section.title[1:] if prefix else section.title)
    return replace(section, title=title, charts=[_with_file(chart, prefix) for chart in section.charts])


def _with_file(chart: Chart, prefix: str) -> Chart:
    word = prefix.split(":")[0].lower().replace(" ", "-")
    return replace(chart, file=f"{word}-{chart.file}") if word and chart.file else chart


def _progress_section(runs: Sequence[Run], colors: dict[str, int]) -> Section:
    """A column per run: how far it is and what is to come; and images over hours, the projection dashed."""
    goal = f"{EPOCHS} epochs" if runs[0].kind != "tokenizer" else "the end"
    names = ("network and recipe", "images", "epochs", "last loss", "images/s", "model FLOP utilisation",
             "hours of training", f"hours to {goal}", f"device-hours to {goal}", f"{goal} at")  # fmt: skip
    columns, series, notes = [], [], [note for run in runs for note in run.notes]
    found = {run.name: progress(run) for run in runs}
    for run in runs:
        now = found[run.name]
        images = f"{run.log.images:,.0f}" if run.log.curves else "-"
        if now is None:
            columns.append((_what(run), images, "-", _last(run, "loss"), *["-"] * 6))
            continue
        columns.append(
            (_what(run), images, f"{now.epochs:.3g}", _last(run, "loss"), short_number(now.images_per_s),
             _last(run, "mfu", share=True), _hours(now.hours_done), *_left(run, now))
        )  # fmt: skip
        series.append(Series(run.name, Curve(now.hours.y, now.hours.x), colors[run.name]))
        if now.images < now.target and not _is_over(run):
            hours, images_then = (now.hours_done, now.hours_done + now.hours_left), (now.images, now.target)
            ahead = Curve(np.array(hours), np.array(images_then))
            series.append(Series(f"{run.name}, projected", ahead, colors[run.name], dashed=True))
    notes.append(
        "Hours are those of training by the logged throughput; the projection takes the median of the log's last fifth "
        "and counts from the log's last write. Device-hours: GPU-hours where the run is on GPUs, else process-hours."
    )
    targets = {now.target for now in found.values() if now is not None}
    chart = Chart(
        "Progress", tuple(series), x_label="hours of training", y_label="images", may_be_log=False, wide=True,
        level=targets.pop() if len(targets) == 1 else None, file="progress", note=f"Dotted: {goal}.",
    )  # fmt: skip
    table = [tuple(row) for row in zip(names, *columns, strict=True)]
    return Section("Progress", table=table, header=("", *(run.name for run in runs)), charts=[chart], notes=notes)


def _left(run: Run, now: Progress) -> tuple[str, str, str]:
    if now.images >= now.target:
        at_target = float(np.interp(now.target, now.hours.x, now.hours.y))
        total = "-" if now.devices is None else _hours(at_target * now.devices)
        return "reached", total, "reached"
    whole = now.hours_done + now.hours_left
    devices = "-" if now.devices is None else f"{_hours(whole * now.devices)} on {now.devices}"
    if _is_over(run):
        return _hours(now.hours_left), devices, "not planned: the run is over"
    log = run.folder / "log.jsonl"
    stages = sorted(run.folder.glob("stage-*/log.jsonl"))
    last_write = max((path.stat().st_mtime for path in (log, *stages) if path.is_file()), default=0.0)
    when = now.finish(last_write)
    soon = now.hours_left < 24 * 3650
    return (
        _hours(now.hours_left),
        devices,
        f"{when:%Y-%m-%d %H:%M}" if soon else "in over 10 years",
    )


def _is_over(run: Run) -> bool:
    return run.config is not None and run.log.images >= run.config.run.total_images


def _loss_section(runs: Sequence[Run], colors: dict[str, int]) -> Section | None:
    charts = [_wide("Loss", "loss", runs, colors)]
    text, table = "", []
    header: tuple[str, ...] = ()
    alike = [run for run in runs if is_headline(run.config) and "mse" in run.log.curves]
    if any(run.kind == "dit" for run in runs):
        chart = _wide("Velocity MSE", "mse", runs, colors)
        if alike:
            batch = 1024
            x = np.array(REFERENCE_STEPS, np.float64) * batch
            last = max(run.log.images for run in alike)
            keep = x <= max(1.2 * last, x[3])
            points = Curve(x[keep], np.array(REFERENCE_MSE)[keep])
            authors = Series("the authors' log", points, _PALE, marks=True, hollow=True)
            note = "Open circles: the authors' training log, mean over the last 100 steps."
            chart = Chart(chart.title, (*chart.series, authors), wide=True, x_log=True, file=chart.file, note=note)
            header = ("step", "authors", *(run.name for run in alike))
            for step, value in zip(REFERENCE_STEPS, REFERENCE_MSE, strict=True):
                ours = [loss_at(run, step * batch) for run in alike]
                if any(value is not None for value in ours):
                    table.append((f"{step:,}", f"{value:.4f}", *(_against(found, value) for found in ours)))
            text = (
                f"Velocity MSE against the authors' training log: the settings are those of {HEADLINE}. The comparison "
                "holds where the latents are those of the released VA-VAE f16d32 on ImageNet."
            )
        charts.append(chart)
    charts = [chart for chart in charts if chart.series]
    return Section("Loss", charts=charts, table=table, header=header if table else (), text=text) if charts else None


def _against(found: float | None, reference: float) -> str:
    return "-" if found is None else f"{found:.4f} ({found / reference - 1:+.1%})"


def _speed_section(runs: Sequence[Run], colors: dict[str, int]) -> Section | None:
    """Throughput and utilisation over hours of training."""
    named = []
    for run in runs:
        now = progress(run)
        curves = {}
        for name in _SPEED:
            if now is not None and (curve := run.log.curves.get(name)) is not None:
                y = curve.y * 100 if _UNITS.get(name) == "%" else curve.y
                curves[name] = Curve(np.interp(curve.x, now.hours.x, now.hours.y), y)
        named.append((run.name, curves))
    charts = quantity_charts(named, _SPEED, colors=[colors[run.name] for run in runs])
    charts = [replace(chart, x_label="hours of training") for chart in charts]
    return Section("Throughput and utilisation", charts=charts) if charts else None


def _evaluation_section(runs: Sequence[Run], colors: dict[str, int]) -> Section | None:
    """Metrics over images, and how much sooner runs come to equal values."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations.curves if name != "seconds")
    charts, rows = [], []
    for name in names:
        have = [run for run in runs if name in run.evaluations.curves]
        curves = [run.evaluations.curves[name] for run in have]
        found = speedup(name, curves)
        series = tuple(Series(run.name, curve, colors[run.name]) for run, curve in zip(have, curves, strict=True))
        note = "higher is better" if higher_is_better(name) else "lower is better"
        level = None
        if found is not None:
            level = found.value
            slowest = max(found.images)
            note += f"; dotted: {short_number(found.value)}, the best value that all runs reach"
            for run, images, at_most in zip(have, found.images, found.at_most, strict=True):
                ratio = slowest / images if images > 0 else float("inf")
                sign = "at most " if at_most else ""
                times = "-" if images == slowest else f"{'over ' if at_most else ''}{ratio:.2f}x sooner"
                rows.append((name, short_number(found.value), run.name, f"{sign}{short_number(images)}", times))
        charts.append(Chart(name, series, wide=True, level=level, note=note[0].upper() + note[1:] + ".", file=name))
    if not charts:
        return None
    header = ("metric", "value", "run", "images needed", "against the slowest") if rows else ()
    return Section("Metrics during training", charts=charts, table=rows, header=header)


def _scores_section(runs: Sequence[Run]) -> Section | None:
    """What `vadit evaluate` found, a row per number."""
    names = dict.fromkeys(name for run in runs for scores in run.scores for name in scores.metrics)
    if not names:
        return None
    rows = []
    for name in names:
        cells = []
        for run in runs:
            found = [scores for scores in run.scores if name in scores.metrics]
            value = "-"
            if found:
                spread = found[-1].spread.get(name)
                value = f"{found[-1].metrics[name]:.5g}" + ("" if spread is None else f" ± {spread:.2g}")
            cells.append(value)
        rows.append((name, *cells))
    papers = [run.config.paper.metric if run.config is not None else "" for run in runs]
    if any(papers):
        rows.append(("the recipe's source reports", *(paper or "-" for paper in papers)))
    return Section("Evaluation", table=rows, header=("metric", *(run.name for run in runs)))


# ------------------------------------------------------------------------------------------ the frontier (Figure 2)

TABLE_2 = [row for row in TOKENIZERS if "2" in row.tables]
"""Tokenizers f16d16, f16d32 and f16d64, without and with alignment, and FID-10K of the generators on their latents."""
SIZES = {(size["hidden_size"], size["depth"]): letter for letter, size in DIT_SIZES.items()}
"""The paper's letters by width and depth."""


def _frontier_section(runs: Sequence[Run], colors: dict[str, int]) -> Section | None:
    """rFID of the tokenizer against gFID of the generator, for runs whose folder holds both numbers.

    gFID is the one that most runs have, without guidance before with it: numbers of two protocols share no axis.
    """
    both = [(run, run.scored("tokenizer", "rfid"), run.scored("samples", "fid")) for run in runs]
    counts = Counter(name for _, rfid, gfid in both if rfid for name in gfid)
    if not counts:
        return None
    protocol = max(counts, key=lambda name: (counts[name], "cfg" not in name))
    points = [(run, next(iter(rfid.values())), gfid[protocol]) for run, rfid, gfid in both if rfid and protocol in gfid]
    series = [
        Series(run.name, Curve(np.array([rfid]), np.array([gfid])), colors[run.name], marks=True)
        for run, rfid, gfid in points
    ]
    left_out = [run.name for run, rfid, gfid in both if (rfid or gfid) and not (rfid and protocol in gfid)]
    notes = [f"Not drawn, for lack of rFID or of {protocol}: {', '.join(left_out)}."] if left_out else []
    if protocol.startswith("fid10k_dopri5"):
        for size in dict.fromkeys(_size(run) for run, _, _ in points):
            letter = SIZES.get(size, "")
            if letter in TABLE_2[0].fid_10k:
                values = np.array([(row.scores[0], row.fid_10k[letter]) for row in TABLE_2])
                names = tuple(f"d{row.channels} {row.foundation}".removesuffix(" none") for row in TABLE_2)
                published = f"published, LightningDiT-{letter}"
                curve = Curve(values[:, 0], values[:, 1])
                series.append(Series(published, curve, _PALE, marks=True, hollow=True, labels=names))
    chart = Chart(
        "Reconstruction and generation", tuple(series), x_label="rFID of the tokenizer", y_label=protocol,
        x_from_zero=False, may_be_log=False, wide=True, file="frontier",
        note="Lower left is better: the paper's Figure 2.",
    )  # fmt: skip
    return Section("Frontier of tokenizers", charts=[chart], notes=notes)


def _size(run: Run) -> tuple[int, int]:
    model = getattr(run.config, "model", None)
    return (0, 0) if model is None else (model.hidden_size, model.depth)


# ------------------------------------------------------------------------------------------ pictures and the rest


def _grids_section(runs: Sequence[Run]) -> Section | None:
    images, notes = [], []
    for run in runs:
        there = [(seen, path) for seen, path in run.grids if is_picture(path)]
        if missing := len(run.grids) - len(there):
            notes.append(f"{run.name}: {missing} pictures are gone or damaged.")
        chosen = np.unique(np.linspace(0, len(there) - 1, min(GRIDS_PER_RUN, len(there))).round().astype(int))
        for seen, path in (there[number] for number in chosen):
            images.append((f"{run.name}, {seen:,.0f} images", Path(path)))
    title = "Samples" if runs[0].kind != "tokenizer" else "Reconstructions"
    text = "The same seed each time." if images else ""
    return Section(title, images=images, text=text, notes=notes) if images or notes else None


def _rest_section(runs: Sequence[Run], colors: dict[str, int]) -> Section | None:
    """Every other logged quantity, and the settings: all of them, and first what differs."""
    named = [(run.name, run.log.curves) for run in runs]
    charts = quantity_charts(named, colors=[colors[run.name] for run in runs], without=_TOLD_ELSEWHERE)
    charts = [replace(chart, file="") for chart in charts]  # on the page alone
    files = [(f"All settings of {run.name}", run.folder / "config.json") for run in runs]
    files = [(name, path) for name, path in files if path.is_file()]
    rows = different_settings(runs) if len(runs) > 1 else []
    if not (charts or files):
        return None
    header = ("setting that differs", *(run.name for run in runs)) if rows else ()
    return Section("Everything else that was logged, and settings", charts=charts, table=rows, header=header,
                   settings=files)  # fmt: skip


# ------------------------------------------------------------------------------------------ words


def _wide(title: str, name: str, runs: Sequence[Run], colors: dict[str, int]) -> Chart:
    series = tuple(Series(run.name, run.log.curves[name], colors[run.name]) for run in runs if name in run.log.curves)
    return Chart(title, series, wide=True, x_log=True, file=name)


def _last(run: Run, name: str, *, share: bool = False) -> str:
    curve = run.log.curves.get(name)
    if curve is None:
        return "-"
    value = float(curve.y[-1])
    if not np.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if share else short_number(value)


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    return f"{hours * 60:.0f} min" if hours < 2 else f"{hours:,.1f} h" if hours < 1000 else f"{hours:,.0f} h"


def _what(run: Run) -> str:
    if run.config is None:
        return "-"
    source = run.config.paper.source
    spec = getattr(run.config, "model", None)
    if spec is None:
        tokenizer = run.config.autoencoder  # type: ignore[union-attr]
        network = f"f{tokenizer.downsample_ratio}d{tokenizer.latent_channels}, {run.config.foundation.name}"  # type: ignore[union-attr]
    else:
        network = f"{spec.depth} x {spec.hidden_size}, patch {spec.patch_size}"
    return f"{network}; {source}" if source else network

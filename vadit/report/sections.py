"""The parts of the report of one or more runs: tables and charts, each run in a colour of its own."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from vadit.config import DiTConfig
from vadit.recipes.sizes import dit_size, model_name
from vadit.recipes.tokenizers import TOKENIZERS
from vadit.report.charts import GREY, Chart, Curve, Series, short_number
from vadit.report.page import Section, is_picture, write_report
from vadit.report.runs import (
    EPOCHS,
    HEADLINE,
    REFERENCE_BATCH,
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
from vadit.runtime.files import check_output
from vadit.runtime.spread import spread

GRIDS_PER_RUN = 4  # sample grids of a run on the page: the first, the last, and between them
_KINDS = {"dit": "Generators", "tokenizer": "Tokenizers", "unknown": "Runs of unknown kind"}
_QUANTITIES = {
    "images_per_s": ("Throughput", "images/s"),
    "images_per_s_per_gpu": ("Throughput per device", "images/s"),
    "mfu": ("Model FLOP utilisation", "%"),
    "data_wait_share": ("Time waiting for data", "%"),
    "comm_share": ("Time in communication", "%"),
    "memory_gib": ("Peak memory", "GiB"),
    "lr": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", ""),
    "loss": ("Loss", ""),
    "mse": ("Velocity MSE", ""),
}
"""Title and unit of what a log has; others go by their names."""
_SPEED = ("images_per_s", "images_per_s_per_gpu", "mfu", "data_wait_share", "comm_share", "memory_gib")
_SHOWN_ELSEWHERE = (*_SPEED, "loss", "mse", "epochs", "hours_left", "hours_to_64_epochs")
_LINEAR = (*_SPEED, "lr")
TABLE_2 = [row for row in TOKENIZERS if "2" in row.tables]
"""Tokenizers f16d16, f16d32 and f16d64, without and with alignment, and FID-10K of the generators on their latents."""


def quantity_charts(
    runs: Sequence[Run], names: Iterable[str] | None = None, *, without: Sequence[str] = ()
) -> list[Chart]:
    """A small chart per logged quantity, with a line for each run that has it.

    The default is every quantity of any of them, in the order of the logs, the loss and the throughput first.
    """
    if names is None:
        names = dict.fromkeys(("loss", "images_per_s", *(name for run in runs for name in run.log.curves)))
    charts = []
    for name in (name for name in names if name not in without):
        title, unit = _QUANTITIES.get(name, (name, ""))
        if series := _series(runs, name):
            charts.append(Chart(title, series, y_label=unit, may_be_log=name not in _LINEAR))
    return charts


def _wide(title: str, runs: Sequence[Run], name: str) -> Chart:
    return Chart(title, _series(runs, name), wide=True, x_log=True)


def _series(runs: Sequence[Run], name: str) -> tuple[Series, ...]:
    factor = 100 if _QUANTITIES.get(name, ("", ""))[1] == "%" else 1
    curves = ((run, run.log.curves[name]) for run in runs if name in run.log.curves)
    return tuple(Series(run.name, Curve(curve.x, curve.y * factor), run.color) for run, curve in curves)


def write_runs_report(folders: Sequence[str | Path], out: str | Path) -> list[str]:
    """The report of the runs under `folders` into the HTML file `out`.

    Returns what could not be read, in sentences (they are on the page, too). UsageError: a folder is no run folder,
    none of them holds anything to show, or `out` is a folder.
    """
    if not folders:
        raise UsageError("vadit report needs one or more run folders: vadit report RUN [RUN ...]")
    runs = read_runs(folders)
    check_output("--out", out, folder=False)
    names = ", ".join(run.name for run in runs)
    write_report(out, names if len(names) < 80 else f"{len(runs)} runs", "As far as logged.", run_sections(runs))
    return [note for run in runs for note in run.notes]


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """All sections of the report of `runs`; those of different kinds are apart."""
    sections = []
    for kind, title in _KINDS.items():
        group = [run for run in runs if run.kind == kind]
        if not group:
            continue
        makers = (_progress_section, _loss_section, _speed_section, _evaluation_section, _scores_section,
                  _frontier_section, _grids_section, _rest_section)  # fmt: skip
        for section in filter(None, (make(group) for make in makers)):
            if len(group) < len(runs):
                section = replace(section, title=f"{title}: {section.title}")
            sections.append(section)
    return sections


def _progress_section(runs: Sequence[Run]) -> Section:
    """A column per run: how far it is and what is to come; and images over hours, the projection dashed."""
    goal = f"{EPOCHS} epochs" if runs[0].kind != "tokenizer" else "the end"
    names = ("network and recipe", "images", "epochs", "last loss", "images/s", "model FLOP utilisation",
             "hours of training", f"hours to {goal}", f"device-hours to {goal}", f"{goal} at")  # fmt: skip
    columns, series, targets = [], [], set()
    for run in runs:
        now = progress(run)
        what = ", ".join(filter(None, (model_name(run.config), run.config.paper.source))) if run.config else "-"
        images = f"{run.log.images:,.0f}" if run.log.curves else "-"
        if now is None:
            columns.append((what, images, "-", _last(run, "loss"), *["-"] * 6))
            continue
        columns.append(
            (what, images, f"{now.epochs:.3g}", _last(run, "loss"), short_number(now.images_per_s),
             _last(run, "mfu", share=True), _hours(now.hours_done), *_left(run, now))
        )  # fmt: skip
        targets.add(now.target)
        series.append(Series(run.name, Curve(now.hours.y, now.hours.x), run.color))
        if now.images < now.target and not _is_over(run):
            hours, images_then = (now.hours_done, now.hours_done + now.hours_left), (now.images, now.target)
            ahead = Curve(np.array(hours), np.array(images_then))
            series.append(Series(f"{run.name}, projected", ahead, run.color, "dashed"))
    chart = Chart(
        "Progress", tuple(series), x_label="hours of training", y_label="images", may_be_log=False, wide=True,
        level=targets.pop() if len(targets) == 1 else None, note=f"Dotted: {goal}.",
    )  # fmt: skip
    notes = [note for run in runs for note in run.notes] + [
        "Hours are those of training by the logged throughput; the projection takes the median of the log's last fifth "
        "and counts from the log's last write. Device-hours: GPU-hours where the run is on GPUs, else process-hours."
    ]
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
    written = [path.stat().st_mtime for pattern in ("", "stage-*/") for path in run.folder.glob(f"{pattern}log.jsonl")]
    soon = written and now.hours_left < 24 * 3650
    when = datetime.fromtimestamp(max(written)) + timedelta(hours=now.hours_left) if soon else None
    return _hours(now.hours_left), devices, "in over 10 years" if when is None else f"{when:%Y-%m-%d %H:%M}"


def _is_over(run: Run) -> bool:
    return run.config is not None and run.log.images >= run.config.run.total_images


def _loss_section(runs: Sequence[Run]) -> Section | None:
    """The loss, and the velocity MSE beside the authors' where a run learns the same."""
    mse, text, table = _wide("Velocity MSE", runs, "mse"), "", []
    header: tuple[str, ...] = ()
    alike = [run for run in runs if is_headline(run.config) and "mse" in run.log.curves]
    if alike:
        x, y = np.array(REFERENCE_STEPS, np.float64) * REFERENCE_BATCH, np.array(REFERENCE_MSE)
        keep = x <= max(1.2 * max(run.log.images for run in alike), x[3])
        authors = Series("the authors' log", Curve(x[keep], y[keep]), GREY, "rings")
        note = "Open circles: the authors' training log, mean over the last 100 steps."
        mse = replace(mse, series=(*mse.series, authors), note=note)
        text = (
            f"Velocity MSE against the authors' training log: the settings are those of {HEADLINE}. The comparison "
            "holds where the latents are those of the released VA-VAE f16d32 on ImageNet."
        )
        for step, value in zip(REFERENCE_STEPS, REFERENCE_MSE, strict=True):
            ours = [loss_at(run, step * REFERENCE_BATCH) for run in alike]
            if any(found is not None for found in ours):
                cells = ("-" if found is None else f"{found:.4f} ({found / value - 1:+.1%})" for found in ours)
                table.append((f"{step:,}", f"{value:.4f}", *cells))
        header = ("step", "authors", *(run.name for run in alike)) if table else ()
    charts = [chart for chart in (_wide("Loss", runs, "loss"), mse) if chart.series]
    return Section("Loss", charts=charts, table=table, header=header, text=text) if charts else None


def _speed_section(runs: Sequence[Run]) -> Section | None:
    charts = quantity_charts(runs, _SPEED)
    return Section("Throughput and utilisation", charts=charts) if charts else None


def _evaluation_section(runs: Sequence[Run]) -> Section | None:
    """Metrics over images, and how much sooner runs come to equal values."""
    names = dict.fromkeys(name for run in runs for name in run.evaluations.curves if name != "seconds")
    charts, rows = [], []
    for name in names:
        have = [run for run in runs if name in run.evaluations.curves]
        series = tuple(Series(run.name, run.evaluations.curves[name], run.color) for run in have)
        found = speedup(name, [each.curve for each in series])
        note, level = f"{'Higher' if higher_is_better(name) else 'Lower'} is better", None
        if found is not None:
            level, needs = found
            note += f"; dotted: {short_number(level)}, the best value that all runs reach"
            slowest = max(images for images, _ in needs)
            for run, (images, at_most) in zip(have, needs, strict=True):
                ratio = slowest / images if images > 0 else float("inf")
                times = "-" if images == slowest else f"{'over ' if at_most else ''}{ratio:.2f}x sooner"
                needed = f"{'at most ' if at_most else ''}{short_number(images)}"
                rows.append((name, short_number(level), run.name, needed, times))
        charts.append(Chart(name, series, wide=True, level=level, note=f"{note}."))
    header = ("metric", "value", "run", "images needed", "against the slowest") if rows else ()
    return Section("Metrics during training", charts=charts, table=rows, header=header) if charts else None


def _scores_section(runs: Sequence[Run]) -> Section | None:
    """What `vadit evaluate` found, a row per number."""
    found = [{name: scores for scores in run.scores for name in scores.metrics} for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        cells = ["-"] * len(runs)
        for number, each in enumerate(found):
            if name in each:
                deviation = each[name].spread.get(name)
                cells[number] = f"{each[name].metrics[name]:.5g}" + (f" ± {deviation:.2g}" if deviation else "")
        rows.append((name, *cells))
    papers = [run.config.paper.metric if run.config is not None else "" for run in runs]
    if rows and any(papers):
        rows.append(("the recipe's source reports", *(paper or "-" for paper in papers)))
    return Section("Evaluation", table=rows, header=("metric", *(run.name for run in runs))) if rows else None


def _frontier_section(runs: Sequence[Run]) -> Section | None:
    """Figure 2: rFID of the tokenizer against gFID of the generator, for runs whose folder holds both numbers.

    gFID is the one that most runs have, without guidance before with it: numbers of two protocols share no axis.
    """
    both = [(run, run.scored("tokenizer", "rfid"), run.scored("samples", "fid")) for run in runs]
    counts = Counter(name for _, rfid, gfid in both if rfid for name in gfid)
    if not counts:
        return None
    protocol = max(counts, key=lambda name: (counts[name], "cfg" not in name))
    series, sizes = [], set()
    for run, rfid, gfid in both:
        if rfid and protocol in gfid:
            point = Curve(np.array([next(iter(rfid.values()))]), np.array([gfid[protocol]]))
            series.append(Series(run.name, point, run.color, "dots"))
            sizes.add(dit_size(run.config.model) if isinstance(run.config, DiTConfig) else "")
    left_out = [run.name for run, rfid, gfid in both if (rfid or gfid) and not (rfid and protocol in gfid)]
    notes = [f"Not drawn, for lack of rFID or of {protocol}: {', '.join(left_out)}."] if left_out else []
    for letter in TABLE_2[0].fid_10k if protocol.startswith("fid10k_dopri5") else ():
        if letter in sizes:
            values = np.array([(row.scores[0], row.fid_10k[letter]) for row in TABLE_2])
            labels = tuple(f"d{row.channels} {row.foundation}".removesuffix(" none") for row in TABLE_2)
            curve = Curve(values[:, 0], values[:, 1])
            series.append(Series(f"published, LightningDiT-{letter}", curve, GREY, "rings", labels))
    chart = Chart(
        "Reconstruction and generation", tuple(series), x_label="rFID of the tokenizer", y_label=protocol,
        x_from_zero=False, may_be_log=False, wide=True, note="Lower left is better: the paper's Figure 2.",
    )  # fmt: skip
    return Section("Frontier of tokenizers", charts=[chart], notes=notes)


def _grids_section(runs: Sequence[Run]) -> Section | None:
    images, notes = [], []
    for run in runs:
        whole = [(seen, path) for seen, path in run.grids if is_picture(path)]
        if missing := len(run.grids) - len(whole):
            notes.append(f"{run.name}: {missing} pictures are gone or damaged.")
        for seen, path in (whole[number] for number in spread(len(whole), GRIDS_PER_RUN)):
            images.append((f"{run.name}, {seen:,.0f} images", path))
    title = "Samples" if runs[0].kind != "tokenizer" else "Reconstructions"
    text = "The same seed each time." if images else ""
    return Section(title, images=images, text=text, notes=notes) if images or notes else None


def _rest_section(runs: Sequence[Run]) -> Section | None:
    """Every other logged quantity, and the settings: all of them, and first what differs."""
    charts = quantity_charts(runs, without=_SHOWN_ELSEWHERE)
    files = [(f"All settings of {run.name}", path) for run in runs if (path := run.folder / "config.json").is_file()]
    rows = different_settings(runs) if len(runs) > 1 else []
    header = ("setting that differs", *(run.name for run in runs)) if rows else ()
    title = "Everything else that was logged, and settings"
    return Section(title, charts=charts, table=rows, header=header, settings=files) if charts or files else None


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

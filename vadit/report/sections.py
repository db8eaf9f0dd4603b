"""The parts of the report of one or more runs: tables and charts, each run in a colour of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from vadit.config import DiTConfig
from vadit.recipes.sizes import dit_size, model_name
from vadit.recipes.tokenizers import TOKENIZERS
from vadit.report.charts import GREY, Chart, Curve, Series, is_worth_drawing, short_number
from vadit.report.page import Section, write_report
from vadit.report.pictures import picture_sections
from vadit.report.runs import (
    HEADLINE,
    REFERENCE_BATCH,
    REFERENCE_MSE,
    REFERENCE_STEPS,
    Progress,
    Run,
    different_settings,
    is_headline,
    loss_at,
    progress,
    read_runs,
    speedup,
)
from vadit.report.words import duration, grounds, higher_is_better, metric, time_unit
from vadit.runtime.errors import UsageError
from vadit.runtime.files import check_output

_KINDS = {
    "dit": ("Generator", "Generators"), "tokenizer": ("Tokenizer", "Tokenizers"),
    "unknown": ("Run of unknown kind", "Runs of unknown kind"),
}  # fmt: skip
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
    "direction": ("Direction loss", ""),
    "skipped": ("Steps skipped", ""),
    "save_stall_ms": ("Training stopped for a save", "ms"),
    "save_write_ms": ("Writing a save", "ms"),
}
"""Title and unit of what a log has; others go by their names."""
_SPEED = ("images_per_s", "images_per_s_per_gpu", "mfu", "data_wait_share", "comm_share", "memory_gib")
_SHOWN_ELSEWHERE = ("loss", "mse", "epochs", "hours_left", "hours_to_64_epochs")
_LINEAR = (*_SPEED, "lr")
TABLE_2 = [row for row in TOKENIZERS if "2" in row.tables]
"""Tokenizers f16d16, f16d32 and f16d64, without and with alignment, and FID-10K of the generators on their latents."""


def quantity_charts(runs: Sequence[Run], *, without: Sequence[str] = ()) -> list[Chart]:
    """A small chart per logged quantity with a line for each run that has it, throughput first; none of flat ones."""
    charts = []
    for name in dict.fromkeys((*_SPEED, *(name for run in runs for name in run.log.curves))):
        title, unit = _QUANTITIES.get(name, (name, ""))
        if name not in without and (series := _series(runs, name)):
            charts.append(Chart(title, series, y_label=unit, may_be_log=name not in _LINEAR))
    return [chart for chart in charts if is_worth_drawing(chart)]


def _wide(title: str, runs: Sequence[Run], name: str) -> Chart:
    return Chart(title, _series(runs, name), wide=True, x_log=True)


def _series(runs: Sequence[Run], name: str) -> tuple[Series, ...]:
    factor = 100 if _QUANTITIES.get(name, ("", ""))[1] == "%" else 1
    curves = ((run, run.log.curves[name]) for run in runs if name in run.log.curves)
    return tuple(Series(run.name, Curve(curve.x, curve.y * factor), run.color) for run, curve in curves)


def write_runs_report(folders: Sequence[str | Path], out: str | Path, lead: str = "") -> list[str]:
    """The report of the runs under `folders`, run folders or projects, into the HTML file `out`; `lead` begins it.

    Returns what could not be read, in sentences (they are on the page, too). UsageError: a folder is no run folder,
    none of them holds anything to show, or `out` is a folder.
    """
    if not folders:
        raise UsageError("vadit report needs one or more run folders: vadit report RUN [RUN ...]")
    runs = read_runs(folders)
    check_output("--out", out, folder=False)
    names = ", ".join(run.name for run in runs)
    title = Path(folders[0]).resolve().name if len(folders) == 1 else names if len(names) < 80 else f"{len(runs)} runs"
    write_report(out, title, lead or " ".join(_trained(run, runs) for run in runs[:4]), run_sections(runs))
    return [note for run in runs for note in run.notes]


def _trained(run: Run, runs: Sequence[Run]) -> str:
    """A sentence on how much a run has learnt from."""
    now, several = progress(run), [each.kind for each in runs].count(run.kind) > 1
    what = model_name(run.config) if run.config else "network"
    spent = f" in {duration(now.hours_done)}" if now else ""
    return f"{run.name if several else _KINDS[run.kind][0]}: {what}, {run.log.images:,.0f} images of training{spent}."


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """All sections of the report of `runs`: pictures, then quality, then curves; those of different kinds are apart."""
    groups = {kind: group for kind in _KINDS if (group := [run for run in runs if run.kind == kind])}
    sections = [section for group in groups.values() for section in picture_sections(group)]
    for makers in ((_scores_section, _evaluation_section, _frontier_section),
                   (_progress_section, _loss_section, _rest_section)):  # fmt: skip
        for kind, group in groups.items():
            for section in filter(None, (make(group) for make in makers)):
                name = _KINDS[kind][len(group) > 1]
                sections.append(replace(section, title=f"{name}: {section.title}") if len(groups) > 1 else section)
    return sections


def _progress_section(runs: Sequence[Run]) -> Section:
    """A column per run: how far it is and what is to come; and images over time, the projection dashed."""
    known = {run.name: now for run in runs if (now := progress(run))}
    goal = next((now.goal for now in known.values()), "the end")
    names = ("network and recipe", "images", "epochs", "last loss", "images/s", "model FLOP utilisation",
             "time of training", f"time to {goal}", f"device time to {goal}", f"{goal} at")  # fmt: skip
    unit, hours = time_unit(max((now.hours_done + now.hours_left for now in known.values()), default=0))
    columns, series, targets = [], [], set()
    for run in runs:
        now = known.get(run.name)
        what = ", ".join(filter(None, (model_name(run.config), run.config.paper.source))) if run.config else "-"
        images = f"{run.log.images:,.0f}" if run.log.curves else "-"
        if now is None:
            columns.append((what, images, "-", _last(run, "loss"), *["-"] * 6))
            continue
        columns.append(
            (what, images, f"{now.epochs:.3g}", _last(run, "loss"), short_number(now.images_per_s),
             _last(run, "mfu", share=True), duration(now.hours_done), *_left(run, now))
        )  # fmt: skip
        targets.add(now.target)
        series.append(Series(run.name, Curve(now.hours.y / hours, now.hours.x), run.color))
        if now.images < now.target and not _is_over(run):
            then, images_then = (now.hours_done, now.hours_done + now.hours_left), (now.images, now.target)
            ahead = Curve(np.array(then) / hours, np.array(images_then))
            series.append(Series(f"{run.name}, projected", ahead, run.color, "dashed"))
    chart = Chart(
        "Progress", tuple(series), x_label=f"{unit} of training", y_label="images", may_be_log=False, wide=True,
        level=targets.pop() if len(targets) == 1 else None, note=f"Dotted: {goal}.",
    )  # fmt: skip
    notes = [note for run in runs for note in run.notes]
    if len(series) > len(known):
        notes.append(
            "Times are those of training by the logged throughput; the projection takes the median of the log's last "
            "fifth and counts from the log's last write. Device time: of GPUs where it has some, else of processes."
        )
    table = [row for row in zip(names, *columns, strict=True) if not {"-", "reached"}.issuperset(row[1:])]
    charts = [chart] if len(series) > 1 else []  # the line of one finished run says nothing
    return Section("Progress", table=table, header=_header(runs), charts=charts, notes=notes)


def _header(runs: Sequence[Run], first: str = "") -> tuple[str, ...]:
    """Names of columns, where there are several."""
    return (first, *(run.name for run in runs)) if len(runs) > 1 else ()


def _left(run: Run, now: Progress) -> tuple[str, str, str]:
    if now.images >= now.target:
        at_target = float(np.interp(now.target, now.hours.x, now.hours.y))
        total = "-" if now.devices in (None, 1) else duration(at_target * now.devices)
        return "reached", total, "reached"
    whole = now.hours_done + now.hours_left
    devices = "-" if now.devices in (None, 1) else f"{duration(whole * now.devices)} on {now.devices}"
    if _is_over(run):
        return duration(now.hours_left), devices, "not planned: the run is over"
    written = [path.stat().st_mtime for pattern in ("", "stage-*/") for path in run.folder.glob(f"{pattern}log.jsonl")]
    soon = written and now.hours_left < 24 * 3650
    when = datetime.fromtimestamp(max(written)) + timedelta(hours=now.hours_left) if soon else None
    return duration(now.hours_left), devices, "in over 10 years" if when is None else f"{when:%Y-%m-%d %H:%M}"


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
    charts = [chart for chart in (_wide("Loss", runs, "loss"), mse) if is_worth_drawing(chart)]
    return Section("Loss", charts=charts, table=table, header=header, text=text) if charts or table else None


def _evaluation_section(runs: Sequence[Run]) -> Section | None:
    """Metrics over images, and how much sooner runs come to equal values."""
    charts, rows = [], []
    for name in dict.fromkeys(name for run in runs for name in _metrics_of(run)):
        what = metric(name)
        have = [run for run in runs if name in run.evaluations.curves]
        series = tuple(Series(run.name, run.evaluations.curves[name], run.color) for run in have)
        found = speedup(name, [each.curve for each in series])
        note, level = ", ".join(filter(None, (what.protocol, _better(name)))), None
        if found is not None:
            level, needs = found
            note += f"; dotted: {short_number(level)}, the best value that all runs reach"
            slowest = max(images for images, _ in needs)
            for run, (images, at_most) in zip(have, needs, strict=True):
                ratio = slowest / images if images > 0 else float("inf")
                times = "-" if images == slowest else f"{'over ' if at_most else ''}{ratio:.2f}x sooner"
                needed = f"{'at most ' if at_most else ''}{short_number(images)}"
                rows.append((f"{what.title}\n{what.protocol}", short_number(level), run.name, needed, times))
        charts.append(Chart(what.title, series, wide=True, level=level, note=f"{note}."))
    charts = [chart for chart in charts if is_worth_drawing(chart)]
    header = ("metric", "value", "run", "images needed", "against the slowest") if rows else ()
    return Section("Metrics during training", charts=charts, table=rows, header=header) if charts or rows else None


def _scores_section(runs: Sequence[Run]) -> Section | None:
    """What `vadit evaluate` found, and the last evaluation during training, below the protocol of each."""
    groups: dict[str, dict[str, list[str]]] = {}
    for place, run in enumerate(runs):
        for name, (value, deviation, inputs) in _found(run).items():
            what, (rests, doubt) = metric(name, inputs.get("num_images")), grounds(name, inputs)
            title = f"{what.title}\n{_better(name)}" if what.title != name else name
            cells = groups.setdefault(what.protocol, {}).setdefault(title, ["-"] * len(runs))
            number = f"{value:.1%}" if what.kind == "agreement" else f"{value:.4g}"
            spread = f" ± {deviation:.2g}" if deviation else ""
            cells[place] = f"{number}{spread}\n{rests}\n{doubt}".rstrip()
    table: list[tuple[str, ...]] = []
    for protocol, rows in sorted(groups.items(), key=lambda group: group[0] != ""):
        table += [(protocol,)] * bool(protocol) + [(title, *cells) for title, cells in rows.items()]
    return Section("Quality", table=table, header=_header(runs)) if table else None


def _better(name: str) -> str:
    return f"{'higher' if higher_is_better(name) else 'lower'} is better"


def _found(run: Run) -> dict[str, tuple[float, float, dict[str, Any]]]:
    """Value, deviation and inputs of each metric of a run, by name: a file's go before those of training."""
    found = (line.get("inputs") for line in reversed(run.evaluations.lines))
    inputs: dict[str, Any] = next((each for each in found if isinstance(each, dict)), {})
    numbers = {name: (value, 0.0, inputs) for name, value in _metrics_of(run).items()}
    for scores in run.scores:
        for name, value in scores.metrics.items():
            numbers[name] = (value, scores.spread.get(name, 0.0), scores.inputs)
    return numbers


def _metrics_of(run: Run) -> dict[str, float]:
    """The last finite value of each metric that was taken during training."""
    curves = {name: curve for name, curve in run.evaluations.curves.items() if name != "seconds"}
    return {name: float(curve.y[curve.finite][-1]) for name, curve in curves.items() if curve.finite.any()}


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


def _rest_section(runs: Sequence[Run]) -> Section | None:
    """Every other logged quantity, and the settings: all of them, and first what differs."""
    alone = all(now.devices == 1 for run in runs if (now := progress(run)))
    charts = quantity_charts(runs, without=(*_SHOWN_ELSEWHERE, *["images_per_s_per_gpu"] * alone))
    files = [(f"All settings of {run.name}", path) for run in runs if (path := run.folder / "config.json").is_file()]
    rows = different_settings(runs) if len(runs) > 1 else []
    header = _header(runs, "setting that differs") if rows else ()
    title = "All that was logged, and settings"
    return Section(title, charts=charts, table=rows, header=header, settings=files) if charts or files else None


def _last(run: Run, name: str, *, share: bool = False) -> str:
    curve = run.log.curves.get(name)
    if curve is None:
        return "-"
    value = float(curve.y[-1])
    if not np.isfinite(value):
        return "not finite"
    return f"{value:.1%}" if share else short_number(value)

"""One HTML file that shows a run: numbers, curves and pictures, all inside it; it opens without a network."""

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vadit.report.charts import OF_PAGE, Chart, is_worth_drawing, short_number, svg
from vadit.runtime.errors import escaped
from vadit.runtime.files import whole_file

MAX_PICTURE_BYTES = 1_200_000
"""All pictures of a report together, before base64 (which adds a third); larger ones are reduced."""
SMALL = 64  # pixels: tiles of at most this side are enlarged without smoothing


class Tiles(NamedTuple):
    """Small pictures of one kind, side by side."""

    name: str  # what they are: "your images"
    images: np.ndarray  # uint8 (N, H, W, 3), N >= 1


class Row(NamedTuple):
    """A line of a gallery; the kinds of all rows stand below each other."""

    title: str  # a class, or when the pictures were made; "" for a gallery of one kind, as wide as the page
    tiles: Sequence[Tiles]


@dataclass(frozen=True)
class Section:
    """One part of a report, for instance a stage of a run."""

    title: str
    gallery: Sequence[Row] = ()
    charts: Sequence[Chart] = ()  # wide ones first; flat and empty ones are left out
    table: Sequence[tuple[str, ...]] = ()
    """Rows; the first cell of a row is its name, one alone heads those below. Lines of a cell: `_lines`."""
    header: tuple[str, ...] = ()  # names of the table's columns, where it has more than name and value
    text: str = ""  # a paragraph above all else
    notes: Sequence[str] = ()  # sentences in small type at the end
    settings: Sequence[tuple[str, Path]] = ()  # names and config.json files of runs, each folded away behind a click


def write_report(out: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the report to `out`, whole or not at all. Returns its path."""
    out = Path(out)
    galleries = (row for section in sections for row in section.gallery)
    rate = MAX_PICTURE_BYTES / max(sum(part.images.size // 3 for row in galleries for part in row.tiles), 1)
    style = (resources.files("vadit.report") / "page.css").read_text("utf-8")
    body = "".join(_section(section, f"s{number}", rate) for number, section in enumerate(sections))
    contents = "".join(f'<a href="#s{number}">{_text(section.title)}</a>' for number, section in enumerate(sections))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>"
        f'<header><h1>{_text(title)}</h1><p class="lead">{_text(lead)}</p><nav>{contents}</nav></header>{body}'
        f"<footer>Written by vadit on {datetime.now():%Y-%m-%d %H:%M}.</footer></main></body></html>\n"
    )
    with whole_file(out) as partial:
        partial.write_text(escaped(page), encoding="utf-8")
    return out


def _section(section: Section, anchor: str, rate: float) -> str:
    """A section's HTML; pictures get `rate` bytes per pixel."""
    parts = [f'<section id="{anchor}"><h2>{_text(section.title)}</h2>']
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    if section.gallery:
        parts.append(_gallery(section.gallery, rate))
    if section.table:
        parts.append(_table(section.table, section.header))
    parts.append(_charts(section.charts))
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    for name, path in section.settings:
        text = _text(path.read_text("utf-8", "replace"))
        parts.append(f"<details><summary>{_text(name)}</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"


def _charts(charts: Sequence[Chart]) -> str:
    """Wide charts with their legends below each other; then the small ones in a grid with one legend for all."""
    drawn = [(chart, drawing) for chart in charts if is_worth_drawing(chart) and (drawing := svg(chart))]
    wide = "".join(_card(chart, drawing) for chart, drawing in drawn if chart.wide)
    small = [(chart, drawing) for chart, drawing in drawn if not chart.wide]
    cards = "".join(_card(chart, drawing) for chart, drawing in small)
    return wide + (f'{_legend([chart for chart, _ in small])}<div class="charts">{cards}</div>' if small else "")


def _card(chart: Chart, drawing: str) -> str:
    lines = [series for series in chart.series if series.is_line]
    head = f"<b>{_text(chart.title)}</b>"
    if chart.y_label:
        head += f' <span class="unit">{_text(chart.y_label)}</span>'
    if lost := sum(int((~series.curve.finite).sum()) for series in lines):
        head += f' <span class="warn">{lost} not finite</span>'
    if len(lines) == 1 and not chart.wide and len(lines[0].curve.y):
        value = float(lines[0].curve.y[-1])
        head += f'<span class="last">{short_number(value) if math.isfinite(value) else "not finite"}</span>'
    legend = _legend([chart]) if chart.wide else ""
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    body = f'<figcaption>{head}</figcaption>{legend}<div class="drawing">{drawing}</div>{note}'
    return f'<figure class="chart{" wide" * chart.wide}">{body}</figure>'


def _legend(charts: Sequence[Chart]) -> str:
    """Names and colours of all curves, where there is more than one of them."""
    every = (series for chart in charts for series in chart.series if series.curve.finite.any())
    keys = dict.fromkeys((series.name, OF_PAGE.get(series.shade, series.shade), series.style) for series in every)
    items = "".join(f'<span><i class="{style}" style="color:{color}"></i>{_text(name)}</span>'
                    for name, color, style in keys)  # fmt: skip
    return f'<div class="legend">{items}</div>' if len(keys) > 1 else ""


def _lines(text: str) -> str:
    """A text whose second line is small, and whose third is a warning."""
    first, small, warning = (*text.split("\n", 2), "", "")[:3]
    more = (f"<small>{_text(small)}</small>" if small else "", f'<small class="warn">{_text(warning)}</small>')
    return _text(first) + more[0] + more[1] * bool(warning)


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    width = max(map(len, rows))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    body = "".join(
        f'<tr><th scope="row">{_lines(row[0])}</th>{"".join(f"<td>{_lines(cell)}</td>" for cell in row[1:])}</tr>'
        if len(row) > 1 else f'<tr class="group"><th scope="rowgroup" colspan="{width}">{_text(row[0])}</th></tr>'
        for row in rows
    )  # fmt: skip
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def _gallery(rows: Sequence[Row], rate: float) -> str:
    counts = [max(len(part.images) for part in parts) for parts in zip(*(row.tiles for row in rows), strict=True)]
    template = " ".join(["8.5rem", *(f"{count}fr" for count in counts)])
    return '<div class="gallery">' + "".join(_row(row, template, counts, rate) for row in rows) + "</div>"


def _row(row: Row, template: str, counts: Sequence[int], rate: float) -> str:
    parts = []
    for part, count in zip(row.tiles, counts, strict=True):
        width = part.images.shape[2]
        what = _text(f"{row.title}: {len(part.images)} {part.name}".removeprefix(": ").replace("\n", ", "))
        images = "".join(f'<img src="{_data_uri(each, rate)}" alt="">' for each in part.images)
        side = min(max(width, 64), 160 if count > 1 else 1000)
        columns = (
            f"repeat({count if row.title else 'auto-fill'},minmax({f'0,{side}px' if row.title else f'{side}px,1fr'}))"
        )
        kinds = f"tiles{' small' * (width <= SMALL)}{' whole' * (count == 1)}"
        parts.append(
            f'<figure><figcaption>{_text(part.name)}</figcaption><div class="{kinds}" role="img" aria-label="{what}" '
            f'style="grid-template-columns:{columns}">{images}</div></figure>'
        )
    if not row.title:
        return f'<div class="row plain">{"".join(parts)}</div>'
    return (
        f'<div class="row" style="grid-template-columns:{template}"><h3>{_lines(row.title)}</h3>{"".join(parts)}</div>'
    )


def _data_uri(pixels: np.ndarray, rate: float) -> str:
    """A picture of about `rate` bytes per pixel at most, before base64; in a report, a loss does no harm."""
    image, kind = Image.fromarray(pixels), "png"
    while True:
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=90)
        if buffer.tell() <= max(rate * pixels.size / 3, 1500) or min(image.size) <= SMALL:
            return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if kind == "webp":
            image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)
        kind = "webp"


_text = html.escape  # quotes, too

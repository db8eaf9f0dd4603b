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

from PIL import Image

from vadit.images.formats import open_image
from vadit.report.charts import OF_PAGE, Chart, short_number, svg
from vadit.runtime.errors import escaped
from vadit.runtime.files import whole_file
from vadit.runtime.reading import read_file

MAX_PICTURE_BYTES = 2_400_000
"""All pictures of a report together, before base64 (which adds a third); larger ones are reduced."""


@dataclass(frozen=True)
class Section:
    """One part of a report, for instance a stage of a run."""

    title: str
    charts: Sequence[Chart] = ()  # wide ones first; those without a finite value are left out
    images: Sequence[tuple[str, Path]] = ()  # captions and PNG files
    table: Sequence[tuple[str, ...]] = ()  # rows; the first cell of a row is its name
    header: tuple[str, ...] = ()  # names of the table's columns, where it has more than name and value
    text: str = ""  # a paragraph above all else
    notes: Sequence[str] = ()  # sentences in small type at the end
    settings: Sequence[tuple[str, Path]] = ()  # names and config.json files of runs, each folded away behind a click


def write_report(out: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the report to `out`, whole or not at all. Returns its path."""
    out = Path(out)
    budget = MAX_PICTURE_BYTES // max(sum(len(section.images) for section in sections), 1)
    style = (resources.files("vadit.report") / "page.css").read_text("utf-8")
    body = "".join(_section(section, f"s{number}", budget) for number, section in enumerate(sections))
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


def _section(section: Section, anchor: str, budget: int) -> str:
    parts = [f'<section id="{anchor}"><h2>{_text(section.title)}</h2>']
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    if section.table:
        parts.append(_table(section.table, section.header))
    parts.append(_charts(section.charts))
    for caption, path in section.images:
        source, width = _picture(path, budget)
        parts.append(
            f'<figure class="picture"><img src="{source}" alt="{_text(caption)}" style="max-width:min(100%,{width}px)">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    for name, path in section.settings:
        text = _text(path.read_text("utf-8", "replace"))
        parts.append(f"<details><summary>{_text(name)}</summary><pre>{text}</pre></details>")
    return "".join(parts) + "</section>"


def _charts(charts: Sequence[Chart]) -> str:
    """Wide charts with their legends below each other; then the small ones in a grid with one legend for all."""
    drawn = [(chart, drawing) for chart in charts if (drawing := svg(chart))]
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


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def is_picture(path: Path) -> bool:
    """Whether a file is there, whole, and a picture that can be shown."""
    try:
        open_image(read_file(path))
    except Exception:  # missing, no picture, too large, or damaged in whatever way
        return False
    return True


def _picture(path: Path, budget: int) -> tuple[str, int]:
    """A PNG as a data URI of at most about `budget` bytes before base64, and its width on the page in pixels."""
    data, quality = read_file(path), 90
    opened = open_image(data)
    image, kind = opened.convert("RGB"), (opened.format or "").lower()
    width = image.width
    # Grids of photographs are large as PNG; in a report, unlike in an evaluation, a JPEG does no harm.
    while len(data) > budget and min(image.size) > 64:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        data, kind = buffer.getvalue(), "jpeg"
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", max(width, 240)


_text = html.escape  # quotes, too

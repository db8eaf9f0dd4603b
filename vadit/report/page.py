"""One HTML file that shows a run: numbers, curves and pictures, all inside it; it opens without a network."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image

from vadit.report.charts import Chart, short_number, svg
from vadit.runtime.errors import UsageError
from vadit.runtime.files import whole_file

MAX_PICTURE_BYTES = 2_400_000
"""All pictures of a report together, before base64 (which adds a third); larger ones are reduced."""


_BAD_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises where a file is missing, no picture, cut short or far too large."""


@dataclass(frozen=True)
class Section:
    """One part of a report, for instance a stage of a run."""

    title: str
    charts: Sequence[Chart] = ()
    """Wide ones first; those without a finite value are left out."""
    images: Sequence[tuple[str, Path]] = ()
    """Captions and PNG files."""
    table: Sequence[tuple[str, ...]] = ()
    """Rows; the first cell of a row is its name."""
    header: tuple[str, ...] = ()
    """Names of the table's columns, where it has more than name and value."""
    text: str = ""
    """A paragraph above all else; a blank line starts another."""
    notes: Sequence[str] = ()
    """Sentences in small type at the end."""
    settings: Sequence[tuple[str, Path]] = ()
    """Names and config.json files of runs, each folded away behind a click."""


def write_report(out: str | Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the report to `out`, whole or not at all. Returns its path."""
    out = Path(out)
    paths = [path for section in sections for _, path in section.images]
    budget = MAX_PICTURE_BYTES // max(len(paths), 1)
    body = "".join(_section(section, f"s{number}", budget) for number, section in enumerate(sections))
    contents = "".join(f'<a href="#s{number}">{_text(section.title)}</a>' for number, section in enumerate(sections))
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><main>"
        f"<header><h1>{_text(title)}</h1>{_paragraphs(lead, 'lead')}<nav>{contents}</nav></header>{body}"
        f"<footer>Written by vadit on {datetime.now():%Y-%m-%d %H:%M}.</footer></main></body></html>\n"
    )
    with whole_file(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return out


# ------------------------------------------------------------------------------------------ parts of the page


def _section(section: Section, anchor: str, budget: int) -> str:
    parts = [f'<section id="{anchor}"><h2>{_text(section.title)}</h2>', _paragraphs(section.text, "")]
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
        parts.append(f"<details><summary>{_text(name)}</summary><pre>{_text(_settings(path))}</pre></details>")
    return "".join(parts) + "</section>"


def _charts(charts: Sequence[Chart]) -> str:
    """Wide charts with their legends below each other; then the small ones in a grid with one legend for all."""
    drawn = [(chart, drawing) for chart in charts if (drawing := svg(chart))]
    wide = "".join(_card(chart, drawing, "chart wide") for chart, drawing in drawn if chart.wide)
    small = [(chart, drawing) for chart, drawing in drawn if not chart.wide]
    if not small:
        return wide
    cards = "".join(_card(chart, drawing, "chart") for chart, drawing in small)
    return f'{wide}{_legend([chart for chart, _ in small])}<div class="charts">{cards}</div>'


def _card(chart: Chart, drawing: str, kind: str) -> str:
    lines = [series for series in chart.series if not series.marks]
    lost = sum(int((~series.curve.finite).sum()) for series in lines)
    warning = f' <span class="warn">{lost} not finite</span>' if lost else ""
    last = ""
    if len(lines) == 1 and not chart.wide and len(lines[0].curve.y):
        value = float(lines[0].curve.y[-1])
        last = f'<span class="last">{short_number(value) if math.isfinite(value) else "not finite"}</span>'
    unit = f' <span class="unit">{_text(chart.y_label)}</span>' if chart.y_label else ""
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    legend = _legend([chart]) if chart.wide else ""
    head = f"<figcaption><b>{_text(chart.title)}</b>{unit}{warning}{last}</figcaption>"
    return f'<figure class="{kind}">{head}{legend}{drawing}{note}</figure>'


def _legend(charts: Sequence[Chart]) -> str:
    """Names and colours of all curves, where there is more than one of them."""
    keys = dict.fromkeys(
        (series.name, series.shade, "ring" if series.hollow else "dash" if series.dashed else "dot")
        for chart in charts
        for series in chart.series
        if series.curve.finite.any()
    )
    if len(keys) < 2:
        return ""
    items = "".join(
        f'<span><i class="{kind}" style="color:{shade}"></i>{_text(name)}</span>' for name, shade, kind in keys
    )
    return f'<div class="legend">{items}</div>'


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{_text(row[0])}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def _settings(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path} does not exist; name the config.json of a run")
    return path.read_text(encoding="utf-8")


def is_picture(path: Path) -> bool:
    """Whether a file is there and is whole, as far as its format can tell without unpacking it."""
    try:
        with Image.open(path) as opened:
            opened.verify()
    except _BAD_PICTURE:
        return False
    return True


def _picture(path: Path, budget: int) -> tuple[str, int]:
    """A PNG as a data URI of at most about `budget` bytes before base64, and its width on the page in pixels."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; name a picture that was written") from None
    except _BAD_PICTURE as error:
        raise UsageError(f"{path} is not a readable picture ({error}); name a PNG file") from None
    width, kind = image.width, "png"
    # Grids of photographs are large as PNG; in a report, unlike in an evaluation, a JPEG does no harm.
    quality = 90
    while len(data) > budget and min(image.size) > 64:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
        data, kind = buffer.getvalue(), "jpeg"
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.LANCZOS)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", max(width, 240)


def _paragraphs(text: str, kind: str) -> str:
    style = f' class="{kind}"' if kind else ""
    return "".join(f"<p{style}>{_text(part.strip())}</p>" for part in text.split("\n\n") if part.strip())


def _text(text: str) -> str:
    return html.escape(text, quote=True)


_STYLE = """
:root{--ink:#1d2433;--soft:#5b6475;--line:#e3e7ee;--accent:#2f6fde;--paper:#fff;--ground:#f5f7fa}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 60px}
h1{margin:0 0 8px;font-size:30px;letter-spacing:-.015em;line-height:1.2}
h2{margin:0 0 14px;font-size:20px;letter-spacing:-.01em}
.lead{max-width:46em;margin:0 0 10px;color:var(--soft);font-size:17px}
nav{display:flex;flex-wrap:wrap;gap:8px;margin:18px 0 26px}
nav a{padding:4px 12px;border:1px solid var(--line);border-radius:99px;background:var(--paper);color:var(--accent);
text-decoration:none;font-size:14px}
section{margin:0 0 22px;padding:24px;border:1px solid var(--line);border-radius:12px;background:var(--paper)}
section p{max-width:46em;margin:0 0 14px}
.table{overflow-x:auto;margin:0 0 18px;font-size:15px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:6px 28px 6px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
tbody th{color:var(--soft);font-weight:400}
td{font-weight:600}
thead th{color:var(--soft);font-size:13px;font-weight:600}
figure{margin:0}
.picture{margin:0 0 20px}
.picture img{display:block;width:100%;height:auto;border-radius:6px}
.picture figcaption{margin-top:6px;color:var(--soft);font-size:14px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:14px}
.chart{padding:10px 10px 4px;border:1px solid var(--line);border-radius:8px}
.chart figcaption{display:flex;gap:8px;align-items:baseline;padding:0 4px;font-size:14px}
.chart .last{margin-left:auto;color:var(--accent);font-weight:600;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}
.wide{margin:0 0 16px;padding:14px 14px 8px}.wide .note{margin:4px 4px 6px}.unit{color:var(--soft);font-size:13px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:4px 4px 10px;font-size:13.5px}
.legend i{display:inline-block;width:11px;height:11px;margin-right:6px;border:2px solid;border-radius:99px}
.legend .dot{background:currentColor}.legend .dash{height:0;border-width:1px;border-style:dashed;width:16px;
vertical-align:middle}
.note,footer{color:var(--soft);font-size:14px}
.warn{color:#b3261e;font-size:12px}
details{margin-top:16px}
summary{color:var(--accent);cursor:pointer;font-size:14px}
pre{max-height:420px;margin:10px 0 0;padding:14px;overflow:auto;border-radius:8px;background:var(--ground);
font-size:12.5px}
@media print{body{background:#fff}main{padding:0}section{break-inside:avoid}nav{display:none}}
""".strip()

"""vadit report: one page about one or more runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from vadit.config.ranges import Checked, PathName


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Checked):
    """One self-contained HTML page about runs, and its main charts as PNGs in a folder beside it."""

    runs: Annotated[Positional[tuple[PathName, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders; several are drawn over each other and compared."""
    out: PathName = ""
    """HTML file to write; default: RUN/report.html for one run, else report.html here."""
    title: str = ""
    """Title of the page; default: the names of the runs."""
    pngs: bool = True
    """Write the charts as PNGs, too, into a folder named as the page, with -charts."""


def run(options: ReportOptions) -> None:
    """Read, draw and write."""
    from vadit.report.sections import write_runs_report
    from vadit.runtime.console import say

    out = Path(options.out or (Path(options.runs[0], "report.html") if len(options.runs) == 1 else "report.html"))
    pngs, notes = write_runs_report(options.runs, out, title=options.title, pngs=options.pngs)
    for note in notes:
        say(f"note: {note}")
    pictures = f"; {len(pngs)} charts in {pngs[0].parent}" if pngs else ""
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB{pictures}")

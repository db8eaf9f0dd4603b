"""vadit report: one page about one or more runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from vadit.config.ranges import Checked, PathName


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Checked):
    """One self-contained HTML page about runs."""

    runs: Annotated[Positional[tuple[PathName, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders; several are drawn over each other and compared."""
    out: PathName = ""  # HTML file to write; default: RUN/report.html for one run, else report.html here.


def run(options: ReportOptions) -> None:
    from vadit.report.sections import write_runs_report
    from vadit.runtime.console import say

    out = Path(options.out or (Path(options.runs[0], "report.html") if len(options.runs) == 1 else "report.html"))
    for note in write_runs_report(options.runs, out):
        say(f"note: {note}")
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")

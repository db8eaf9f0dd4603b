"""Has it become slower? Two sets of rows of a benchmark, settings for settings, on equal hardware.

    python benchmarks/compare.py benchmarks/results/steps-HARDWARE.csv [--before COMMIT] [--after COMMIT]
    python benchmarks/compare.py MAIN.csv BRANCH.csv [--tolerance 0.05]

Reads the rows of bench_step.py (images per second) and of the ops' benchmarks (milliseconds). Rows belong together if
every setting is equal: hardware, threads, processes, recipe, batch, precision and the rest; date, commit and versions
may differ. With one file, each setting's newest commit is held against the one before it, or against --before.
Several rows of one side (bench_step.py --repeats) are taken together: the median of their medians, and as spread the
widest of their quartiles.

The ratio is speed after over speed before, with the range that the quartiles leave it. It counts as a regression where
it is below 1 - tolerance and the two spreads do not overlap; below the tolerance and within the spread it is told as
unsure. Exit code: 0 no regression, 1 at least one, 2 nothing to compare.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

KINDS = (
    # median, first and third quartile, and whether more is better
    ("images_per_s", "q1_images_per_s", "q3_images_per_s", True),
    ("median_ms", "q1_ms", "q3_ms", False),
)
NO_SETTING = ("date", "commit", "versions")
MEASURED = (
    "rounds",
    "steps",
    "peak_gib",
    "gb_per_s",
    "share_of_copy",
    "share_of_matmul",
    "share_of_peak",
    "gflops_per_image",
)
"""Columns that are results, besides those of KINDS and what ends in _ms or _per_s."""

Settings = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Speed:
    """Of one commit at one setting: higher is faster, whatever the file counts."""

    commit: str
    median: float
    low: float
    high: float
    rows: int
    versions: str


@dataclass(frozen=True)
class Comparison:
    """Two speeds of one setting."""

    settings: Settings
    before: Speed
    after: Speed

    @property
    def ratio(self) -> float:
        """Speed after over speed before."""
        return self.after.median / self.before.median

    @property
    def spread(self) -> tuple[float, float]:
        """The ratio at the quartiles that favour the one and the other."""
        return self.after.low / self.before.high, self.after.high / self.before.low

    def verdict(self, tolerance: float) -> str:
        """slower, unsure, or empty."""
        if self.ratio >= 1 - tolerance:
            return ""
        return "slower" if self.after.high < self.before.low else "unsure"


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a benchmark's file.

    Raises:
        ValueError: there is no such file, it has no columns of a known benchmark, or a row is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run a benchmark first")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} has no rows; run a benchmark first")
    kind = _kind(rows[0], path)
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {number}: more or fewer columns than the header names")
        for name in kind[:3]:
            try:
                sound = float(row[name]) > 0
            except ValueError:
                sound = False
            if not sound:
                raise ValueError(f"{path}, line {number}: {name} is {row[name]!r}, a positive number is needed")
    return rows


def _kind(row: dict[str, str], path: Path) -> tuple[str, str, str, bool]:
    for kind in KINDS:
        if all(name in row for name in (*kind[:3], "commit", "hardware")):
            return kind
    raise ValueError(f"{path} has neither the columns of bench_step.py nor those of the ops' benchmarks")


def settings_of(row: dict[str, str]) -> Settings:
    """Everything that has to be equal for two rows to be compared."""
    return tuple(
        (name, value)
        for name, value in row.items()
        if name not in (*NO_SETTING, *MEASURED) and not name.endswith(("_ms", "_per_s"))
    )


def speed(rows: list[dict[str, str]]) -> Speed:
    """Rows of one commit and setting as one speed."""
    median, low, high, more_is_better = _kind(rows[0], Path("the row"))
    if more_is_better:
        medians, lows, highs = ([float(row[name]) for row in rows] for name in (median, low, high))
    else:
        medians, lows, highs = ([1 / float(row[name]) for row in rows] for name in (median, high, low))
    return Speed(rows[0]["commit"], statistics.median(medians), min(lows), max(highs), len(rows), rows[-1]["versions"])


def pair(
    before: Iterable[dict[str, str]], after: Iterable[dict[str, str]], commits: tuple[str | None, str | None]
) -> list[Comparison]:
    """Comparisons of two files' rows, each file's newest commit at a setting unless `commits` names one."""
    sides = []
    for rows, wanted in zip((before, after), commits, strict=True):
        newest: dict[Settings, list[dict[str, str]]] = {}
        for row in rows:
            if wanted is None or row["commit"].startswith(wanted):
                of_setting = newest.setdefault(settings_of(row), [])
                if of_setting and of_setting[-1]["commit"] != row["commit"]:
                    of_setting.clear()
                of_setting.append(row)
        sides.append(newest)
    first, second = sides
    return [Comparison(key, speed(first[key]), speed(second[key])) for key in first if key in second]


def within(rows: list[dict[str, str]], commits: tuple[str | None, str | None]) -> list[Comparison]:
    """Comparisons of one file's rows: by default the newest commit of a setting against the one before it."""
    found = []
    for settings in dict.fromkeys(map(settings_of, rows)):
        own = [row for row in rows if settings_of(row) == settings]
        order = list(dict.fromkeys(row["commit"] for row in own))
        after = next((name for name in reversed(order) if commits[1] is None or name.startswith(commits[1])), None)
        earlier = order[: order.index(after)] if after is not None else []
        candidates = earlier if commits[0] is None else [name for name in order if name != after]
        before = next(
            (name for name in reversed(candidates) if commits[0] is None or name.startswith(commits[0])), None
        )
        if before is not None and after is not None:
            sides = ([row for row in own if row["commit"] == name] for name in (before, after))
            found.append(Comparison(settings, *map(speed, sides)))
    return found


def show(comparisons: list[Comparison], tolerance: float) -> None:
    """A line per comparison; settings that all share are told once."""
    common = set.intersection(*(set(each.settings) for each in comparisons))
    print(", ".join(f"{name} {value}" for name, value in comparisons[0].settings if (name, value) in common and value))
    for each in comparisons:
        own = " ".join(f"{name} {value}" for name, value in each.settings if (name, value) not in common)
        low, high = each.spread
        verdict = each.verdict(tolerance).upper()
        moved = (
            "" if each.before.versions == each.after.versions else f" [{each.before.versions} -> {each.after.versions}]"
        )
        print(
            f"  {own or 'speed'}: {each.before.commit} -> {each.after.commit} {each.ratio:.3f}x "
            f"({low:.3f}-{high:.3f}; {each.before.rows} and {each.after.rows} rows){moved} {verdict}".rstrip()
        )


def main(arguments: list[str] | None = None) -> int:
    """Compare, print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="CSV")
    parser.add_argument("--before", help="commit, from its beginning")
    parser.add_argument("--after", help="commit, from its beginning")
    parser.add_argument("--tolerance", type=float, default=0.05, help="share of speed that may be lost")
    options = parser.parse_args(arguments)
    if len(options.files) > 2:
        parser.error("one file or two")
    if not 0 <= options.tolerance < 1:
        parser.error(f"--tolerance is {options.tolerance}; it must be in [0, 1)")
    commits = (options.before, options.after)
    try:
        files = [read(path) for path in options.files]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    comparisons = within(files[0], commits) if len(files) == 1 else pair(files[0], files[1], commits)
    if not comparisons:
        print("no two rows of equal hardware and settings and of different commits", file=sys.stderr)
        return 2
    show(comparisons, options.tolerance)
    slower = sum(each.verdict(options.tolerance) == "slower" for each in comparisons)
    if slower:
        print(f"{slower} of {len(comparisons)} slower by more than {options.tolerance:.0%}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())

"""Markdown of the newest rows of benchmarks/results/kernels-*.csv, as kernels/README.md shows it."""

from __future__ import annotations

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("eager", "compile", "reference", "cpp", "triton", "cuda", "copy")
OPS = ("adamw_ema", "rms_norm", "gated_norm", "swiglu", "rope", "vf_loss", "group_norm_silu")


def main() -> None:
    for path in sorted(RESULTS.glob("kernels-*.csv")):
        newest: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
        for row in csv.DictReader(path.open()):
            key = (row["op"], row["shape"], row["dtype"], row["part"])
            newest.setdefault(key, {})[row["contender"]] = row
        newest = {key: rows for key, rows in newest.items() if key[0] in OPS}
        columns = [name for name in COLUMNS if any(name in rows for rows in newest.values())]
        stamp = next(iter(next(iter(newest.values())).values()))
        print(f"\n{stamp['hardware']}, {stamp['threads']} thread, {stamp['versions']}, {stamp['date']}, ms:\n")
        print(f"| op | shape | dtype | part | {' | '.join(columns)} |")
        print("|---" * (4 + len(columns)) + "|")
        for (op, shape, dtype, part), rows in newest.items():
            if part == "backward":
                continue
            cells = [f"{float(rows[name]['median_ms']):.3g}" if name in rows else "" for name in columns]
            print(f"| `{op}` | {shape} | {dtype} | {part.replace('+', ' + ')} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""What the benchmarks of the ops share: contenders timed in turns, a copy ceiling from the same run, rows in a CSV.

    python benchmarks/bench_rms_norm.py [--device cpu|cuda] [--threads 1] [--rounds 15] [--shapes B ...] [--no-save]

Contenders take turns round by round, so that other work on the machine and the clock's drift meet all alike; medians
and quartiles are of those rounds. On CUDA a round is timed with events after a flush of the L2 cache. "copy" moves as
many bytes as the op has to, read and written half each: its speed is the ceiling that shares refer to. Rows go to
benchmarks/results/kernels-HARDWARE.csv. Runs from a bare checkout: PYTHONPATH=. is enough.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import logging
import os
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

from vadit.kernels import dispatch

HERE = Path(__file__).parent
RESULTS = Path(os.environ.get("VADIT_RESULTS") or HERE / "results")
REHEARSAL = bool(os.environ.get("VADIT_REHEARSE"))
"""Whether sizes are to be small: what is wanted is that everything runs (gpu_day.sh --rehearse)."""
PEERS = ("liger-kernel", "apex", "flash-attn", "quack-kernels")
PART_BUDGET_S = 8.0
MIN_ROUNDS = 5  # Rounds are cut down to MIN_ROUNDS where all of them would take longer than the budget.
MIN_ROUND_MS = 20.0
"""A round repeats the call until it lasts this long: clocks and launches are coarse beside one call."""

Op = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype. `contenders` are functions of `inputs`; those that need a gradient say so.

    An op that updates in place has no inputs: its bytes are the forward ones.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Op]
    forward_bytes: int
    backward_bytes: int


def main(
    description: str | None,
    shapes: dict[str, dict[str, tuple[int, ...]]],
    cases: Callable[[str, tuple[int, ...], str], Iterable[Case]],
) -> None:
    """The whole of an op's benchmark: `shapes` by device and name, and the cases of a shape on a device."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="*", help="names of shapes; all of the device's if left out")
    parser.add_argument("--first", action="store_true", help="the device's first shape, the largest, alone")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # the backward pass is timed alone, on one graph that is kept
    functorch_config.donated_buffer = False
    wanted = list(shapes[options.device].items())[: 1 if options.first else None]
    if REHEARSAL:
        wanted = [
            (name, tuple(min(size, {0: 2, 1: 32}.get(axis, 8)) for axis, size in enumerate(sizes)))
            for name, sizes in wanted
        ]
    found = (case for name, sizes in wanted for case in cases(name, sizes, options.device))
    run((case for case in found if not options.shapes or case.shape in options.shapes), options)


def contenders(op: Op, eager: Op, device: str) -> dict[str, Op]:
    """Plain torch, its compiled form, and each backend of ours that runs here, whatever VADIT_KERNELS says."""
    found: dict[str, Op] = {"eager": eager, "compile": torch.compile(eager, fullgraph=True, dynamic=False)}
    for name, backend in dispatch.BACKENDS.items():
        if backend.missing is None and backend.device == device:
            found[name] = functools.partial(on, name, op)
    return found


def on(backend: str, op: Op, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The op as a backend runs it."""
    with dispatch.setting(backend):
        return op(*inputs)


# ------------------------------------------------------------------------------------------------ timing


class Clock:
    """Milliseconds of one call: events after a flushed cache on CUDA, the process's clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            # larger than the L2 cache of any card (H100: 50 MB, B200: 126 MB)
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats * 1e3
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start_event.record()
            call()
            end_event.record()
            torch.cuda.synchronize()
            times.append(start_event.elapsed_time(end_event))
        return statistics.median(times)


def alternate(calls: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Times in milliseconds of each call, one per round, the calls taking turns."""
    if REHEARSAL:
        return {name: [clock(call, 1) for _ in range(2)] for name, call in calls.items()}
    repeats, round_ms = {}, 0.0
    for name, call in calls.items():
        clock(call, 1)  # compiles, allocates, fills caches
        once = clock(call, 1)
        repeats[name] = max(1, round(MIN_ROUND_MS / max(once, 1e-3)))
        round_ms += once * repeats[name]
    affordable = int(PART_BUDGET_S * 1e3 / round_ms)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(min(rounds, max(affordable, MIN_ROUNDS))):
        for name, call in calls.items():
            times[name].append(clock(call, repeats[name]))
    return times


def _parts(case: Case, contender: Op) -> dict[str, Callable[[], object]]:
    """The calls to time: the forward pass without a graph, the backward pass of one graph, both; or an update."""
    if not case.inputs:
        return {"update": contender}
    differentiated = [t for t in case.inputs if t.requires_grad]

    def results() -> tuple[Tensor, ...]:
        found = contender(*case.inputs)
        return tuple(t for t in ((found,) if isinstance(found, Tensor) else found) if t.requires_grad)

    def forward() -> object:
        with torch.no_grad():
            return contender(*case.inputs)

    kept = results()
    cotangents = [torch.randn_like(t) for t in kept]

    def backward() -> object:
        return torch.autograd.grad(kept, differentiated, cotangents, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(results(), differentiated, cotangents)

    return {"forward": forward, "backward": backward, "forward+backward": both}


def copy_of(num_bytes: int, device: str) -> Callable[[], object]:
    """A copy that moves `num_bytes` in all, read and written."""
    source, target = (torch.empty(max(num_bytes // 2, 1), dtype=torch.uint8, device=device) for _ in range(2))
    source.fill_(1)
    return lambda: target.copy_(source)


# ------------------------------------------------------------------------------------------------ rows


def hardware(device: str) -> str:
    """Name of the processor or card, as a part of a file's name."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"model name\s*:\s*(.*)", text)
        name = f"{model[1] if model else 'cpu'} {torch.backends.cpu.get_cpu_capability()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(*command: str) -> str:
    """What a program prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit(*sources: str) -> str:
    """The commit measured; "+" marks sources (relative to this folder) that differ from it.

    VADIT_COMMIT says it where there is no git.
    """
    if "VADIT_COMMIT" in os.environ:
        return os.environ["VADIT_COMMIT"]
    changed = _output("git", "status", "--porcelain", "--", *sources)
    return (_output("git", "rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def versions(device: str, *others: str) -> str:
    """Releases of torch, Triton, the peers and `others` that are installed, and the driver's."""
    parts = [f"torch {torch.__version__}"]
    for name in ("triton", *PEERS, *others):
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        parts.append(f"driver {driver[0]}" if driver else f"CUDA {torch.version.cuda}")
    return ", ".join(parts)


def stamp(device: str, sources: Sequence[str], *others: str) -> dict[str, Any]:
    """What the rows of most benchmarks begin with; `others`: packages whose releases matter."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(*sources),
        "hardware": hardware(device),
        "versions": versions(device, *others),
    }


def run(cases: Iterable[Case], options: argparse.Namespace) -> None:
    """Measure, print and save: a line of the CSV per part and contender, times in milliseconds per call."""
    clock = Clock(options.device)
    stamp = {
        "date": datetime.date.today().isoformat(),
        "commit": commit("../csrc", "../kernels", "../benchmarks/*.py"),
        "hardware": hardware(options.device),
        "threads": options.threads,
        "versions": versions(options.device),
    }
    for case in cases:
        parts = {}
        for name, contender in case.contenders.items():
            try:
                parts[name] = _parts(case, contender)
            except Exception as error:
                if name in ("eager", *dispatch.BACKENDS):
                    raise
                print(f"{case.op} {case.shape}: without {name} ({type(error).__name__}: {error})", flush=True)
        moved = {"forward": case.forward_bytes, "backward": case.backward_bytes}
        moved["forward+backward"] = case.forward_bytes + case.backward_bytes
        rows: list[dict[str, Any]] = []
        moved["update"] = case.forward_bytes
        for part, num_bytes in ((part, moved[part]) for part in next(iter(parts.values()))):
            calls = {name: part_calls[part] for name, part_calls in parts.items()}
            calls["copy"] = copy_of(num_bytes, options.device)
            what = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."), "part": part}
            line = _lines(alternate(calls, options.rounds, clock), num_bytes, what)
            show(line)
            rows += [stamp | row for row in line.values()]
        if not options.no_save:  # case by case: what is stopped leaves what it has
            append(RESULTS / f"kernels-{stamp['hardware']}.csv", rows)


def _lines(times: dict[str, list[float]], num_bytes: int, what: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What a part's times say of each contender."""
    ceiling = statistics.median(times["copy"])
    found = {}
    for name, values in times.items():
        q1, median, q3 = statistics.quantiles(values, n=4)
        found[name] = what | {
            "contender": name, "median_ms": round(median, 4), "q1_ms": round(q1, 4), "q3_ms": round(q3, 4),
            "gb_per_s": round(num_bytes / median / 1e6, 2), "share_of_copy": round(ceiling / median, 3),
            "rounds": len(values),
        }  # fmt: skip
    return found


def show(line: dict[str, dict[str, Any]]) -> None:
    """Print one part: the median of each contender, and the best of our backends against torch."""
    first = line["copy"]
    cells = "  ".join(f"{name} {row['median_ms']:.3f}" for name, row in line.items())
    verdict = ""
    if own := [row for name, row in line.items() if name in dispatch.BACKENDS]:
        best = min(own, key=lambda row: row["median_ms"])
        others = [name for name in line if name not in (*dispatch.BACKENDS, "copy")]
        ratios = [f"{line[name]['median_ms'] / best['median_ms']:.2f}x {name}" for name in others]
        verdict = f" | {best['contender']}: {', '.join(ratios)}, {best['share_of_copy']:.0%} of copy"
    what = f"{first['op']:8} {first['shape']:7} {first['dtype']:8} {first['part']:16}"
    print(f"{what} ms: {cells}{verdict}", flush=True)


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows (of one kind, one or more) to a CSV; a new one gets its header line.

    ValueError where the file has other columns: its rows are evidence, and stay as they are.
    """
    path.parent.mkdir(exist_ok=True)
    new, names = not path.exists(), list(rows[0])
    if not new:
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != names:
            raise ValueError(f"{path} has the columns {found}, these rows have {names}; move the file out of the way")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write dicts of one kind as a CSV, anew: for what follows from other files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow(cells)

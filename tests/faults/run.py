"""Faults in real runs, and what is lost: python tests/faults/run.py [--kills 50] [--seed 0] [--only KIND ...]

A run is the generator or the tokenizer, small, trained by two processes over gloo on a CPU: 12 steps, a checkpoint
every second. Its undisturbed end is what each disturbed run has to reach, bit for bit: the log of every step, weights,
averages, optimizer moments, buffers and the random states of both processes.

kills: `kill -9` of a random process at a random moment, then the same command again. Kinds of runs take turns. The
moments do, too: any time in its steps, twice as often as the others; while a checkpoint is written; while it is
published (both behind a disk that is slowed down, or they would hardly be hit); and two kills, one any time in the
run's life, start-up included, and one while it starts again. Where a kill fell is read off the disk at that moment.
The process that is left has to end by itself and to name the one that is gone; before the first step, where nobody
watches yet, it is killed after a second, as launchers do.
The other kinds are single faults, injected into one process or on the disk (single.py).

The table goes to the screen and to --csv, by default benchmarks/results/reliability.csv.
"""

import argparse
import datetime
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch loads
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's: a process that is forked must have one thread
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
os.environ["COLUMNS"] = "1000"  # of the messages that are searched
sys.path.extend(str(Path(__file__).parents[up] / name) for up, name in ((0, ""), (1, ""), (2, "benchmarks")))
import harness
from checkpoint_worker import assert_same_end
from pairs import EVERY, FLUSH_S, STEPS, Pair, Variant, disk_state, import_all, in_forks, saved_steps
from single import FAULTS, GENERATOR, Row

VARIANTS = [
    GENERATOR,
    Variant("tokenizer", 1, "bf16"),
    Variant("generator", 2, "bf16"),
    Variant("tokenizer", 2, "fp32"),
    Variant("generator", 3, "fp32"),
    Variant("tokenizer", 3, "bf16"),
    Variant("tokenizer", 1, "fp32", stages=True),
]
MOMENTS = ("step", "writing", "step", "publishing", "twice")
PHASES = {
    "start": "kill -9 in start-up",
    "steps": "kill -9 in a step",
    "writing": "kill -9 while a checkpoint is written",
    "publishing": "kill -9 while it is published",
    "restart": "kill -9 in a restart",
}


@dataclass
class Killed:
    """What came of one run that was killed. `phases`: where each kill fell; `lost`: steps that each kill undid."""

    variant: str
    phases: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)
    """How long the process that was left took to end, where it ended by itself."""
    wrong: str = ""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run, and the times that tell when to strike."""

    out: Path
    start_s: float
    step_s: float


def reference(variant: Variant, folder: Path) -> Reference:
    """Train without a fault."""
    pair = Pair(variant.config(folder / variant.name))
    pair.wait_for(lambda: pair.steps() > 0)
    start_s = time.monotonic() - pair.started
    codes = pair.wait()
    if codes != [0, 0] or pair.steps() != STEPS:
        raise RuntimeError(f"{variant.name} ended with {codes} after {pair.steps()} steps: {pair.said()[-4000:]}")
    return Reference(pair.out, start_s, (time.monotonic() - pair.started - start_s) / STEPS)


def killed_run(variant: Variant, moment: str, known: Reference, seed: int, folder: Path) -> Killed:
    """Kill, start again until the run is through, and compare."""
    draw, out = random.Random(seed), folder / f"{seed}-{variant.name}"
    found, life, kills = Killed(variant.name), 0, 2 if moment == "twice" else 1
    while True:
        before = saved_steps(out)
        pair = Pair(variant.config(out), life=life, slow=moment in ("writing", "publishing"))
        life += 1
        if len(found.phases) < kills and _strike(pair, moment, known, draw, found):
            found.wrong = _check_survivor(pair, found)
            found.lost.append(before + pair.steps() - saved_steps(out))
            if found.lost[-1] > 2 * EVERY:
                found.wrong = f"{found.lost[-1]} steps were lost"
            if found.wrong:
                return found
            continue
        codes = pair.wait()
        if codes != [0, 0] or before + pair.steps() != STEPS:
            found.wrong = f"ended with {codes} after {before} and {pair.steps()} steps: {pair.said()[-2000:]}"
            return found
        if len(found.phases) == kills:
            break
        pair.remove()  # it was through before the kill: once more
        found, life = Killed(variant.name), 0
    try:
        assert_same_end(out, known.out)
    except AssertionError as error:
        found.wrong = f"not the same: {error}"
    else:
        pair.remove()
    return found


def _strike(pair: Pair, moment: str, known: Reference, draw: random.Random, found: Killed) -> bool:
    """Wait for the moment and kill; whether there was still somebody to be killed."""
    rank, again = draw.randrange(2), bool(found.phases)
    if moment in ("writing", "publishing"):
        ordinal = draw.randrange(STEPS // EVERY)
        reached = pair.wait_for(lambda: pair.steps() >= ordinal * EVERY and disk_state(pair.out) == moment)
        delay_s = draw.uniform(0, 0.5 if moment == "writing" else 1.2 * FLUSH_S)
    else:
        # A step, 0 being the start, and that long into it: load that comes and goes moves all moments alike.
        weights = [0.0 if moment == "step" else known.start_s, *[0.0 if again else known.step_s] * STEPS]
        ordinal = draw.choices(range(len(weights)), weights)[0]
        reached = pair.wait_for(lambda: pair.steps() >= ordinal)
        delay_s = draw.uniform(0, weights[ordinal])
    end = time.monotonic() + delay_s
    if not (reached and pair.wait_for(lambda: time.monotonic() >= end) and pair.kill(rank)):
        return False
    found.phases.append(disk_state(pair.out) or ("steps" if pair.steps() else "restart" if again else "start"))
    return True


def _check_survivor(pair: Pair, found: Killed) -> str:
    """Wait for the end of the process that is left; what is wrong with it."""
    watched, since = pair.steps() > 0, time.monotonic()
    codes = pair.wait(120.0 if watched else 1.0)
    killed = codes.count(-9)
    if killed == 1:
        found.left_s.append(time.monotonic() - since)
    if killed == 2 and watched:
        return f"the process that was left has not ended: {pair.said()[-2000:]}"
    if killed == 1 and watched and 0 not in codes and f"rank {codes.index(-9)} is gone" not in pair.said():
        return f"the process that is gone was not named: {pair.said()[-2000:]}"
    return ""


def kill_rows(results: list[Killed]) -> list[Row]:
    """A line for the kills in each phase, and one for all runs."""
    rows = []
    for phase, name in PHASES.items():
        runs = [result for result in results for at in result.phases if at == phase]
        lost = [n for result in results for at, n in zip(result.phases, result.lost, strict=False) if at == phase]
        rows.append(Row(name, len(runs), sum(not run.wrong for run in runs), _steps(lost), "bit-equal"))
    good = sum(not result.wrong for result in results)
    waits = [left for result in results for left in result.left_s]
    ended = f"bit-equal; the other process ended by itself within {max(waits, default=0):.0f} s"
    all_lost = [lost for result in results for lost in result.lost]
    return [*rows, Row("kill -9: all runs", len(results), good, _steps(all_lost), ended)]


def _steps(lost: list[int]) -> str:
    low, high = min(lost, default=0), max(lost, default=0)
    return "" if not lost else f"{low} to {high} steps" if low < high else f"{high} step{'s' * (high != 1)}"


def show(rows: list[Row]) -> None:
    """The table in Markdown; docs/reliability.md has it in fewer rows."""
    print("\n| fault | tries | survived | lost | how it ended |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.fault} | {row.tries} | {row.survived} | {row.lost or '-'} | {row.ended} |")


def save(rows: list[Row], path: Path, seed: int, seconds: float) -> None:
    """The table with where it comes from, in the place of the last one."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed", "safetensors"))
    stamp = {
        "date": datetime.date.today().isoformat(),
        "commit": harness.commit("../vadit", "../tests/faults"),
        "hardware": f"{harness.hardware('cpu')} x {os.cpu_count()}",
        "versions": f"Python {platform.python_version()}, {versions}",
        "seed": seed,
        "seconds": round(seconds),
    }
    values = [{name: value for name, value in asdict(row).items() if name != "wrong"} for row in rows]
    harness.write(path, [stamp | row for row in values])


def main() -> int:
    """0 where all is survived."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="runs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=["kills", *FAULTS], choices=["kills", *FAULTS])
    parser.add_argument("--moments", nargs="*", default=list(MOMENTS), choices=sorted(set(MOMENTS)), help="of kills")
    parser.add_argument("--variants", type=int, nargs="*", default=list(range(len(VARIANTS))), help="of kills")
    parser.add_argument("--lanes", type=int, default=2, help="runs at a time")
    parser.add_argument("--csv", type=Path, default=harness.RESULTS / "reliability.csv")
    parser.add_argument("--folder", type=Path, help="where runs that failed stay; a temporary one if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        import_all()
        return measure(options, folder)


def measure(options: argparse.Namespace, folder: Path) -> int:
    """The undisturbed runs, the disturbed ones, the table."""
    start = time.monotonic()
    variants = [VARIANTS[index] for index in options.variants] if "kills" in options.only else []
    names = [name for name in FAULTS if name in options.only]
    needed = list(dict.fromkeys([*variants, *([GENERATOR] if names else [])]))
    known: dict[Variant, Reference] = {}
    for number, made in in_forks([partial(reference, each, folder / "undisturbed") for each in needed], 2, folder):
        if isinstance(made, str):
            raise RuntimeError(made)
        known[needed[number]] = made
    tasks: list[Callable[[], Killed | list[Row]]] = []
    for number in range(options.kills if variants else 0):
        variant, moment = variants[number % len(variants)], options.moments[number % len(options.moments)]
        seed = 1000 * options.seed + number
        tasks.append(partial(killed_run, variant, moment, known[variant], seed, folder / "killed"))
    tasks += [partial(FAULTS[name], known[GENERATOR].out, folder / name) for name in names]
    killed: list[Killed] = []
    single: dict[int, list[Row]] = {}
    for number, result in in_forks(tasks, options.lanes, folder):
        if isinstance(result, Killed):
            killed.append(result)
            ended = [(f"{result.variant}: killed in {', '.join(result.phases)}", result.wrong)]
        else:
            rows = [Row(f"task {number}", 1, 0, "", "failed", result)] if isinstance(result, str) else result
            single[number] = rows
            ended = [(row.fault, row.wrong) for row in rows]
        for what, wrong in ended:
            print(f"{time.monotonic() - start:5.0f} s  {what}: {'FAILED: ' + wrong if wrong else 'ok'}", flush=True)
    table = (kill_rows(killed) if variants else []) + [row for number in sorted(single) for row in single[number]]
    show(table)
    print(f"\nwhere kills fell: {dict(Counter(phase for result in killed for phase in result.phases))}")
    save(table, options.csv, options.seed, time.monotonic() - start)
    return int(any(row.survived < row.tries for row in table))


if __name__ == "__main__":
    sys.exit(main())

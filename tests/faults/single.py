"""The single faults of reliability.py: each is injected into a run of two processes and has to end as it says."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reliability_pairs import BATCH, EVERY, STEPS, Hook, Pair, Variant, compared, flip, log, run_folders, saved_steps
from reliability_pairs import assert_same_end as assert_same_stage
from safetensors.torch import save_file

from vadit.config import DiTConfig, GuardSpec
from vadit.runtime import distributed
from vadit.runtime.stream import sample_ids
from vadit.train import dit
from vadit.train.checkpoint import publish
from vadit.train.guard import Guard
from vadit.train.watchdog import HANG_CODE

GENERATOR = Variant("generator", 1, "fp32")
AT = 10
"""The step that meets the fault: the window of norms (8) is full by then, and step 8 is saved."""


@dataclass(frozen=True)
class Outcome:
    """A line of the table; `wrong` is empty where it ended as it should."""

    fault: str
    lost: str
    ended: str
    wrong: str = ""
    tries: int = 1


def assert_same_end(found: Path, expected: Path) -> None:
    """Two runs logged the same and have the same state at the end of every stage, bit for bit."""
    ours, theirs = run_folders(found), run_folders(expected)
    assert ours and [path.relative_to(found) for path in ours] == [path.relative_to(expected) for path in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert_same_stage(one, other)


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def _judged(fault: str, lost: str, ended: str, check: Callable[[], None]) -> Outcome:
    try:
        check()
    except (AssertionError, OSError, ValueError, KeyError, IndexError) as error:
        return Outcome(fault, lost, ended, f"{type(error).__name__}: {error}")
    return Outcome(fault, lost, ended)


def _need_same(check: Callable[[], None]) -> None:
    if wrong := compared(check):
        raise AssertionError(wrong)


def _finish(config: DiTConfig, reference: Path, *, life: int = 1, left: int | None = None) -> None:
    """Give the command again: it goes on where the newest checkpoint is, and ends as `reference`."""
    out = Path(config.run.out)
    before = saved_steps(out) if left is None else STEPS - left
    pair = Pair(config, life=life)
    codes = pair.wait()
    _need(codes == [0, 0], f"the restart ended with {codes}: {pair.said()[-2000:]}")
    _need(before + pair.steps() == STEPS, f"{pair.steps()} steps after a start from step {before}")
    _need_same(lambda: assert_same_end(out, reference))


# ---------------------------------------------------------------------------------------------- steps that harm


def _break_loss(kind: str) -> Callable[[int], None]:
    """Let the loss of step AT, of process 1, be one that must not be trained on."""

    def prepare(rank: int) -> None:
        original, calls = dit.flow.loss, 0

        def broken(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            loss = original(*args, **settings)
            total = loss.total
            if calls == AT and rank == 1:
                bad = {"nan-loss": total.detach() * math.nan, "nan-gradient": (total - total).sqrt()}
                total = total * 1e6 if kind == "spike" else total + bad[kind]
            return dataclasses.replace(loss, total=total)

        dit.flow.loss = broken

    return prepare


def _leave_out(rank: int) -> None:
    """Let nothing be trained in step AT, which reads its data and draws its random numbers all the same."""
    original, calls = Guard._judge, 0

    def judge(guard: Guard, norms: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        windows = dict(guard._windows)
        veto = original(guard, norms)
        if calls == AT:
            assert guard._judged is not None
            names, found, limits = guard._judged
            guard._windows, guard._judged = windows, (names, found * math.nan, limits)
            veto = torch.ones_like(veto)
        return veto

    Guard._judge = judge  # type: ignore[method-assign,assignment]


def bad_steps(reference: Path, folder: Path) -> list[Outcome]:
    """A NaN loss, a NaN gradient and a spike, each in the same step of process 1: all end as if it were left out."""

    def run(name: str, prepare: Callable[[int], None]) -> tuple[Path, str]:
        config = dataclasses.replace(GENERATOR.config(folder / name), guard=GuardSpec(spike_window=8))
        pair = Pair(config, prepare=prepare)
        codes = pair.wait()
        _need(codes == [0, 0], f"ended with {codes}: {pair.said()[-2000:]}")
        return folder / name, pair.said()

    def check(kind: str) -> None:
        out, said = run(kind, _break_loss(kind))
        events = [json.loads(line) for line in (out / "guard.jsonl").read_text().splitlines()]
        _need([event["step"] for event in events] == [AT], f"the guard told {events}")
        _need(len(set(events[0]["image_ids"])) == BATCH, "the image ids are not told")
        words = "is a spike" if kind == "spike" else "is not finite"
        _need(words in events[0]["reason"] and f"step {AT} left out" in said, f"told {events}")
        lines, before = log(out), log(reference)
        _need(len(lines) == STEPS and lines[: AT - 1] == before[: AT - 1], "the log differs before the fault")
        _need_same(lambda: assert_same_end(out, folder / "expected"))

    names = {"nan-loss": "NaN loss on one rank", "nan-gradient": "NaN gradient on one rank", "spike": "spike"}
    run("expected", _leave_out)
    ended = "left out by both processes; bit-equal to a run without that step"
    return [_judged(told, "1 batch", ended, functools.partial(check, kind)) for kind, told in names.items()]


# ---------------------------------------------------------------------------------------------- files that change


def _damaged(fault: str, words: str, damage: Callable[[Path], None], reference: Path, folder: Path) -> list[Outcome]:
    """Kill both processes in step AT, damage the newest checkpoint, start again."""

    def die(step: int, rank: int, out: Path) -> None:
        if step == AT:
            os.kill(os.getpid(), signal.SIGKILL)

    def check() -> None:
        config = GENERATOR.config(folder / "run", background_saves=False)
        assert isinstance(config, DiTConfig)
        codes = Pair(config, hook=die).wait()
        _need(-9 in codes, f"ended with {codes}")
        newest = sorted((folder / "run" / "checkpoints").glob("step-????????"))[-1]
        _need(newest.name == f"step-{AT - EVERY:08d}", f"{newest.name} is the newest")
        damage(sorted(newest.glob("model-*.safetensors"))[1])
        _finish(config, reference, left=STEPS - (AT - 2 * EVERY))
        said = " ".join((folder / "run-1-0.txt").read_text().split())
        _need(f"{newest} is damaged" in said and words in said, f"not told: {said[-2000:]}")

    lost = f"{AT - 1 - (AT - 2 * EVERY)} steps: those since the checkpoint before"
    return [_judged(fault, lost, "named, and the checkpoint before taken; bit-equal", check)]


def truncated(reference: Path, folder: Path) -> list[Outcome]:
    """The share of process 1 loses its end."""
    return _damaged(
        "checkpoint file truncated",
        "bytes instead of",
        lambda path: os.truncate(path, path.stat().st_size - 1000),
        reference,
        folder,
    )


def flipped(reference: Path, folder: Path) -> list[Outcome]:
    """A bit of the share of process 1 flips."""
    return _damaged("a bit of a checkpoint flipped", "has changed", flip, reference, folder)


# ---------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def _small_disk(path: Path) -> Iterator[bool]:
    """A file system of its own, so that it can be filled; whether it could be had."""
    path.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def _fill_up_page(path: Path) -> None:
    """Blanks in the last line of a log, so that the next one needs another block of the disk."""
    text = path.read_text().removesuffix("\n")
    path.write_text(text + " " * (-(len(text) + 1) % os.sysconf("SC_PAGESIZE")) + "\n")


def full_disk(reference: Path, folder: Path) -> list[Outcome]:
    """In steps 5 to 8 the disk that the run folder lies on is full to the last byte."""
    fault = "disk full during saves"

    def fill(step: int, rank: int, out: Path) -> None:
        filler = out.parent / "filler"
        if rank or step not in (5, 9):
            return
        if step == 9:
            filler.unlink()
            return
        saved = out / "checkpoints" / "step-00000004"
        while not saved.exists():  # written in the background
            time.sleep(0.01)
        _fill_up_page(out / "log.jsonl")
        for size in (1 << 16, 1):
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))

    with _small_disk(folder / "disk") as mounted:
        if not mounted:
            return [Outcome(fault, "", "not tried: mounting a small disk needs rights that are missing", tries=0)]

        def check() -> None:
            out = folder / "disk" / "run"
            pair = Pair(GENERATOR.config(out, keep_checkpoints=9), hook=fill, beside=folder / "run")
            codes = pair.wait()
            _need(codes == [0, 0], f"ended with {codes}: {pair.said()[-3000:]}")
            _need("could not be written" in pair.said() and "training goes on" in pair.said(), "not told")
            found = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()]
            _need(sorted(found) == [2, 4, 10, 12], f"checkpoints of the steps {sorted(found)}")
            _need_same(lambda: _same_but_failures(out, reference))

        return [_judged(fault, "nothing but those saves", "training went on, loudly; bit-equal", check)]


def _same_but_failures(out: Path, reference: Path) -> None:
    """The same end and the same log, which tells of saves that failed besides."""
    lines = log(out)
    assert [line["step"] for line in lines if "failed_saves" in line], "the log tells of no failure"
    assert [{name: value for name, value in line.items() if name != "failed_saves"} for line in lines] == log(reference)
    ends = [publish.newest(path / "checkpoints") for path in (out, reference)]
    assert ends[0] is not None and ends[1] is not None and ends[0].name == ends[1].name
    for path in ends[1].glob("*.safetensors"):
        assert path.read_bytes() == (ends[0] / path.name).read_bytes(), path.name


# ---------------------------------------------------------------------------------------------- processes


def sigterm(reference: Path, folder: Path) -> list[Outcome]:
    """One process is asked to stop in its third step; all agree on the eighth."""

    def ask(step: int, rank: int, out: Path) -> None:
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def check() -> None:
        config = GENERATOR.config(folder / "run")
        assert isinstance(config, DiTConfig)
        pair = Pair(config, hook=ask)
        codes = pair.wait()
        _need(codes == [0, 0], f"ended with {codes}: {pair.said()[-2000:]}")
        _need(pair.said().count("resume with the same command") == 2, f"said {pair.said()[-2000:]}")
        _need(pair.steps() == saved_steps(folder / "run") == 8, f"{pair.steps()} steps")
        _finish(config, reference)

    return [_judged("SIGTERM to one rank", "nothing", "both saved and ended with code 0; bit-equal", check)]


def hang(reference: Path, folder: Path) -> list[Outcome]:
    """One process sleeps for ever in its step AT."""
    hook: Hook = lambda step, rank, out: time.sleep(10_000 if step == AT and rank == 1 else 0)  # noqa: E731

    def check() -> None:
        config = GENERATOR.config(folder / "run", hang_timeout_s=12.0)
        assert isinstance(config, DiTConfig)
        pair = Pair(config, hook=hook)
        codes = pair.wait()
        _need(codes == [HANG_CODE, HANG_CODE], f"ended with {codes}: {pair.said()[-2000:]}")
        words = f"rank 1 does not get on; the last step it reported is {AT - 1} (training)"
        _need(words in pair.said(), f"said {pair.said()[-2000:]}")
        _need(saved_steps(folder / "run") == AT - EVERY, "the last checkpoint is missing")
        _finish(config, reference)

    ended = f"both ended with code {HANG_CODE} and named it and its step; bit-equal"
    return [_judged("a rank hangs", "1 step", ended, check)]


# ---------------------------------------------------------------------------------------------- data


PER_SHARD = 4


def _make_latents(folder: Path, channels: int, size: int) -> None:
    """An epoch of latents in twelve shards; the first latent of the one called last.safetensors comes late."""
    folder.mkdir(parents=True)
    first: dict[int, int] = {}
    ((_, order),) = sample_ids(torch.arange(STEPS * PER_SHARD), STEPS * PER_SHARD, 0)
    for position, index in enumerate(order.tolist()):
        first.setdefault(index // PER_SHARD, position)
    last = max(first, key=lambda number: first[number])
    assert first[last] >= 4 * BATCH
    for number in range(STEPS):
        latents = torch.randn(PER_SHARD, channels, size, size, generator=torch.Generator().manual_seed(number))
        tensors = {"latents": latents, "latents_flip": latents.flip(-1), "labels": torch.arange(PER_SHARD)}
        name = f"{number:02d}{'-last' if number == last else ''}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
    statistics = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
    torch.save(statistics, folder / "latents_stats.pt")


def bad_shard(reference: Path, folder: Path) -> list[Outcome]:
    """A shard is cut short after the run has begun, before its first latent is read."""
    data = folder / "data"

    def config(name: str) -> DiTConfig:
        made = GENERATOR.config(folder / name)
        assert isinstance(made, DiTConfig)
        return dataclasses.replace(made, data=dataclasses.replace(made.data, path=str(data)))

    def shard() -> Path:
        return next(data.glob("*-last.safetensors"))

    def cut(rank: int) -> None:
        original = dit.LatentLoader

        def opened(*args: Any, **settings: Any) -> Any:
            distributed.barrier()  # both have opened the data
            if rank == 0:
                os.truncate(shard(), 500)
            distributed.barrier()
            return original(*args, **settings)

        dit.LatentLoader = opened  # type: ignore[assignment,misc]

    def check_raise() -> None:
        spec = config("straight").model
        _need_same(lambda: _make_latents(data, spec.in_channels, spec.input_size))
        codes = Pair(config("straight")).wait()
        _need(codes == [0, 0], f"the undisturbed run ended with {codes}")
        whole = shard().read_bytes()
        pair = Pair(config("cut"), prepare=cut)
        codes = pair.wait()
        _need(1 in codes and 0 not in codes, f"ended with {codes}: {pair.said()[-2000:]}")
        _need(f"error: {shard()}: " in pair.said(), f"not named: {pair.said()[-2000:]}")
        saved = saved_steps(folder / "cut")
        _need(0 < saved < STEPS, f"{saved} steps are saved")
        _need(pair.steps() - 1 - saved < 2 * EVERY, f"{pair.steps()} steps were begun, {saved} saved")
        shard().write_bytes(whole)
        _finish(config("cut"), folder / "straight")

    ended = "named, and all ended; with the shard put back bit-equal"
    return [_judged("unreadable shard in mid-epoch", f"at most {2 * EVERY - 1} steps", ended, check_raise)]


FAULTS: dict[str, Callable[[Path, Path], list[Outcome]]] = {
    "bad-steps": bad_steps,
    "truncated": truncated,
    "flipped": flipped,
    "full-disk": full_disk,
    "sigterm": sigterm,
    "hang": hang,
    "bad-shard": bad_shard,
}
"""By name: (the undisturbed run of GENERATOR, a folder of its own) -> lines of the table."""

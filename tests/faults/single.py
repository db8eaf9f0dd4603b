"""Single faults: each is injected into a run of two processes and has to end as its row of the table says."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoint_worker import assert_same_end, flip, log
from guard_help import counted
from pairs import BATCH, EVERY, STEPS, Config, Pair, Variant, saved_steps
from safetensors.torch import save_file

from vadit.config import GuardSpec
from vadit.runtime import distributed
from vadit.runtime.stream import sample_ids
from vadit.train import dit
from vadit.train.checkpoint import publish
from vadit.train.guard import Guard
from vadit.train.watchdog import HANG_CODE

GENERATOR = Variant("generator", 1, "fp32")
AT = 10  # The step that meets the fault: the window of norms (8) is full by then, and step 8 is saved.


@dataclass
class Row:
    """A line of the table; `wrong` is empty where it ended as it should."""

    fault: str
    tries: int
    survived: int
    lost: str
    ended: str
    wrong: str = ""


def judged(fault: str, lost: str, ended: str, check: Callable[[], None]) -> Row:
    """The row of a fault whose check raises what is wrong."""
    try:
        check()
    except (AssertionError, OSError, ValueError, KeyError, IndexError) as error:
        return Row(fault, 1, 0, lost, "failed", f"{type(error).__name__}: {error}")
    return Row(fault, 1, 1, lost, ended)


def need_end(pair: Pair, *allowed: list[int]) -> None:
    """Both processes have ended, with codes that are allowed; [0, 0] if left out."""
    codes = pair.wait()
    assert codes in (allowed or ([0, 0],)), f"ended with {codes}: {pair.said()[-3000:]}"


def finish(config: Config, reference: Path, *, before: int | None = None) -> Pair:
    """Give the command again: it goes on where the newest checkpoint is, and ends as `reference`. Computes."""
    before = saved_steps(Path(config.run.out)) if before is None else before
    pair = Pair(config, life=1)
    need_end(pair)
    assert before + pair.steps() == STEPS, f"{pair.steps()} steps after a start from step {before}"
    assert_same_end(pair.out, reference)
    return pair


def _break_loss(kind: str, rank: int) -> None:
    """Let the loss of step AT, of process 1, be one that must not be trained on."""

    def spoil(call: int, loss: Any) -> Any:
        total = loss["loss"]
        if call == AT and rank == 1:
            bad = {"nan-loss": total.detach() * math.nan, "nan-gradient": (total - total).sqrt()}
            total = total * 1e6 if kind == "spike" else total + bad[kind]
        return loss | {"loss": total}

    dit.flow.loss = counted(dit.flow.loss, after=spoil)


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


def bad_steps(reference: Path, folder: Path) -> list[Row]:
    """A NaN loss, a NaN gradient and a spike, each in the same step of process 1: all end as if it were left out."""
    names = {"nan-loss": "NaN loss on one rank", "nan-gradient": "NaN gradient on one rank", "spike": "spike"}
    pairs = {}
    for kind in ("expected", *names):
        config = dataclasses.replace(GENERATOR.config(folder / kind), guard=GuardSpec(spike_window=8))
        pairs[kind] = Pair(config, prepare=_leave_out if kind == "expected" else partial(_break_loss, kind))
        pairs[kind].wait()

    def check(kind: str) -> None:
        need_end(pairs[kind])
        (event,) = (json.loads(line) for line in (folder / kind / "guard.jsonl").read_text().splitlines())
        assert event["step"] == AT and len(set(event["image_ids"])) == BATCH, event
        assert ("is a spike" if kind == "spike" else "is not finite") in event["reason"], event
        assert f"step {AT} left out" in pairs[kind].said()
        lines, before = log(folder / kind), log(reference)
        assert len(lines) == STEPS and lines[: AT - 1] == before[: AT - 1], "the log differs before the fault"
        assert_same_end(folder / kind, folder / "expected")

    ended = "left out by both processes; bit-equal to a run without that step"
    return [judged(fault, "1 batch", ended, partial(check, kind)) for kind, fault in names.items()]


def _damaged(fault: str, words: str, damage: Callable[[Path], None], reference: Path, folder: Path) -> list[Row]:
    """Kill both processes in step AT, damage the share of process 1 in the newest checkpoint, start again."""

    def die(step: int, rank: int, out: Path) -> None:
        if step == AT:
            os.kill(os.getpid(), signal.SIGKILL)

    def check() -> None:
        config = GENERATOR.config(folder / "run", background_saves=False)
        assert -9 in Pair(config, hook=die).wait()
        newest = sorted((folder / "run" / "checkpoints").glob("step-????????"))[-1]
        assert newest.name == f"step-{AT - EVERY:08d}", newest
        damage(sorted(newest.glob("model-*.safetensors"))[1])
        said = finish(config, reference, before=AT - 2 * EVERY).said()
        assert f"{newest} is damaged" in said and words in said, said[-2000:]

    lost = f"{AT - 1 - (AT - 2 * EVERY)} steps: those since the checkpoint before"
    return [judged(fault, lost, "named, and the checkpoint before taken; bit-equal", check)]


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


truncated = partial(_damaged, "checkpoint file truncated", "bytes instead of", _cut_short)
flipped = partial(_damaged, "a bit of a checkpoint flipped", "has changed", flip)


# --- disks
@contextlib.contextmanager
def _small_disk(path: Path) -> Iterator[bool]:
    """A file system of its own, so that it can be filled; whether it could be had."""
    path.mkdir(parents=True)
    mounted = False
    with contextlib.suppress(FileNotFoundError):
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(path)], check=True)


def full_disk(reference: Path, folder: Path) -> list[Row]:
    """In steps 5 to 8 the disk that the run folder lies on is full to the last byte."""
    fault = "disk full during saves"

    def fill(step: int, rank: int, out: Path) -> None:
        filler = out.parent / "filler"
        if rank == 0 and step == 9:
            filler.unlink()
        if rank or step != 5:
            return
        while not (out / "checkpoints" / "step-00000004").exists():  # written in the background
            time.sleep(0.01)
        # Blanks in the last line of the log, so that the next one needs another block of the disk.
        text = (out / "log.jsonl").read_text().removesuffix("\n")
        (out / "log.jsonl").write_text(text + " " * (-(len(text) + 1) % os.sysconf("SC_PAGESIZE")) + "\n")
        for size in (1 << 16, 1):
            with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))

    with _small_disk(folder / "disk") as mounted:
        if not mounted:
            return [Row(fault, 0, 0, "", "not tried: mounting a small disk needs rights that are missing")]

        def check() -> None:
            out = folder / "disk" / "run"
            pair = Pair(GENERATOR.config(out, keep_checkpoints=9), hook=fill, beside=folder / "run")
            need_end(pair)
            assert "could not be written" in pair.said() and "training goes on" in pair.said()
            found = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()]
            assert sorted(found) == [2, 4, 10, 12], f"checkpoints of the steps {sorted(found)}"
            lines = log(out)
            assert any(line.pop("failed_saves", 0) for line in lines), "the log has no failure"
            assert [{**line, "failed_saves": 0} for line in lines] == [{**x, "failed_saves": 0} for x in log(reference)]
            ours, theirs = (publish.newest(path / "checkpoints") for path in (out, reference))
            assert ours is not None and theirs is not None and ours.name == theirs.name
            for path in theirs.glob("*.safetensors"):
                assert path.read_bytes() == (ours / path.name).read_bytes(), path.name

        return [judged(fault, "nothing but those saves", "training went on, loudly; bit-equal", check)]


def sigterm(reference: Path, folder: Path) -> list[Row]:
    """One process is asked to stop in its third step; all agree on the eighth."""

    def ask(step: int, rank: int, out: Path) -> None:
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def check() -> None:
        config = GENERATOR.config(folder / "run")
        pair = Pair(config, hook=ask)
        need_end(pair)
        assert pair.said().count("resume with the same command") == 2, pair.said()[-2000:]
        assert pair.steps() == saved_steps(pair.out) == 8, f"{pair.steps()} steps"
        finish(config, reference)

    return [judged("SIGTERM to one rank", "nothing", "both saved and ended with code 0; bit-equal", check)]


def hang(reference: Path, folder: Path) -> list[Row]:
    """One process sleeps for ever in its step AT."""

    def sleep(step: int, rank: int, out: Path) -> None:
        time.sleep(10_000 if step == AT and rank == 1 else 0)

    def check() -> None:
        config = GENERATOR.config(folder / "run", hang_timeout_s=12.0)
        pair = Pair(config, hook=sleep)
        need_end(pair, [HANG_CODE, HANG_CODE])
        words = f"rank 1 does not get on; the last step it reported is {AT - 1} (training)"
        assert words in pair.said(), pair.said()[-2000:]
        assert saved_steps(pair.out) == AT - EVERY, "the last checkpoint is missing"
        finish(config, reference)

    ended = f"both ended with code {HANG_CODE} and named it and its step; bit-equal"
    return [judged("a rank hangs", "1 step", ended, check)]


# --- data
PER_SHARD = 4


def _make_latents(folder: Path, channels: int, size: int) -> Path:
    """An epoch of latents in twelve shards; the one whose first latent comes last, which is late."""
    folder.mkdir(parents=True)
    ((_, order),) = sample_ids(torch.arange(STEPS * PER_SHARD), STEPS * PER_SHARD, 0)
    shards = [index // PER_SHARD for index in order.tolist()]
    last = max(range(STEPS), key=shards.index)
    assert shards.index(last) >= 4 * BATCH
    for number in range(STEPS):
        latents = torch.randn(PER_SHARD, channels, size, size, generator=torch.Generator().manual_seed(number))
        tensors = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(PER_SHARD)}
        save_file(tensors, folder / f"{number:02d}.safetensors")
    statistics = {"mean": torch.zeros(1, channels, 1, 1), "std": torch.ones(1, channels, 1, 1)}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder / f"{last:02d}.safetensors"


def bad_shard(reference: Path, folder: Path) -> list[Row]:
    """A shard is cut short after the run has begun, before its first latent is read."""

    def check() -> None:
        straight, again = GENERATOR.config(folder / "straight"), GENERATOR.config(folder / "cut")
        data = dataclasses.replace(straight.data, path=str(folder / "data"))  # type: ignore[type-var]
        straight, again = (dataclasses.replace(config, data=data) for config in (straight, again))
        shard = _make_latents(folder / "data", straight.model.in_channels, straight.model.input_size)  # type: ignore[union-attr]

        def cut(rank: int) -> None:
            original = dit.LatentLoader

            def opened(*args: Any, **settings: Any) -> Any:
                distributed.barrier()  # both have opened the data
                if rank == 0:
                    os.truncate(shard, 500)
                distributed.barrier()
                return original(*args, **settings)

            dit.LatentLoader = opened  # type: ignore[assignment,misc]

        need_end(Pair(straight))
        whole = shard.read_bytes()
        pair = Pair(again, prepare=cut)
        need_end(pair, [1, 1], [1, HANG_CODE], [HANG_CODE, 1])
        assert f"error: {shard}" in pair.said(), pair.said()[-2000:]
        saved = saved_steps(pair.out)
        assert 0 < saved < STEPS and pair.steps() - 1 - saved < 2 * EVERY, f"{pair.steps()} begun, {saved} saved"
        shard.write_bytes(whole)
        finish(again, folder / "straight")

    ended = "named, and all ended; with the shard put back bit-equal"
    return [judged("unreadable shard in mid-epoch", f"at most {2 * EVERY - 1} steps", ended, check)]


FAULTS: dict[str, Callable[[Path, Path], list[Row]]] = {
    "bad-steps": bad_steps,
    "truncated": truncated,
    "flipped": flipped,
    "full-disk": full_disk,
    "sigterm": sigterm,
    "hang": hang,
    "bad-shard": bad_shard,
}
"""By name: (the undisturbed run of GENERATOR, a folder of its own) -> lines of the table."""

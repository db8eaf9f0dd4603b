"""Checkpoints that are whole or not there, written while training goes on.

Every process writes its own part into `step-N.partial`, nothing gathered (`shares`), in a thread (`save`); the rename
to `step-N` is the moment the checkpoint exists. Inside: a share per network and process, `state.json`
(position, loader, guard, versions), the run's `config.json`, and `manifest.json` with sizes and hashes. A start takes
the newest checkpoint whose manifest holds, and says which ones do not.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vadit
from vadit.runtime import distributed, rng
from vadit.runtime.console import console
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.train.checkpoint.save import MANIFEST, HostCopies, Saving, TensorFile, advice
from vadit.train.checkpoint.shares import Shares, collect, file_name
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine

FORMAT = 2
"""1 was DeepSpeed's own files beside whole weights."""
PART_TIMEOUT_S = 3600.0
"""How long the main process waits for the others' parts."""


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    step: int = 0
    images_seen: int = 0


class Checkpoints:
    """The checkpoints of a run under `folder` (RUN/checkpoints). Every process makes one, with the same arguments.

    keep: newest checkpoints that stay on disk; keep_every_images: the first checkpoint at or past each multiple stays,
    too, for ever; background: write in a thread while training goes on, out of copies in host memory; seed: of the
    run, for the random states of processes that the checkpoint does not have.
    """

    def __init__(
        self,
        folder: Path,
        *,
        engines: dict[str, Engine],
        ema: ShardedEMA,
        keep: int,
        keep_every_images: int | None = None,
        background: bool = True,
        seed: int = 0,
    ) -> None:
        self.folder, self.engines, self.ema = folder, engines, ema
        self.keep, self.keep_every_images = keep, keep_every_images
        self.background, self.seed = background, seed
        self.failures = 0
        """Saves in a row that have failed."""
        self._copies = HostCopies()
        self._saving: Saving | None = None
        self._token = ""
        self._count = 0
        self._costs: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------ restoring

    def restore(self) -> tuple[Position, dict[str, Any], dict[str, Any]] | None:
        """Load the newest whole checkpoint: position, loader's state, guard's state; None where there is none.

        Collective. Also for a rollback in mid-run: it first waits for a save under way.

        Raises:
            UsageError: the checkpoint is of another config, optimizer or of an earlier vadit.
            RunError: there are checkpoints, and all are damaged.
        """
        self._settle()
        # The main process alone looks, and hashes: hundreds of processes would read everything hundreds of times.
        self._token, name = distributed.from_main(self._choose)
        if name is None:
            return None
        path, values = self.folder / name, {}
        error: Exception | None = None
        try:
            values = json.loads((path / "state.json").read_text())
            self._check(path, values)
            with torch.no_grad():
                for network, engine in self.engines.items():
                    Shares(path, network).load(engine, self._averages(engine))
        except Exception as found:  # whatever it is: the others wait to hear of it
            error = found
        if distributed.any_rank(error is not None, self._device()):
            raise error or RunError(f"another process could not restore {path}; its own message says why")
        for engine in self.engines.values():
            engine.refresh()
        self._restore_random(path, values)
        return Position(values["step"], values["images_seen"]), values["loader"], values["guard"]

    def _choose(self) -> tuple[str, str | None]:
        """On the main process: a token for saves, and the checkpoint to take."""
        _clear_up(self.folder)
        path = newest(self.folder)
        if path is None and (there := _checkpoints(self.folder)):
            raise RunError(
                f"none of the {len(there)} checkpoints in {self.folder} is whole; put a copy of one in its place, "
                "or delete them to start anew"
            )
        return secrets.token_hex(8), None if path is None else path.name

    def _check(self, path: Path, values: dict[str, Any]) -> None:
        kind, choice = values["optimizer"], next(iter(self.engines.values())).optimizer
        if kind != choice.name:
            why = choice.refused or f"optimizer.kind is {choice.name}"
            raise UsageError(
                f"{path} holds the state of optimizer.kind {kind}, which {choice.name} cannot go on from: {why}; "
                f"make {kind} available, or start anew with --run.init-from and another --run.out"
            )

    def _restore_random(self, path: Path, values: dict[str, Any]) -> None:
        main, rank = self._main_network(), distributed.rank()
        if values["world_size"] != distributed.world_size():
            torch.manual_seed(rng.fold(self.seed, "resume", rank, values["step"]))
            if distributed.is_main():
                console.print(
                    f"  [dim]{path.name} is of {values['world_size']} processes, this run has "
                    f"{distributed.world_size()}: random numbers are drawn anew from its step on[/dim]"
                )
            return
        own = Shares(path, main).files[rank]
        torch.set_rng_state(own.tensor("random.cpu").clone())
        if torch.cuda.is_available() and "random.cuda" in own.names:
            torch.cuda.set_rng_state(own.tensor("random.cuda").clone())

    # ------------------------------------------------------------------------------------------ saving

    def save(
        self, position: Position, loader_state: dict[str, Any], guard_state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save; both states are plain JSON values. Collective.

        Returns when the state is copied, or where `wait`, when the checkpoint exists. A failure to write is told
        loudly and raises nothing, but for `wait`: then RunError, on every process.
        """
        start = time.perf_counter()
        self._settle()
        wait_here = wait or not self.background
        files = self._files()
        if not wait_here:
            files = [self._copies.take(file) for file in files]
        self._count += 1
        final = self.folder / f"step-{position.step:08d}"
        self._saving = Saving(
            final,
            files,
            token=f"{self._token}-{self._count}",
            state=self._state(position, loader_state, guard_state) if distributed.is_main() else {},
            published=lambda: prune(self.folder, self.keep, self.keep_every_images, last=final.name),
            needed=self._bytes_of_all(files),
            failed=(lambda error: None) if wait else functools.partial(self._tell, final),
            timeout_s=PART_TIMEOUT_S,
        )
        if wait_here and (fault := self._settle()) is not None and wait:
            raise RunError(
                f"the checkpoint {final} could not be written ({write_fault(fault)}); earlier checkpoints in "
                f"{self.folder} are whole: {advice(fault)} and give the same command again"
            ) from fault
        self._costs["save_stall_ms"] = (time.perf_counter() - start) * 1e3

    def log_values(self) -> dict[str, float]:
        """What saving cost since the last call, for the run log: empty without a save.

        save_stall_ms: how long training stood still; save_write_ms: until the former checkpoint existed;
        failed_saves: in a row.
        """
        values, self._costs = self._costs, {}
        return values | ({"failed_saves": float(self.failures)} if self.failures else {})

    def close(self) -> None:
        """Wait for the writer. Not collective: also for a process that ends with an error."""
        if self._saving is not None:
            self._saving.join()

    def _settle(self) -> Exception | None:
        """Wait for the save under way and agree on whether the checkpoint exists; what went wrong. Collective."""
        saving, self._saving = self._saving, None
        if saving is None:
            return None
        saving.written.wait()
        if distributed.any_rank(saving.fault is not None, self._device()):
            saving.cancelled.set()
        saving.join()
        if saving.fault is not None and distributed.is_main():  # no process writes there any more
            shutil.rmtree(saving.partial, ignore_errors=True)
        self._costs["save_write_ms"] = saving.seconds * 1e3
        if not distributed.any_rank(saving.fault is not None, self._device()):
            self.failures = 0
            return None
        self.failures += 1
        return saving.fault or RuntimeError("another process could not write its part")

    def _tell(self, final: Path, error: Exception) -> None:
        """Be loud about a save that failed."""
        who = f"process {distributed.rank()}: " if distributed.world_size() > 1 else ""
        console.print(
            f"{who}the checkpoint {final} could not be written ({write_fault(error)}); training goes on, and earlier "
            f"checkpoints in {self.folder} are whole: {advice(error)} before the next save",
            style="bold red",
            markup=False,
        )

    def _files(self) -> list[TensorFile]:
        """What this process writes, over the live tensors."""
        files = []
        for network, engine in self.engines.items():
            tensors, header = collect(engine, self._averages(engine))
            if network == self._main_network():
                tensors["random.cpu"] = torch.get_rng_state()
                if torch.cuda.is_available():
                    tensors["random.cuda"] = torch.cuda.get_rng_state()
            name = file_name(network, distributed.rank(), distributed.world_size())
            files.append(TensorFile(name, tensors, {"vadit": header.to_json()}))
        return files

    def _bytes_of_all(self, files: list[TensorFile]) -> int:
        """What the parts of all processes take on disk. Collective."""
        own = torch.tensor(float(sum(file.num_bytes() for file in files)), dtype=torch.float64, device=self._device())
        return round(distributed.all_mean(own).item() * distributed.world_size())

    def _state(self, position: Position, loader_state: dict[str, Any], guard_state: dict[str, Any]) -> dict[str, str]:
        """The text files, which the main process writes."""
        engine = self.engines[self._main_network()]
        values = {
            "format": FORMAT,
            **dataclasses.asdict(position),
            "world_size": distributed.world_size(),
            "zero_stage": engine.spec.zero_stage,
            "precision": engine.spec.precision,
            "optimizer": engine.optimizer.name,
            "networks": list(self.engines),
            "loader": loader_state,
            "guard": guard_state,
            "versions": {"vadit": vadit.__version__, "torch": torch.__version__}
            | {name: importlib.metadata.version(name) for name in ("deepspeed", "safetensors")},
        }
        texts = {"state.json": json.dumps(values, indent=2)}
        config = self.folder.parent / "config.json"
        return texts | ({"config.json": config.read_text()} if config.is_file() else {})

    def _averages(self, engine: Engine) -> dict[float, list[torch.Tensor]]:
        return self.ema.shards if engine is self.ema.engine else {}

    def _main_network(self) -> str:
        return next(iter(self.engines))

    def _device(self) -> torch.device:
        return self.engines[self._main_network()].device


# ---------------------------------------------------------------------------------------------- the folder


def newest(folder: Path, *, hashes: bool = True) -> Path | None:
    """The newest whole checkpoint under `folder`, or None; damaged ones are named on the way.

    Without `hashes` the sizes of the files are enough, and nothing is told: for a first look at a folder.

    Raises UsageError for a checkpoint of an earlier vadit.
    """
    for path in _checkpoints(folder):
        fault = _fault(path, hashes=hashes)
        if fault is None:
            return path
        if hashes and distributed.is_main():
            console.print(f"[yellow]checkpoint {path} is damaged ({fault}); taking the one before it[/yellow]")
    return None


def prune(folder: Path, keep: int, keep_every_images: int | None = None, *, last: str | None = None) -> None:
    """Delete all checkpoints but the newest `keep` and the first at or past each multiple of `keep_every_images`.

    Called after a new one exists, `last`: those of later steps were damaged, or the run would not be here again, and
    take nobody's place. What cannot be deleted is told, and stays.
    """
    paths = [path for path in _checkpoints(folder) if last is None or path.name <= last]
    kept = set(paths[: max(keep, 1)])
    if keep_every_images:
        first: dict[int, Path] = {}
        for path in paths:  # newest first, so that the oldest remains; the first of each stretch is never deleted
            if (images := _images_seen(path)) is not None:
                first[images // keep_every_images] = path
        kept |= {path for stretch, path in first.items() if stretch > 0}
    for path in paths:
        if path in kept:
            continue
        doomed = path.with_name(path.name + ".old.partial")  # one that is half deleted must not look damaged
        try:
            os.replace(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            console.print(f"[yellow]the old checkpoint {path} could not be deleted ({write_fault(error)})[/yellow]")


def _images_seen(path: Path) -> int | None:
    try:
        return int(json.loads((path / "state.json").read_text())["images_seen"])
    except (OSError, ValueError, KeyError):
        return None


def _clear_up(folder: Path) -> None:
    """Remove what interrupted saves have left; put back a checkpoint that was about to be replaced."""
    for path in folder.glob("step-*.partial"):
        before = folder / path.name.removesuffix(".replaced.partial")
        if path.name.endswith(".replaced.partial") and not before.exists():
            os.replace(path, before)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".partial"), reverse=True)


def _fault(path: Path, *, hashes: bool) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((path / MANIFEST).read_text())
        manifest = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damage can leave JSON of another shape
        return f"no readable {MANIFEST}"
    try:
        for name, (size, _) in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
        if hashes:
            with ThreadPoolExecutor(8) as pool:  # hashing leaves Python to the others
                digests = pool.map(lambda name: _digest(path / name), manifest)
                for (name, (_, expected)), digest in zip(manifest.items(), digests, strict=True):
                    if digest != expected:
                        return f"{name} has changed"
    except OSError as error:
        return f"{error.filename or path} cannot be read: {error.strerror or error}"
    try:
        written_as = json.loads((path / "state.json").read_text()).get("format")
    except (OSError, ValueError):
        return "no readable state.json"
    if written_as != FORMAT:
        raise UsageError(
            f"{path} was written by an earlier vadit, in DeepSpeed's layout, which is not read any more; finish the "
            "run with that version, or export it there and start anew with --run.init-from and another --run.out"
        )
    return None


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: Path, *_state: int) -> str:
    """Once per state of the file: a start asks for the newest whole checkpoint several times, of many gigabytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

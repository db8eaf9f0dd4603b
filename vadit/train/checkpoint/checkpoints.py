"""Checkpoints that are whole or not there, written while training goes on.

Every process writes its own part into `step-N.partial`, nothing gathered (`shares`), in a thread (`save`); the rename
to `step-N` is the moment the checkpoint exists (`publish`). Inside: a share per network and process, `state.json`
(position, loader, guard, versions), the run's `config.json`, and `manifest.json` with sizes and hashes. A start takes
the newest checkpoint whose manifest holds, and says which ones do not.
"""

import dataclasses
import functools
import importlib.metadata
import json
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import vadit
from vadit.config import RunSpec
from vadit.runtime import distributed, rng
from vadit.runtime.console import note, note_once
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.train.checkpoint import publish
from vadit.train.checkpoint.publish import TensorFile
from vadit.train.checkpoint.save import Saving, advice, host_copy
from vadit.train.checkpoint.shares import Shares, collect, file_name
from vadit.train.ema import ShardedEMA
from vadit.train.engine import Engine

PART_TIMEOUT_S = 3600.0  # how long the main process waits for the others' parts


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    step: int = 0
    images_seen: int = 0


class Checkpoints:
    """The checkpoints of a run under `folder` (RUN/checkpoints). Every process makes one, with the same arguments.

    `spec` says which stay on disk, whether they are written while training goes on, and the run's seed.
    """

    def __init__(
        self, folder: Path, *, engines: dict[str, Engine], ema: ShardedEMA, spec: RunSpec | None = None
    ) -> None:
        self.folder, self.engines, self.ema, self.spec = folder, engines, ema, spec or RunSpec()
        self.failures = 0  # saves in a row that have failed
        self._main, engine = next(iter(engines.items()))
        self._device = engine.device
        self._config: dict[str, str] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._saving: Saving | None = None
        self._token = ""
        self._count = 0
        self._costs: dict[str, float] = {}

    def read_config(self) -> None:
        """Take the run's config as it is now: its own file may be damaged while it runs, its copies must not be."""
        if distributed.is_main():
            self._config = {"config.json": (self.folder.parent / "config.json").read_text()}

    def restore(self) -> tuple[Position, dict[str, Any], dict[str, Any]] | None:
        """Load the newest whole checkpoint: position, loader's state, guard's state; None where there is none.

        Collective. Also for a rollback in mid-run: it first waits for a save under way. UsageError: the checkpoint is
        of another config or optimizer. RunError: there are checkpoints, and all are damaged.
        """
        self._settle()
        # The main process alone looks, and hashes: hundreds of processes would read everything hundreds of times.
        self._token, name = distributed.from_main(self._choose)
        if name is None:
            return None
        path, state = self.folder / name, None
        error: Exception | None = None
        try:
            state = publish.read_state(path)
            self._check_optimizer(path, state.optimizer)
            with torch.no_grad():
                for network, engine in self.engines.items():
                    Shares(path, network).load(engine, self._averages(engine))
        except Exception as found:  # whatever it is: the others wait to hear of it
            error = found
        if distributed.any_rank(error is not None, self._device) or state is None:
            raise error or RunError(f"another process could not restore {path}; its own message says why")
        for engine in self.engines.values():
            engine.refresh()
        self._restore_random(path, state)
        return Position(state.step, state.images_seen), state.loader, state.guard

    def _choose(self) -> tuple[str, str | None]:
        """On the main process: a token for saves, and the checkpoint to take."""
        publish.clear_up(self.folder)
        path = publish.newest(self.folder)
        if path is None and (there := publish.present(self.folder)):
            raise RunError(
                f"none of the {len(there)} checkpoints in {self.folder} is whole; put a copy of one in its place, "
                "or delete them to start anew"
            )
        return secrets.token_hex(8), None if path is None else path.name

    def _check_optimizer(self, path: Path, kind: str) -> None:
        choice = self.engines[self._main].optimizer
        if kind != choice.name:
            why = choice.refused or f"optimizer.kind is {choice.name}"
            raise UsageError(
                f"{path} holds the state of optimizer.kind {kind}, which {choice.name} cannot go on from: {why}; "
                f"make {kind} available, or start anew with --run.init-from and another --run.out"
            )

    def _restore_random(self, path: Path, saved: publish.State) -> None:
        rank = distributed.rank()
        if saved.world_size != distributed.world_size():
            torch.manual_seed(rng.fold(self.spec.seed, "resume", rank, saved.step))
            note_once(
                f"  {path.name} is of {saved.world_size} processes, this run has {distributed.world_size()}: random "
                "numbers are drawn anew from its step on",
                "dim",
            )
            return
        own = Shares(path, self._main).files[rank]
        torch.set_rng_state(own.tensor("random.cpu").clone())
        if torch.cuda.is_available() and "random.cuda" in own.names:
            torch.cuda.set_rng_state(own.tensor("random.cuda").clone())

    def save(
        self, position: Position, loader_state: dict[str, Any], guard_state: dict[str, Any], *, wait: bool = False
    ) -> None:
        """Save; both states are plain JSON values. Collective.

        Returns when the state is copied, or where `wait`, when the checkpoint exists. A failure to write is reported
        loudly and raises nothing, but for `wait`: then RunError, on every process.
        """
        start = time.perf_counter()
        self._settle()
        wait_here = wait or not self.spec.background_saves
        files = self._files()
        if not wait_here:
            files = [host_copy(file, self._buffers) for file in files]
        self._count += 1
        final = self.folder / f"step-{position.step:08d}"
        self._saving = Saving(
            final,
            files,
            token=f"{self._token}-{self._count}",
            state=self._state(position, loader_state, guard_state) if distributed.is_main() else {},
            published=lambda: publish.prune(self.folder, self.spec, last=final.name),
            needed=self._bytes_of_all(files),
            failed=(lambda error: None) if wait else functools.partial(self._report, final),
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
        if distributed.any_rank(saving.fault is not None, self._device):
            saving.cancelled.set()
        saving.join()
        if saving.fault is not None and distributed.is_main():  # no process writes there any more
            shutil.rmtree(saving.partial, ignore_errors=True)
        self._costs["save_write_ms"] = saving.seconds * 1e3
        if not distributed.any_rank(saving.fault is not None, self._device):
            self.failures = 0
            return None
        self.failures += 1
        return saving.fault or RuntimeError("another process could not write its part")

    def _report(self, final: Path, error: Exception) -> None:
        """Be loud about a save that failed."""
        who = f"process {distributed.rank()}: " if distributed.world_size() > 1 else ""
        note(
            f"{who}the checkpoint {final} could not be written ({write_fault(error)}); training goes on, and earlier "
            f"checkpoints in {self.folder} are whole: {advice(error)} before the next save",
            "bold red",
        )

    def _files(self) -> list[TensorFile]:
        """What this process writes, over the live tensors."""
        files = []
        for network, engine in self.engines.items():
            tensors, header = collect(engine, self._averages(engine))
            if network == self._main:
                tensors["random.cpu"] = torch.get_rng_state()
                if torch.cuda.is_available():
                    tensors["random.cuda"] = torch.cuda.get_rng_state()
            name = file_name(network, distributed.rank(), distributed.world_size())
            files.append(TensorFile(name, tensors, {"vadit": json.dumps(dataclasses.asdict(header))}))
        return files

    def _bytes_of_all(self, files: list[TensorFile]) -> int:
        """What the parts of all processes take on disk. Collective."""
        own = sum(tensor.nbytes for file in files for tensor in file.tensors.values())
        mean = distributed.all_mean(torch.tensor(own, dtype=torch.float64, device=self._device))
        return round(mean.item() * distributed.world_size())

    def _state(self, position: Position, loader_state: dict[str, Any], guard_state: dict[str, Any]) -> dict[str, str]:
        """The text files, which the main process writes."""
        engine = self.engines[self._main]
        values = {
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
        return {publish.STATE: json.dumps(values, indent=2), **self._config}

    def _averages(self, engine: Engine) -> dict[float, list[torch.Tensor]]:
        return self.ema.shards if engine is self.ema.engine else {}

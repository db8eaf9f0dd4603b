"""Latents for the generator: the data set over its shards, and the loader.

Which of plain and mirrored latent is taken and the posterior's noise are functions of (seed, image id, epoch) alone,
where the image id is the latent's index in the folder.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vadit.config import DiTSpec, LatentDataSpec, RepaSpec
from vadit.latents import rows as latent_rows
from vadit.latents.companions import Companion, open_companion, open_debug_companion
from vadit.latents.debug import DebugLatents
from vadit.latents.folder import open_checked
from vadit.latents.noise import row_keys
from vadit.latents.rows import Buffers, RowReader, Scratch
from vadit.latents.shards import REMEDY
from vadit.latents.statistics import ChannelStatistics, compute_statistics, load_statistics
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.runtime.order import Order, OrderPart
from vadit.runtime.stream import PositionedLoader, debug_count

__all__ = [
    "BadLatents",
    "ChannelStatistics",
    "DebugLatents",
    "LatentDataset",
    "LatentLoader",
    "LatentSource",
    "compute_statistics",
    "load_statistics",
    "open_latents",
]

logger = logging.getLogger(__name__)

LOADER_THREADS = 2
"""Batches made at the same time; the work is copies and arithmetic outside the interpreter's lock."""


class BadLatents(RunError):
    """Some rows of a batch are damaged; `places` tells which, and why."""

    def __init__(self, places: dict[int, RunError]) -> None:
        super().__init__(str(next(iter(places.values()))))
        self.places = places


class LatentSource(Protocol):
    """What trainers and LatentLoader need of a set of latents."""

    channels: int
    size: int
    num_classes: int
    mean: Tensor
    std: Tensor
    num_left_out: int
    companion: Companion | None

    def __len__(self) -> int: ...

    def batch(self, ids: Tensor, epoch: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, ...]: ...

    def note_bad(self, bad: dict[int, RunError]) -> None: ...

    def warn_of_bad(self) -> None: ...


class LatentDataset:
    """A folder of latents, from `vadit encode` or in the authors' layout (`latents`, `latents_flip`, `labels`).

    `mean` and `std`, (1, d, 1, 1), are what normalisation uses: 0 and 1 where `normalize` is off. A normalised latent
    is (z - mean) / std * multiplier, and `denormalize` is its inverse. In memory are the labels and the shards'
    headers: 8 bytes per latent, whatever its size.

    on_error="skip": a shard that does not open is left out, and with it all its latents, so `len` is smaller; a latent
    that cannot be read or is not finite is left out by LatentLoader (`bad` names those met so far), while `batch`
    raises. RunError above `max_bad_share` of the latents.
    """

    def __init__(
        self,
        folder: str | Path,
        normalize: bool = LatentDataSpec.normalize,
        flip: bool = LatentDataSpec.flip,
        multiplier: float = LatentDataSpec.multiplier,
        on_error: Literal["raise", "skip"] = LatentDataSpec.on_error,
        max_bad_share: float = LatentDataSpec.max_bad_share,
    ) -> None:
        if not str(folder):
            raise UsageError("data.path is empty; set --data.path to a folder that `vadit encode` wrote")
        self.folder = Path(folder)
        self.flip = flip
        self.multiplier = multiplier
        self.on_error = on_error
        self.max_bad_share = max_bad_share
        self.bad: dict[int, RunError] = {}
        """Latents that were found damaged so far, and why (on_error="skip")."""
        self.companion: Companion | None = None
        """Third part of each batch, for REPA (`open_latents`)."""
        found = open_checked(self.folder, on_error)
        self.shards, self.num_classes = found.shards, found.num_classes
        self.num_left_out = found.num_left_out
        self.channels, self.size, width = self.shards[0].shape
        if self.size != width:
            raise UsageError(f"data.path {folder} holds latents of {self.size} x {width}; the generator needs squares")
        if flip and any(shard.flipped is None for shard in self.shards):
            raise UsageError(
                f"data.path {folder} holds no mirrored latents; set --data.no-flip, or encode anew with --flip"
            )
        self.labels = torch.cat([shard.labels for shard in self.shards])
        if found.faults:
            names = "; ".join(list(found.faults.values())[:10])
            logger.warning(
                "%d shards (%d latents) of %s are left out: %s", len(found.faults), self.num_left_out, folder, names
            )
            self._check_share(self.num_left_out, names)
        self._normalize = normalize
        if normalize:
            statistics = load_statistics(self.folder, self.channels)
        else:
            statistics = ChannelStatistics(torch.zeros(1, self.channels, 1, 1), torch.ones(1, self.channels, 1, 1))
        self.mean, self.std = statistics.mean, statistics.std
        self._prepare()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, ids: Tensor, epoch: int, seed: int, device: str | torch.device = "cpu") -> tuple[Tensor, ...]:
        """Latents (B, d, h, w) float32, normalised, and labels (B,) int64 of the samples `ids` in this epoch.

        With a companion, that of each latent, too: features (B, D, h, w) bfloat16 or images (B, 3, H, W) uint8.
        BadLatents (a RunError) names the shard and the latent that is damaged. On a CUDA device rows go there as they
        are stored, through pinned memory and without a wait, and are normalised there; the noise is the CPU's.
        """
        numbers, offsets, flips = self._places(ids, epoch, seed)
        keys = row_keys(rng.fold(seed, "posterior", epoch), ids) if self.shards[0].has_moments else None
        self._reader.expect(numbers, offsets)
        started = time.perf_counter()
        make = self._batch_on_cpu if torch.device(device).type == "cpu" else self._batch_on_device
        latents, faults = make(numbers, offsets, keys, device)
        self._reader.note_time(len(ids), started)
        parts: tuple[Tensor, ...] = (latents, _send(self.labels[ids], device))
        if self.companion is not None:
            companions, more = self.companion.batch(ids, flips, device)
            parts, faults = (*parts, companions), more | faults
        if faults:
            raise BadLatents({place: self._name(int(ids[place]), flips[place], why) for place, why in faults.items()})
        return parts

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, d, h, w) as the autoencoder's decoder takes them."""
        mean, std = self.mean.to(latents), self.std.to(latents)
        return latents / self.multiplier * std + mean

    def note_bad(self, bad: dict[int, RunError]) -> None:
        """Count damaged latents (id -> why); raises where that is not wanted, or where there are too many."""
        if self.on_error == "raise":
            raise next(iter(bad.values()))
        self.bad.update(bad)
        self._check_share(self.num_left_out + len(self.bad), "; ".join(map(str, list(self.bad.values())[:10])))

    def warn_of_bad(self) -> None:
        """Log how many latents were found damaged, with the first ten."""
        if self.bad:
            names = "; ".join(str(error) for _, error in sorted(self.bad.items())[:10])
            logger.warning("%d latents are damaged and were skipped: %s", len(self.bad), names)

    def _check_share(self, num_bad: int, names: str) -> None:
        total = len(self) + self.num_left_out
        if num_bad > self.max_bad_share * total:
            raise RunError(
                f"{num_bad} of {total} latents of {self.folder} are damaged, more than data.max_bad_share "
                f"{self.max_bad_share:g} allows: {names}; or set --data.max-bad-share"
            )

    def _prepare(self) -> None:
        """What every batch needs."""
        first = self.shards[0]
        counts = [shard.count for shard in self.shards]
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._reader = RowReader(
            [shard.path for shard in self.shards], [shard.num_bytes for shard in self.shards], first.plain.row_bytes
        )
        places = [(shard.plain, shard.flipped or shard.plain) for shard in self.shards]
        self._bases = np.array([[rows.start for rows in pair] for pair in places], np.int64)
        self._buffers = Buffers()
        self._scratches: list[Scratch] = []
        self._on_device: dict[str, tuple[Tensor, Tensor]] = {}
        """Mean and deviation on each device that was asked for: sending them anew would wait for the device."""
        pixels = (1, self.channels, self.size * self.size)
        # in full size: numpy is slower where it has to repeat a channel's value
        self._flat_mean, self._flat_std = (
            np.ascontiguousarray(np.broadcast_to(value.numpy().reshape(1, -1, 1), pixels))
            for value in (self.mean, self.std)
        )

    def _places(self, ids: Tensor, epoch: int, seed: int) -> tuple[list[int], list[int], list[bool]]:
        """Of each sample: the number of its shard, the first byte of its row, and whether it is the mirrored one."""
        flips = np.zeros(len(ids), bool)
        if self.flip:
            flips = (rng.uniform(rng.fold(seed, "flip", epoch), ids) < 0.5).numpy()
        indices = ids.numpy()
        which = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._starts[which]
        offsets = self._bases[which, flips.astype(np.intp)] + rows * self.shards[0].plain.row_bytes
        return which.tolist(), offsets.tolist(), flips.tolist()

    def _batch_on_cpu(
        self, numbers: list[int], offsets: list[int], keys: np.ndarray | None, device: str | torch.device
    ) -> tuple[Tensor, dict[int, str]]:
        """Latents (B, d, h, w) block by block, each read, widened, checked and normalised while the cache holds it."""
        out = self._buffers.take((len(numbers), self.channels, self.size, self.size))
        flat = out.reshape(len(numbers), self.channels, self.size * self.size)
        faults: dict[int, str] = {}
        with self._scratch() as scratch:
            for start in range(0, len(numbers), scratch.rows):
                stop = min(start + scratch.rows, len(numbers))
                target = flat[start:stop]
                direct = keys is None and scratch.stored.dtype == target.dtype  # float32: nothing to widen
                stored = target if direct else scratch.stored[: stop - start]
                unread = self._reader.read(numbers[start:stop], offsets[start:stop], latent_rows.bytes_of(stored))
                faults |= _faults_of_block(start, stored, unread)
                try:
                    with np.errstate(over="raise", invalid="ignore"):
                        self._finish(scratch, stored, target, None if keys is None else keys[start:stop])
                except FloatingPointError:  # numpy looks after each operation, at no cost
                    wrong = [place for place, row in enumerate(target) if not latent_rows.is_finite(row)]
                    faults = {start + place: "it is too large for float32 once normalised" for place in wrong} | faults
        return torch.from_numpy(out), faults

    def _finish(self, scratch: Scratch, stored: np.ndarray, target: np.ndarray, keys: np.ndarray | None) -> None:
        """Stored rows to normalised ones in `target`, float32 (B, d, h w); FloatingPointError where they overflow."""
        if keys is not None and scratch.noise is not None:
            part = scratch.values[: len(target), : self.channels]
            scratch.noise.fill(keys, target.reshape(len(target), -1))
            latent_rows.widen(stored[:, self.channels :], part)
            np.multiply(target, part, out=target)
            latent_rows.widen(stored[:, : self.channels], part)
            np.add(target, part, out=target)
        elif stored.dtype != target.dtype:
            latent_rows.widen(stored, target)
        if self._normalize:
            np.subtract(target, self._flat_mean, out=target)
            np.divide(target, self._flat_std, out=target)
        if self.multiplier != 1:
            np.multiply(target, np.float32(self.multiplier), out=target)

    def _batch_on_device(
        self, numbers: list[int], offsets: list[int], keys: np.ndarray | None, device: str | torch.device
    ) -> tuple[Tensor, dict[int, str]]:
        """The same on a GPU: stored rows and noise go through pinned memory. Each operation is rounded as on the CPU;
        tests compare the two ways there, with a CPU in the place of the GPU.
        """
        first = self.shards[0]
        pin = torch.device(device).type == "cuda"
        stored = torch.empty((len(numbers), *first.stored_shape), dtype=first.dtype, pin_memory=pin)
        noise = torch.empty((len(numbers), *first.shape), pin_memory=pin) if keys is not None else None
        bits = stored.view(torch.uint8).numpy().reshape(len(numbers), -1)
        faults: dict[int, str] = {}
        with self._scratch() as scratch:
            for start in range(0, len(numbers), scratch.rows):
                stop = min(start + scratch.rows, len(numbers))
                unread = self._reader.read(numbers[start:stop], offsets[start:stop], bits[start:stop])
                rows = bits[start:stop].view(scratch.stored.dtype)
                faults |= _faults_of_block(start, rows, unread)
                if noise is not None and keys is not None and scratch.noise is not None:
                    scratch.noise.fill(keys[start:stop], noise[start:stop].numpy().reshape(stop - start, -1))
        latents = _send(stored, device).float()
        if noise is not None:
            mean, std = latents.chunk(2, dim=1)
            latents = _send(noise, device).mul_(std).add_(mean)
        if self._normalize:
            if str(device) not in self._on_device:
                self._on_device[str(device)] = (self.mean.to(device), self.std.to(device))
            mean, std = self._on_device[str(device)]
            latents = latents.sub_(mean).div_(std)
        return latents.mul_(self.multiplier) if self.multiplier != 1 else latents, faults

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Scratch]:
        """Working memory for one thread, kept for the next batch."""
        first = self.shards[0]
        try:
            scratch = self._scratches.pop()
        except IndexError:
            scratch = Scratch(first.stored_shape, first.dtype, first.has_moments)
        try:
            yield scratch
        finally:
            self._scratches.append(scratch)

    def _name(self, index: int, flipped: bool, why: str) -> RunError:
        number = int(np.searchsorted(self._ends, index, side="right"))
        kind = "the mirrored latent" if flipped else "latent"
        return RunError(
            f"{self.shards[number].path}: {kind} {index} (row {index - self._starts[number]}) cannot be used ({why}); "
            f"{REMEDY}, or leave it out with --data.on-error skip"
        )


def _send(tensor: Tensor, device: str | torch.device) -> Tensor:
    """To the device; to a GPU out of pinned memory, without waiting for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _faults_of_block(start: int, stored: np.ndarray, unread: dict[int, str]) -> dict[int, str]:
    """What is wrong with rows start, start + 1, ... of a batch: place in the batch -> why."""
    faults = {start + place: why for place, why in unread.items()}
    if not latent_rows.is_finite(stored):
        for place, row in enumerate(stored):
            if place not in unread and not latent_rows.is_finite(row):
                faults[start + place] = "it holds values that are not finite"
    return faults


def open_latents(spec: LatentDataSpec, model: DiTSpec, repa: RepaSpec | None = None) -> LatentDataset | DebugLatents:
    """The latents that the settings name, checked to fit the model; with companions where `repa` has a weight."""
    aligned = repa if repa is not None and repa.weight > 0 else None
    grid = model.input_size // model.patch_size
    if spec.path.startswith("debug:"):
        made_up = DebugLatents(debug_count(spec.path), model)
        if aligned is not None:
            made_up.companion = open_debug_companion(spec, aligned, len(made_up), grid)
        return made_up
    dataset = LatentDataset(spec.path, spec.normalize, spec.flip, spec.multiplier, spec.on_error, spec.max_bad_share)
    for found, needed, setting in (
        (dataset.channels, model.in_channels, "in_channels"),
        (dataset.size, model.input_size, "input_size"),
    ):
        if found != needed:
            raise UsageError(
                f"data.path {spec.path} holds latents of {dataset.channels} channels and side {dataset.size} but "
                f"model.{setting} is {needed}; set --model.{setting.replace('_', '-')} {found} or another data.path"
            )
    if dataset.num_classes > model.num_classes:
        raise UsageError(
            f"data.path {spec.path} has {dataset.num_classes} classes but model.num_classes is {model.num_classes}; "
            f"set --model.num-classes {dataset.num_classes}"
        )
    if aligned is not None:
        dataset.companion = open_companion(spec, aligned, dataset.shards, grid)
    return dataset


class LatentLoader(PositionedLoader[tuple[Tensor, ...]]):
    """Shuffled (latents (B, d, h, w) float32 normalised, labels (B,) int64); see PositionedLoader for the order.

    With a companion, batches have a third part: features (B, D, h, w) bfloat16 or images (B, 3, H, W) uint8.

    Where the data set skips damaged latents, one gives its place to the next of the epoch's order that is sound: a
    function of the position alone. `device`: where batches are wanted; a GPU normalises them itself.
    """

    def __init__(
        self,
        dataset: LatentSource,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(len(dataset), batch_size, seed, rank, world_size)
        self.dataset = dataset
        self.device = device

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See PositionedLoader; a data set from which shards are left out has another size, and is refused."""
        try:
            super().load_state_dict(state)
        except UsageError as error:
            if not self.dataset.num_left_out:
                raise
            raise UsageError(f"{error} ({self.dataset.num_left_out} latents lie in shards that are left out)") from None

    @contextlib.contextmanager
    def _session(self) -> Iterator[Callable[[Tensor], Callable[[], tuple[Tensor, ...]]]]:
        companion = self.dataset.companion
        with contextlib.nullcontext() if companion is None else companion.session(self.device):
            with self._threads() as start:
                yield start

    @contextlib.contextmanager
    def _threads(self) -> Iterator[Callable[[Tensor], Callable[[], tuple[Tensor, ...]]]]:
        pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="vadit-data")
        order = Order(self.num_samples)
        try:
            yield lambda positions: pool.submit(self._load, order.parts(positions, self.seed)).result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self.dataset.warn_of_bad()

    def _load(self, parts: list[OrderPart]) -> tuple[Tensor, ...]:
        loaded = [self._load_part(part) for part in parts]
        if len(loaded) == 1:
            return loaded[0]
        return tuple(torch.cat(pieces) for pieces in zip(*loaded, strict=True))

    def _load_part(self, part: OrderPart) -> tuple[Tensor, ...]:
        ids = part.ids
        steps = torch.zeros_like(ids)
        while True:
            try:
                return self.dataset.batch(ids, part.epoch, part.seed, self.device)
            except BadLatents as error:
                self.dataset.note_bad({int(ids[place]): fault for place, fault in error.places.items()})
                bad = torch.tensor(list(error.places))
            # Asked anew each time, not from the memory of what was bad: a resumed run has no such memory.
            steps[bad] += 1
            if int(steps.max()) >= self.num_samples:
                raise RunError("all latents of the data set are damaged; set data.path anew")
            ids = ids.clone()
            next_places = (part.places[bad] + steps[bad]) % self.num_samples
            ids[bad] = rng.permute(next_places, self.num_samples, rng.fold(part.seed, "order", part.epoch))

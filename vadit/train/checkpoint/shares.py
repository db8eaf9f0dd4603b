"""What one process's share of a network looks like on disk, and how shares become others.

A file NETWORK-RANK-of-COUNT.safetensors holds the flat tensors of one process as they are: `master.I` (fp32 weights),
`state.I.NAME` (the optimizer's), `ema-DECAY.I`, `frozen.NAME`, `buffer.NAME`. Its metadata say, under `vadit`, which
elements of which weight lie where in tensors I: the pieces. So nothing is gathered to save; any run, and an export,
picks the pieces that it needs out of all files. One with as many processes and the same sharding finds them all in its
own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vadit.runtime import distributed
from vadit.runtime.errors import RunError, UsageError, write_fault
from vadit.runtime.json_files import Count, parse_json
from vadit.runtime.reading import openable, patiently
from vadit.train.engine import Engine, Piece

CHUNK = 1 << 24  # elements that are read in one go
REMEDY = "delete this checkpoint's folder, and the same command goes on from the one before it"


# A quantity is one number per trained weight; it is called by the name of its flat tensors, their index left open.
WEIGHTS = "master.{}"


def average(decay: float) -> str:
    """The average of the weights with a decay."""
    return f"ema-{decay!r}.{{}}"


def state(name: str) -> str:
    """What the optimizer keeps under this name."""
    return f"state.{{}}.{name}"


STEP = "step"  # the optimizer's state that is one number for a flat tensor; all others have one per weight


@dataclass
class Header:
    """What a file says of itself."""

    shapes: dict[str, tuple[Count, ...]]  # of all parameters, whole
    groups: list[list[Piece]]  # the pieces in every `master.I`, and so in its averages and moments
    states: list[list[str]]  # names of the optimizer's states of every `master.I`
    steps: list[Any]  # step counts that the optimizer keeps by parameter group
    averages: list[float]  # decays of the averages
    frozen: dict[str, Piece]  # the piece in every `frozen.NAME`


def file_name(network: str, rank: int, count: int) -> str:
    """Name of one process's share of a network."""
    return f"{network}-{rank:05d}-of-{count:05d}.safetensors"


def collect(engine: Engine, averages: dict[float, list[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], Header]:
    """This process's share, uncopied, and its header. At ZeRO 0 the main process has the weights, others buffers."""
    header = Header(engine.shapes(), [], [], engine.optimizer_steps(), list(averages), {})
    tensors: dict[str, torch.Tensor] = {}
    if distributed.is_main() or engine.spec.stage > 0:
        header.groups = engine.layout()
        for index, (master, states) in enumerate(zip(engine.masters(), engine.optimizer_states(), strict=True)):
            tensors[WEIGHTS.format(index)] = master.reshape(-1)
            header.states.append(list(states))
            for name, value in states.items():
                assert name == STEP or value.shape == master.shape, f"{name} of an optimizer is cut by no rule"
                tensors[state(name).format(index)] = value if name == STEP else value.reshape(-1)
        for decay, shards in averages.items():
            tensors |= {average(decay).format(index): shard.reshape(-1) for index, shard in enumerate(shards)}
    for piece, value in engine.frozen():
        if piece.length and (distributed.is_main() or piece.length < math.prod(header.shapes[piece.name])):
            header.frozen[piece.name] = piece
            tensors[f"frozen.{piece.name}"] = value
    tensors |= {f"buffer.{name}": buffer for name, buffer in engine.buffers().items()}
    return tensors, header


def _open(path: Path) -> Any:
    with openable(path) as name:
        return safe_open(name, "pt")


class _File:
    """One process's share on disk; tensors are mapped, and only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = patiently(lambda: _open(path), path)
            self.header = parse_json(self._handle.metadata()["vadit"], Header, str(path), remedy=REMEDY)
            self.names = set(self._handle.keys())
            shapes = {name: self._handle.get_slice(name).get_shape() for name in self.names}
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, RunError):
                raise
            fault = write_fault(error)
            raise RunError(f"{path} cannot be read as a part of a checkpoint ({fault}); {REMEDY}") from error
        header = self.header
        self.places = [_Place(self, index, piece) for index, group in enumerate(header.groups) for piece in group]
        self.places += [_Place(self, None, Piece(name, *rest)) for name, (_, *rest) in header.frozen.items()]
        # what the header claims decides how much memory is taken
        for place in self.places:
            if place.piece.offset + place.piece.length > math.prod(shapes.get(place.key(WEIGHTS), (0,))):
                raise RunError(f"{path} holds less of {place.piece.name} than it says; {REMEDY}")
        if len(header.states) != len(header.groups):
            raise RunError(f"{path} has {len(header.groups)} groups and the states of {len(header.states)}; {REMEDY}")

    def tensor(self, name: str, shape: Sequence[int] | None = None) -> torch.Tensor:
        """A tensor, which has to have this shape; without one, its own."""
        value: torch.Tensor | None = self._handle.get_tensor(name) if name in self.names else None
        if value is None or (shape is not None and value.shape != tuple(shape)):
            raise RunError(f"{self.path} has no tensor {name} of shape {shape}; {REMEDY}")
        return value

    def copy(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat `target` from element `start` of a tensor on, a chunk at a time."""
        source = self._handle.get_slice(name)
        if len(source.get_shape()) != 1:
            source = self.tensor(name).reshape(-1)
        if start + target.numel() > (source.numel() if isinstance(source, torch.Tensor) else source.get_shape()[0]):
            raise RunError(f"{self.path} has too few elements of {name}; {REMEDY}")
        for at in range(0, target.numel(), CHUNK):
            part = target[at : at + CHUNK]
            part.copy_(source[start + at : start + at + part.numel()])


@dataclass(frozen=True)
class _Place:
    """Where a piece of a weight lies: in the flat tensors `index` of a file; None for a frozen weight."""

    file: _File
    index: int | None
    piece: Piece

    def key(self, quantity: str) -> str:
        """The tensor that holds a quantity; a frozen weight is its own average."""
        return f"frozen.{self.piece.name}" if self.index is None else quantity.format(self.index)

    def overlap(self, start: int, stop: int) -> range:
        """Elements of the weight in [start, stop) that lie here."""
        return range(max(start, self.piece.start), min(stop, self.piece.start + self.piece.length))


class Shares:
    """All processes' shares of one network in a checkpoint folder."""

    def __init__(self, folder: Path, network: str) -> None:
        self.folder = folder
        paths = sorted(folder.glob(f"{network}-*-of-*.safetensors"))
        if not paths:
            raise UsageError(
                f"{folder} holds no network called {network}; name another run (vadit train: set another --run.out)"
            )
        self.files = [_File(path) for path in paths]
        self.shapes = self.files[0].header.shapes
        self.averages = sorted(self.files[0].header.averages)  # decays of the averages that are there
        self._places: dict[str, list[_Place]] = {}
        for file in self.files:
            for place in file.places:
                self._places.setdefault(place.piece.name, []).append(place)

    def fill(self, quantity: str, name: str, start: int, target: torch.Tensor) -> bool:
        """Fill the flat `target` with a weight's elements from `start` on; whether all of them were there.

        Some states are not: those before the optimizer's first step.
        """
        filled = 0
        for place in self._places.get(name, ()):
            part, key = place.overlap(start, start + target.numel()), place.key(quantity)
            if part and key in place.file.names:
                offset = place.piece.offset + part.start - place.piece.start
                place.file.copy(key, offset, target[part.start - start : part.stop - start])
                filled += len(part)
        return filled == target.numel()

    def whole(self, quantity: str) -> dict[str, torch.Tensor]:
        """All weights or their average, frozen ones and buffers, on the host, whole and fp32."""
        found = {}
        for name, shape in self.shapes.items():
            if sum(place.piece.length for place in self._places.get(name, ())) != math.prod(shape):
                raise self._lacks(name)
            row = torch.empty(math.prod(shape))
            if not self.fill(quantity, name, 0, row):
                raise self._lacks(name)
            found[name] = row.view(shape)
        for key in sorted(self.files[0].names):
            if key.startswith("buffer."):
                found[key.removeprefix("buffer.")] = self.files[0].tensor(key).clone()
        return found

    def _lacks(self, name: str) -> RunError:
        return RunError(f"{self.folder} lacks a part of {name}; {REMEDY}")

    def load(self, engine: Engine, averages: dict[float, list[torch.Tensor]]) -> None:
        """Set this process's share of `engine` and of its averages. `engine.refresh` must follow; no collective.

        UsageError: another network, or an average that is not there.
        """
        if (difference := _difference(self.shapes, engine.shapes())) is not None:
            raise UsageError(f"{self.folder} does not fit this run's config ({difference}); use another --run.out")
        if missing := set(averages) - set(self.averages):
            raise UsageError(f"{self.folder} has no average with decay {min(missing)}; use another --run.out")
        states = []
        for index, (master, pieces) in enumerate(zip(engine.masters(), engine.layout(), strict=True)):
            for quantity, target in ((WEIGHTS, master), *((average(each), averages[each][index]) for each in averages)):
                if (lacking := self._set(quantity, target, pieces)) is not None:
                    raise self._lacks(lacking)
            states.append(self._states(master, pieces))
        engine.set_optimizer_states(states)
        engine.set_optimizer_steps(self.files[0].header.steps)
        for piece, value in engine.frozen():
            if self._set(WEIGHTS, value, [piece]) is not None:
                raise self._lacks(piece.name)
        own = self.files[distributed.rank() if len(self.files) == distributed.world_size() else 0]
        for name, buffer in engine.buffers().items():
            buffer.copy_(own.tensor(f"buffer.{name}", buffer.shape))

    def _set(self, quantity: str, target: torch.Tensor, pieces: list[Piece]) -> str | None:
        """Fill one flat tensor, but for its padding; the name of the last weight of which not all was there."""
        row, lacking = target.view(-1) if target.is_contiguous() else target.reshape(-1), None
        for piece in pieces:
            if not self.fill(quantity, piece.name, piece.start, row[piece.offset : piece.offset + piece.length]):
                lacking = piece.name
        if not target.is_contiguous():
            target.copy_(row.view(target.shape))
        return lacking

    def _states(self, master: torch.Tensor, pieces: list[Piece]) -> dict[str, Any]:
        """The optimizer's states of one flat tensor, out of those that hold its pieces."""
        sources: dict[str, _Place] = {}
        for piece in pieces:
            for place in self._places.get(piece.name, ()):
                if place.index is not None and place.overlap(piece.start, piece.start + piece.length):
                    sources |= dict.fromkeys(place.file.header.states[place.index], place)
        states: dict[str, Any] = {}
        for name, place in sources.items():
            if name == STEP:
                states[name] = place.file.tensor(place.key(state(name))).clone()
                continue
            states[name] = torch.zeros_like(master)  # as is what was never stepped, and padding
            self._set(state(name), states[name], pieces)
        return states


def _difference(found: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]) -> str | None:
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            return f"{name} is {found.get(name, 'missing')} there and {needed.get(name, 'missing')} here"
    return None

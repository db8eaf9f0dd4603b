"""What one process's share of a network looks like on disk, and how shares become others.

A file NETWORK-RANK-of-COUNT.safetensors holds the flat tensors of one process as they are: `master.I` (fp32 weights),
`state.I.NAME` (the optimizer's), `ema-DECAY.I`, `frozen.NAME`, `buffer.NAME`. Its metadata say, under `vadit`, which
elements of which weight lie where in tensors I: the pieces. So nothing is gathered to save; a run with as many
processes and the same sharding takes its own file back, bit by bit; any other one, and an export, picks the pieces
that it needs out of all files.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vadit.runtime import distributed
from vadit.runtime.errors import RunError, UsageError
from vadit.train.engine import Engine
from vadit.train.layout import Piece

CHUNK = 1 << 24
"""Elements that are read in one go."""
REMEDY = "delete this checkpoint's folder, and the same command goes on from the one before it"
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""States with one number per weight, which may be cut otherwise."""


@dataclass
class Header:
    """What a file says of itself."""

    shapes: dict[str, tuple[int, ...]]
    """Of all parameters, whole."""
    groups: list[list[Piece]]
    """The pieces in every `master.I`, and so in its averages and moments."""
    states: list[dict[str, Any]]
    """Of every `master.I` the optimizer's states by name: what kind of thing each is."""
    steps: list[Any]
    """Step counts that the optimizer keeps by parameter group."""
    frozen: dict[str, Piece]
    """The piece in every `frozen.NAME`."""

    def to_json(self) -> str:
        """The header as the file keeps it."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Undo `to_json`."""
        values = json.loads(text)
        return cls(
            shapes={name: tuple(shape) for name, shape in values["shapes"].items()},
            groups=[[Piece(*piece) for piece in group] for group in values["groups"]],
            states=values["states"],
            steps=values["steps"],
            frozen={name: Piece(*piece) for name, piece in values["frozen"].items()},
        )


def file_name(network: str, rank: int, count: int) -> str:
    """Name of one process's share of a network."""
    return f"{network}-{rank:05d}-of-{count:05d}.safetensors"


def has_network(folder: Path, network: str) -> bool:
    """Whether a checkpoint holds shares of a network with this name."""
    return any(folder.glob(f"{network}-*-of-*.safetensors"))


def average_name(decay: float) -> str:
    """What the tensors of the average with this decay are called."""
    return f"ema-{decay!r}"


def collect(engine: Engine, averages: dict[float, list[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], Header]:
    """This process's share, uncopied, and its header. At ZeRO 0 the main process has the weights, others buffers."""
    whole = engine.spec.zero_stage == 0
    header = Header(engine.shapes(), [], [], engine.optimizer_steps(), {})
    tensors: dict[str, torch.Tensor] = {}
    if distributed.is_main() or not whole:
        masters = engine.masters()
        header.groups = engine.layout()
        for index, (master, state) in enumerate(zip(masters, engine.optimizer_states(), strict=True)):
            tensors[f"master.{index}"] = master.reshape(-1)
            header.states.append(_add_states(tensors, f"state.{index}.", state, master))
        for decay, shards in averages.items():
            tensors |= {f"{average_name(decay)}.{index}": shard.reshape(-1) for index, shard in enumerate(shards)}
    for piece, value in engine.frozen():
        if piece.length and (distributed.is_main() or piece.length < _numel(header.shapes[piece.name])):
            header.frozen[piece.name] = piece
            tensors[f"frozen.{piece.name}"] = value
    tensors |= {f"buffer.{name}": buffer for name, buffer in engine.buffers().items()}
    return tensors, header


def _add_states(
    tensors: dict[str, torch.Tensor], prefix: str, state: dict[str, Any], master: torch.Tensor
) -> dict[str, Any]:
    """Put the tensors of a state into `tensors`; what kind of thing every entry is."""
    kinds: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            kinds[name] = {"value": value}
        elif is_traceable_wrapper_subclass(value):  # torchao's moments of 8 bits: codes, scales and the map of them
            parts, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
            kinds[name] = {"packed": list(parts), "context": [_plain(item) for item in context]}
            tensors |= {f"{prefix}{name}.{part}": getattr(value, part) for part in parts}
        else:
            each = name in MOMENTS and value.shape == master.shape
            kinds[name] = "each" if each else "tensor"
            tensors[prefix + name] = value.reshape(-1) if each else value
    return kinds


def _plain(item: Any) -> Any:
    return str(item) if isinstance(item, torch.dtype) else item


class _File:
    """One process's share on disk; tensors are mapped, and only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = safe_open(path, "pt")
            self.header = Header.from_json(self._handle.metadata()["vadit"])
            self.names = set(self._handle.keys())
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path} cannot be read as a part of a checkpoint ({error}); {REMEDY}") from error

    def tensor(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._handle.get_tensor(name)
        return value

    def copy(self, name: str, start: int, target: torch.Tensor) -> None:
        """Fill the flat `target` from element `start` of a tensor on, a chunk at a time."""
        source = self._handle.get_slice(name)
        for at in range(0, target.numel(), CHUNK):
            part = target[at : at + CHUNK]
            part.copy_(source[start + at : start + at + part.numel()])

    def num_elements(self, name: str) -> int:
        return _numel(self._handle.get_slice(name).get_shape())


def _numel(shape: Any) -> int:
    return torch.Size(shape).numel()


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
        # weight -> (start, stop, file, index of the flat tensor, offset in it)
        self._pieces: dict[str, list[tuple[int, int, _File, int, int]]] = {}
        for file in self.files:
            for index, group in enumerate(file.header.groups):
                for name, start, offset, length in group:
                    self._pieces.setdefault(name, []).append((start, start + length, file, index, offset))

    def averages(self) -> list[float]:
        """Decays of the averages that are there."""
        names = {name.rpartition(".")[0] for name in self.files[0].names if name.startswith("ema-")}
        return sorted(float(name.removeprefix("ema-")) for name in names)

    def fill(self, kind: str, name: str, start: int, target: torch.Tensor) -> bool:
        """Fill the flat `target` with a weight's elements from `start` on; whether they were there.

        kind: `master`, an `average_name`, or `state.NAME`; a state is not there before the optimizer's first step.
        """
        filled, stop = 0, start + target.numel()
        for first, last, file, index, offset in self._pieces.get(name, ()):
            low, high = max(start, first), min(stop, last)
            if low >= high:
                continue
            key = f"state.{index}.{kind.removeprefix('state.')}" if kind.startswith("state.") else f"{kind}.{index}"
            if key in file.names:
                file.copy(key, offset + low - first, target[low - start : high - start])
                filled += high - low
        return filled == target.numel()

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """All weights (`kind`: master or an `average_name`), frozen ones and buffers, on the host, whole and fp32."""
        state = {}
        for name, shape in self.shapes.items():
            row = torch.empty(_numel(shape))
            if not (self.fill(kind, name, 0, row) if name in self._pieces else self._fill_frozen(name, row)):
                raise RunError(f"{self.folder} lacks a part of {name}; {REMEDY}")
            state[name] = row.view(shape)
        for key in sorted(self.files[0].names):
            if key.startswith("buffer."):
                state[key.removeprefix("buffer.")] = self.files[0].tensor(key).clone()
        return state

    def _fill_frozen(self, name: str, row: torch.Tensor) -> bool:
        filled = 0
        for file in self.files:
            if (piece := file.header.frozen.get(name)) is not None and piece.length:
                row[piece.start : piece.start + piece.length] = file.tensor(f"frozen.{name}").view(-1)
                filled += piece.length
        return filled == row.numel()

    def load(self, engine: Engine, averages: dict[float, list[torch.Tensor]]) -> None:
        """Set this process's share of `engine` and of its averages. `engine.refresh` must follow; no collective.

        Raises:
            UsageError: another network, an average that is not there, or a state that cannot be cut otherwise.
        """
        if (difference := _difference(self.shapes, engine.shapes())) is not None:
            raise UsageError(f"{self.folder} does not fit this run's config ({difference}); use another --run.out")
        missing = set(averages) - set(self.averages())
        if missing:
            raise UsageError(f"{self.folder} has no average with decay {min(missing)}; use another --run.out")
        masters, layout = engine.masters(), engine.layout()
        rank = distributed.rank() if len(self.files) == distributed.world_size() else 0
        own = self.files[0 if engine.spec.zero_stage == 0 else rank]
        same = (
            len(self.files) == distributed.world_size()
            and own.header.groups == layout
            and all(own.num_elements(f"master.{i}") == master.numel() for i, master in enumerate(masters))
        )
        states = engine.optimizer_states()
        for index, (master, pieces) in enumerate(zip(masters, layout, strict=True)):
            own_file = own if same else None
            self._set("master", master, index, pieces, own_file)
            for decay, shards in averages.items():
                self._set(average_name(decay), shards[index], index, pieces, own_file)
            if own_file is not None:
                states[index] = self._own_state(own_file, index, states[index], master, pieces)
            else:
                states[index] = self._cut_state(states[index], master, pieces)
        engine.set_optimizer_states(states)
        engine.set_optimizer_steps(own.header.steps)
        for piece, value in engine.frozen():
            row = torch.empty(_numel(self.shapes[piece.name]))
            self._fill_frozen(piece.name, row)
            value.copy_(row[piece.start : piece.start + piece.length].view(value.shape))
        for name, buffer in engine.buffers().items():
            buffer.copy_(self.files[rank].tensor(f"buffer.{name}"))

    def _set(self, kind: str, target: torch.Tensor, index: int, pieces: list[Piece], own: _File | None) -> bool:
        """Fill one flat tensor: with padding and all out of this process's own file, or piece by piece."""
        row = target.view(-1) if target.is_contiguous() else torch.empty_like(target).contiguous().view(-1)
        found = True
        if own is not None:
            name = kind.removeprefix("state.")
            own.copy(f"state.{index}.{name}" if kind.startswith("state.") else f"{kind}.{index}", 0, row)
        else:
            for piece in pieces:
                found &= self.fill(kind, piece.name, piece.start, row[piece.offset : piece.offset + piece.length])
        if not target.is_contiguous():
            target.copy_(row.view(target.shape))
        return found

    def _own_state(
        self, own: _File, index: int, now: dict[str, Any], master: torch.Tensor, pieces: list[Piece]
    ) -> dict[str, Any]:
        """The optimizer's state of one flat tensor as this process left it."""
        state: dict[str, Any] = {}
        for name, kind in own.header.states[index].items():
            key = f"state.{index}.{name}"
            if kind == "each":
                state[name] = _like(now.get(name), master)
                self._set(f"state.{name}", state[name], index, pieces, own)
            elif kind == "tensor":
                state[name] = own.tensor(key).clone()
                if name != "step":
                    state[name] = state[name].to(master.device)
            elif "packed" in kind:
                parts = {part: own.tensor(f"{key}.{part}").to(master.device) for part in kind["packed"]}
                state[name] = _packed(parts, kind["context"])
            else:
                state[name] = kind["value"]
        return state

    def _cut_state(self, now: dict[str, Any], master: torch.Tensor, pieces: list[Piece]) -> dict[str, Any]:
        """The optimizer's state of one flat tensor, out of those that hold its pieces."""
        kinds: dict[str, tuple[_File, int, Any]] = {}
        for piece in pieces:
            for first, last, file, index, _ in self._pieces[piece.name]:
                if max(first, piece.start) < min(last, piece.start + piece.length):
                    for name, kind in file.header.states[index].items():
                        kinds.setdefault(name, (file, index, kind))
        state: dict[str, Any] = {}
        for name, (file, index, kind) in kinds.items():
            if kind == "each":
                state[name] = _like(now.get(name), master).zero_()  # what was never stepped, and padding
                self._set(f"state.{name}", state[name], index, pieces, None)
            elif name == "step":
                state[name] = file.tensor(f"state.{index}.step").clone() if kind == "tensor" else kind["value"]
            elif kind == "tensor" or "packed" in kind:
                raise UsageError(
                    f"{self.folder} has an optimizer's state ({name}) that only {len(self.files)} processes at the "
                    "same engine.zero_stage can go on from; use these, or start anew with --run.init-from and "
                    "another --run.out"
                )
            else:
                state[name] = kind["value"]
        return state


def _like(now: Any, master: torch.Tensor) -> torch.Tensor:
    """A tensor for one number per weight: the one there is, which others may refer to, or a new one."""
    fits = isinstance(now, torch.Tensor) and now.shape == master.shape
    return now if fits else torch.zeros_like(master)


def _packed(parts: dict[str, torch.Tensor], context: list[Any]) -> torch.Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    context = [getattr(torch, item.removeprefix("torch.")) if isinstance(item, str) else item for item in context]
    value: torch.Tensor = OptimState8bit.__tensor_unflatten__(parts, context)
    return value


def _difference(found: dict[str, tuple[int, ...]], needed: dict[str, tuple[int, ...]]) -> str | None:
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            return f"{name} is {found.get(name, 'missing')} there and {needed.get(name, 'missing')} here"
    return None

"""Weights on disk: a folder with config.json (the model's spec) and model.safetensors, written whole or not at all.

Foreign files are read here, too (`read_weights`), and never with code that the file brings along.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vadit.config.files import load_config, save_config
from vadit.runtime import distributed
from vadit.runtime.console import note_once
from vadit.runtime.errors import UsageError, first_line
from vadit.runtime.files import saved_file
from vadit.runtime.json_files import Limits, parse_json
from vadit.runtime.reading import openable
from vadit.runtime.safetensors_file import load_tensors, save_tensors
from vadit.runtime.torch_file import is_plain, load_torch

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DistributedDataParallel, torch.compile and FSDP put into names, before them or at any depth."""
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.", "projector.", "projectors.")
"""Parts of a checkpoint that neither encode, decode nor draw."""

S = TypeVar("S")
M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", bound="Pretrained")


@dataclass(frozen=True)
class Origin:
    """What the training of weights leaves to know; kept in the metadata of an exported model.safetensors."""

    ema: Annotated[float, Limits(ge=0, lt=1)] = 0.0  # decay of the average that they are; 0 for plain weights
    start_share: Annotated[float, Limits(ge=0, le=1)] = 0.0  # share of the weights of the start in that average
    classes: tuple[tuple[int, int], ...] | None = None  # ranges (first, last) of those that there were samples of

    def warn(self, what: str) -> None:
        """A line where an average is none of trained weights yet."""
        if self.start_share > 0.01:
            note_once(
                f"{what}: {self.start_share:.0%} of the average with decay {self.ema:g} are still the weights that "
                "training began with; train longer, or take the plain weights (--ema 0 of sample and export)"
            )


class Pretrained(nn.Module):
    """A network that is saved to a folder and read from it. A subclass names the class of its `spec`, `Spec`."""

    Spec: type[Any]
    spec: Any
    origin = Origin()
    path: str | None = None  # what `load_autoencoder` read it from

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights (asked of the iterator: an attribute would make ZeRO 3 gather the tensor)."""
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, which is made where it does not exist."""
        known = {} if self.origin == Origin() else {"vadit": json.dumps(dataclasses.asdict(self.origin))}
        write_safetensors(self.state_dict(), Path(folder) / WEIGHTS_NAME, known)
        save_config(self.spec, Path(folder) / CONFIG_NAME)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what `save_pretrained` wrote; float32, on the CPU, in evaluation mode."""
        spec = read_spec(cls.Spec, folder)
        return read_model(folder, lambda: cls(spec))


def write_safetensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to one file; never half a file, also where it fails."""
    with saved_file(path) as partial:
        save_tensors(partial, state, metadata)


def read_spec(kind: type[S], folder: str | Path) -> S:
    """The spec in `folder`; a folder without weights is refused before anything is built."""
    folder = Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise UsageError(f"{folder} holds no {WEIGHTS_NAME}; name a folder written by save_pretrained or vadit import")
    return load_config(kind, folder / CONFIG_NAME)


def read_model(folder: str | Path, make: Callable[[], P]) -> P:
    """The model that `make` builds, with the weights of a folder and what `save_pretrained` noted of them."""
    path = Path(folder) / WEIGHTS_NAME
    model = build_model(make, load_tensors(path), origin=str(path))
    with openable(path) as name, safe_open(name, "pt") as file:
        text = (file.metadata() or {}).get("vadit", "{}")  # a file of others says nothing
    model.origin = parse_json(text, Origin, f"the metadata of {path}", remedy="export it anew")
    return model


def read_weights(path: str | Path) -> Any:
    """What a .safetensors file or a file of torch.save holds, on the CPU; no code of the file is run.

    Raises UsageError where there is no such file or it needs code to load, RunError where it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; name a file of weights")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    return load_torch(path)


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """`read_weights` of a file that has to hold a mapping."""
    content = read_weights(path)
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}, needed is a mapping of tensors by name")
    return content


def bare_state(content: Mapping[str, Any], *marks: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a network in somebody's checkpoint under its own names, and what was left out, in words.

    A network is known by one of `marks`, tensors that it must have. It may lie in an inner mapping (`ema`, `model`,
    `state_dict`), averages before others, and behind a prefix (`ema_model.`, `model.`). Without a mark: all tensors.
    """
    inner = [key for key, value in content.items() if isinstance(value, Mapping)]
    candidates = [content[key] for key in sorted(inner, key=lambda key: "ema" not in str(key))]
    states = [
        {
            ".".join(part for part in str(name).split(".") if part not in WRAPPERS): value
            for name, value in candidate.items()
            if isinstance(value, Tensor)
        }
        for candidate in [*candidates, content]
    ]
    for state in states:
        roots = {name.removesuffix(mark) for mark in marks for name in state if f".{name}".endswith(f".{mark}")}
        if roots:
            root = min(roots, key=lambda root: (root != "", "ema" not in root, root))
            own = {name.removeprefix(root): value for name, value in state.items() if name.startswith(root)}
            bare = {name: value for name, value in own.items() if not name.startswith(TRAINING_ONLY)}
            names = [name.removeprefix(root) for name in state]
            others = Counter(name.split(".")[0] for name in names if name not in bare)
            return bare, ", ".join(f"{count} of {part}" for part, count in others.items())
    return states[0], ""


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy `state` into `model`, name by name; the first tensor that is missing, left over or misshapen is named."""
    _check_fit(model, state, origin)
    with torch.no_grad():
        model.load_state_dict(dict(state))


def build_model(make: Callable[[], M], state: Mapping[str, Tensor], origin: str) -> M:
    """The model that `make` builds, with `state` as its weights: float32, on the CPU, in evaluation mode.

    It is built without memory, so that a billion weights are neither drawn at random first nor held twice.
    """
    try:
        with torch.device("meta"):
            model = make()
    except RuntimeError as error:  # of sizes beyond all numbers
        raise UsageError(f"{origin}: no network can be built by its config ({first_line(error)})") from None
    _check_fit(model, state, origin)
    # copies: what is read may be a view of the file, or the caller's own tensors
    copies = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise UsageError(f"{origin}: tensor {name} of shape {tuple(tensor.shape)} is missing; use a matching file")
        if state[name].shape != tensor.shape:
            raise UsageError(
                f"{origin}: tensor {name} has shape {tuple(state[name].shape)}, "
                f"the model needs {tuple(tensor.shape)}; use a matching file or config"
            )
        if not is_plain(state[name]):
            raise UsageError(f"{origin}: the numbers of tensor {name} do not all lie in the file; save it as it is")
    for name, tensor in state.items():
        if name not in own:
            raise UsageError(f"{origin}: unexpected tensor {name} of shape {tuple(tensor.shape)}; use a matching file")
    stored = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, state.values())}
    if sum(tensor.nbytes for tensor in state.values()) > 2 * sum(stored.values()):
        raise UsageError(f"{origin} gives many tensors the same numbers; save each with its own")


def compare_published(path: str | Path, sha256: str) -> None:
    """A line where a file that others have published is not theirs."""
    if distributed.is_main():
        with Path(path).open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != sha256:
            note_once(
                f"{path} is not the published file: its SHA-256 is {found[:8]}..., published is {sha256[:8]}...; "
                "numbers that rest on it are comparable with each other alone"
            )


def weights_hash(module: nn.Module) -> str:
    """16 hex digits that name a module's weights: SHA-256 over names, types, shapes and bytes of its state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

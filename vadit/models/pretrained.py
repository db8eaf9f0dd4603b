"""Weights on disk: a folder with config.json (the model's spec) and model.safetensors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vadit.config import load_config, save_config
from vadit.errors import RunError, UsageError

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

S = TypeVar("S")


def save_model(model: nn.Module, spec: Any, folder: str | Path) -> None:
    """Write `spec` and the model's state dict into `folder`, which is created where it does not exist."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(model.state_dict(), folder / WEIGHTS_NAME)
        save_config(spec, folder / CONFIG_NAME)
    except OSError as error:
        raise RunError(f"cannot write the model to {folder}: {error.strerror or error}") from None


def write_safetensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to one file; a stopped run leaves NAME.partial and never half a file under the final name."""
    partial = path.with_name(path.name + ".partial")
    # safetensors refuses strided and shared storage, and keeps tensors on the host
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        save_file(tensors, partial)
    except SafetensorError as error:
        raise RunError(f"cannot write {path}: {error}") from None
    partial.replace(path)


def read_spec(kind: type[S], folder: str | Path) -> S:
    """The spec in `folder`; a folder without weights is refused before anything is built."""
    folder = Path(folder)
    if not (folder / WEIGHTS_NAME).is_file():
        raise UsageError(f"{folder} holds no {WEIGHTS_NAME}; name a folder written by save_pretrained or vadit import")
    return load_config(kind, folder / CONFIG_NAME)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of one file, on the CPU; a damaged file raises RunError with its name."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read as safetensors ({error}); it is truncated or damaged") from None


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copy `state` into `model`, name by name; the first tensor that is missing, left over or misshapen is named."""
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in state:
            raise UsageError(f"{origin}: tensor {name} of shape {tuple(tensor.shape)} is missing; use a matching file")
        if state[name].shape != tensor.shape:
            raise UsageError(
                f"{origin}: tensor {name} has shape {tuple(state[name].shape)}, "
                f"the model needs {tuple(tensor.shape)}; use a matching file or config"
            )
    for name, tensor in state.items():
        if name not in own:
            raise UsageError(f"{origin}: unexpected tensor {name} of shape {tuple(tensor.shape)}; use a matching file")
    with torch.no_grad():
        model.load_state_dict(dict(state))

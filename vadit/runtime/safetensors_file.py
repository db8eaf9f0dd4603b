"""Tensors in files: the safetensors library's own reader and writer, but for what they leave out."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vadit.runtime.reading import openable, patiently


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; OSError, SafetensorError where it is damaged, ReadFault."""

    def load() -> dict[str, Tensor]:
        with openable(path) as name:
            return load_file(name)

    return patiently(load, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with the permissions of any new file.

    The library's own lets the owner alone read. Of several entries of metadata it mixes the order.
    """
    # safetensors refuses strided storage, and keeps tensors on the host
    path.unlink(missing_ok=True)  # older releases write through a link
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)

"""Writing tensors: the safetensors library's own writer, but for what it leaves out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file through to the disk, with the permissions of any new file.

    The library's own lets the owner alone read. Of several entries of metadata it mixes the order.
    """
    # safetensors refuses strided storage, and keeps tensors on the host
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with path.open("rb+") as file:
        os.fsync(file.fileno())

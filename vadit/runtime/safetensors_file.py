"""Tensors in files: the safetensors library's own reader and writer, but for what they leave out."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vadit.runtime.errors import RunError, first_line
from vadit.runtime.reading import openable, patiently, readable


@contextlib.contextmanager
def sound(path: str | Path, remedy: str) -> Iterator[None]:
    """RunError of the block where a file cannot be read or is damaged, with the remedy."""
    with readable(path, remedy):
        try:
            yield
        except SafetensorError as error:
            what = f"{path} cannot be read as safetensors ({first_line(error)})"
            raise RunError(f"{what}; it is truncated or damaged: {remedy}") from None


def load_tensors(path: str | Path, remedy: str = "fetch or export it anew") -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; RunError where it cannot be read or is damaged."""

    def load() -> dict[str, Tensor]:
        with openable(path) as name:
            return load_file(name)

    with sound(path, remedy):
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

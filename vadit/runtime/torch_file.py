"""Reading files of torch.save: the only place that does, and never with code that a file brings along."""

import contextlib
import mmap
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch

from vadit.runtime.errors import WANTS_CODE, RunError, UsageError
from vadit.runtime.reading import ReadFault, openable, patiently

_CALLS = {"GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}  # what a pickle names functions with


def load_torch(path: Path, remedy: str = "") -> Any:
    """Tensors and plain values of a file, on the CPU; mapped, so that of large ones only what is used is ever read.

    UsageError where it would need code of its own, RunError where it is damaged; `remedy` in place of the usual one.
    """

    def load() -> Any:
        _refuse_growth(path)
        with openable(path) as name:
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            return patiently(load, path)
    except ReadFault:
        raise
    except Exception as error:  # the unpickler runs on the damaged bytes themselves and so fails in many ways
        if (wish := _wish(path, error)) is not None:
            usual = "save its state dict alone with torch.save and use that file"
            raise UsageError(f"{path} was {WANTS_CODE}{wish}; {remedy or usual}") from None
        raise RunError(
            f"{path} cannot be read as a torch checkpoint; it is truncated or damaged: "
            f"{remedy or 'fetch or export it anew'}"
        ) from None


def _refuse_growth(path: Path) -> None:
    """ValueError for what takes more memory than its file, or other numbers: torch.save never does either.

    torch maps compressed members as if they were none, and lets a pickle make a bytearray of any size.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = [each for each in archive.infolist() if "/code/" not in each.filename]  # of TorchScript, refused
            if any(each.compress_type != zipfile.ZIP_STORED for each in members):
                raise ValueError("its members are compressed")
            grows = any(b"bytearray" in archive.read(each) for each in members if each.filename.endswith(".pkl"))
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            grows = content.find(b"bytearray") >= 0
    if grows:
        raise ValueError("it makes a bytearray")


def is_plain(value: object) -> TypeGuard[torch.Tensor]:
    """Whether this is a tensor whose numbers all lie in the file: not one that repeats a few, or has no memory."""
    return (
        isinstance(value, torch.Tensor)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def _wish(path: Path, error: Exception) -> str | None:
    """What a file wants to run, in brackets or "" where that has no name; None for one that is damaged."""
    text = str(error)
    if "TorchScript" in text:
        return " (TorchScript)"
    if isinstance(error, pickle.UnpicklingError) and (name := re.search(r"GLOBAL (\S+)", text)):
        return f" ({name[1]})"
    if isinstance(error, pickle.UnpicklingError) and re.search(r"Can only (create|build)|reduce", text):
        return ""
    with contextlib.suppress(Exception), path.open("rb") as file:  # a bare pickle, whose operations torch has not
        return "" if any(operation.name in _CALLS for operation, *_ in pickletools.genops(file)) else None
    return None

"""The safetensors format, read without the library so that rows can be found in the file, and written in parts.

A file is an 8-byte little-endian header length, a JSON header and raw tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vadit.runtime.errors import RunError
from vadit.runtime.files import whole_file

_TORCH_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_TYPE_NAMES = {kind: name for name, kind in _TORCH_TYPES.items()}
_MAX_HEADER_BYTES = 100_000_000
REMEDY = "fetch or encode the file anew"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header of its file describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""


def parse_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Every tensor of a safetensors file and the header's metadata, checked against the file's size."""
    try:
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            start = 8 + header_bytes
            if num_bytes < 8 or header_bytes > _MAX_HEADER_BYTES or start > num_bytes:
                raise RunError(f"{path} is cut short or no safetensors file ({num_bytes} bytes); {REMEDY}")
            header = json.loads(file.read(header_bytes))
        metadata = header.pop("__metadata__", {})
        tensors: dict[str, TensorEntry] = {}
        spans: list[tuple[int, int]] = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            type_name, shape = entry["dtype"], tuple(entry["shape"])
            if type_name not in _TORCH_TYPES or any(not isinstance(side, int) or side < 0 for side in shape):
                raise RunError(f"{path}: {name} is {type_name} {shape}, which is not readable; {REMEDY}")
            kind = _TORCH_TYPES[type_name]
            if not 0 <= begin <= end or end - begin != math.prod(shape) * kind.itemsize:
                raise RunError(
                    f"{path}: the header gives {name} {end - begin} bytes but its shape is {shape}; {REMEDY}"
                )
            if start + end > num_bytes:
                raise RunError(f"{path} is cut short: {name} ends at byte {start + end} of {num_bytes}; {REMEDY}")
            spans.append((begin, end))
            tensors[name] = TensorEntry(kind, shape, start + begin)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror or error}); {REMEDY}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} has a damaged header ({type(error).__name__}: {error}); {REMEDY}") from None
    spans.sort()
    starts, ends = [begin for begin, _ in spans], [end for _, end in spans]
    if [*starts, num_bytes - start] != [0, *ends]:
        raise RunError(
            f"{path}: its tensors {spans} do not fill its {num_bytes - start} bytes one after another; {REMEDY}"
        )
    return tensors, metadata


def write_tensors(path: Path, tensors: dict[str, list[Tensor]], metadata: dict[str, str]) -> None:
    """Write a safetensors file; each tensor comes as parts along its first axis."""
    header: dict[str, Any] = {"__metadata__": metadata}
    # Wide types first, so that every tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: -tensors[name][0].element_size())
    offset = 0
    for name in names:
        parts = tensors[name]
        end = offset + sum(part.numel() * part.element_size() for part in parts)
        shape = [sum(len(part) for part in parts), *parts[0].shape[1:]]
        header[name] = {"dtype": _TYPE_NAMES[parts[0].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    payload = [
        part.view(torch.int16) if part.dtype == torch.bfloat16 else part for name in names for part in tensors[name]
    ]
    write_parts(path, [len(text).to_bytes(8, "little"), text, *payload])


def write_parts(path: Path, parts: Sequence[bytes | Tensor]) -> None:
    """Write bytes and tensors one after another, the file whole or not at all; RunError where the disk is full."""
    try:
        with whole_file(path) as partial, partial.open("wb") as file:
            for part in parts:
                file.write(part.numpy().tobytes() if isinstance(part, Tensor) else part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror or error}); free space or choose another folder"
        ) from error

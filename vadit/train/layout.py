"""Where the weights lie in the flat tensors that DeepSpeed cuts them into: which elements of which weight, where."""

from typing import NamedTuple

import torch

from vadit.runtime import distributed
from vadit.runtime.json_files import Count


class Piece(NamedTuple):
    """Elements [start, start + length) of a weight, laid flat, at `offset` of a flat tensor."""

    name: str
    start: Count
    offset: Count
    length: Count


def cut_each(group: list[torch.nn.Parameter], names: dict[torch.Tensor, str]) -> list[Piece]:
    """ZeRO 3: every weight cut into as many equal parts, the last one padded, as there are processes."""
    pieces, offset = [], 0
    for weight in group:
        size, numel = weight.ds_tensor.ds_numel, weight.ds_numel  # type: ignore[attr-defined]
        start = min(distributed.rank() * size, numel)
        if (length := min(size, numel - start)) > 0:
            pieces.append(Piece(names[weight], start, offset, length))
        offset += size
    return pieces


def cut_row(
    group: list[torch.nn.Parameter], starts: list[int], names: dict[torch.Tensor, str], size: int
) -> list[Piece]:
    """ZeRO 1/2: the weights begin at `starts` in one row, of which this process has the `size` elements at its rank."""
    pieces, first = [], distributed.rank() * size
    for weight, begin in zip(group, starts, strict=True):
        start, stop = max(first - begin, 0), min(first + size - begin, weight.numel())
        if start < stop:
            pieces.append(Piece(names[weight], start, begin + start - first, stop - start))
    return pieces

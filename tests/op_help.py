"""What the tests of several ops share."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from vadit.kernels import dispatch
from vadit.kernels.testing import Op, results_and_gradients


def kernels_of(op: str, tensor: Tensor) -> Any:
    """The library whose kernels run; the test is skipped where plain torch does."""
    ops = dispatch.kernels_for(op, tensor)
    return pytest.skip("plain torch") if ops is None else ops


def assert_names(op: str, words: list[str], call: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """A wrong call is refused by the op, with all these words."""
    with pytest.raises(ValueError, match=f"^{op}: found") as error:
        call(*arguments, **named)
    assert all(word in str(error.value) for word in words)


def assert_same_with_more_threads(op: Op, inputs: Sequence[Tensor | None], backend: str) -> None:
    """Results and gradients to the bit; of kernels for the CPU."""
    if backend != "cpp":
        pytest.skip("threads are the CPU kernels'")
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(results_and_gradients(op, inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

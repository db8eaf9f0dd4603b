"""Tests are modules of their own (--import-mode=importlib); the helpers that several share lie beside them."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vadit.runtime import reading

sys.path.append(str(Path(__file__).parent))
if not torch.cuda.is_available():
    # Read when Triton kernels are imported: they then run on the CPU, in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

reading.WAITS_S = (0.0, 0.0)  # what is read again is read at once

KERNEL_BACKENDS = ("reference", "cpp", "triton", "cuda")


def resolve(backend: str) -> str:
    """The setting that runs a backend's kernels: on a GPU, else its stand-in on the CPU; skips where neither can be."""
    from vadit import kernels
    from vadit.kernels import dispatch

    if backend == "reference":
        return backend
    if backend == "cuda" and not torch.cuda.is_available():
        from simt import library

        if why := library.missing():
            pytest.skip(why)
        if "cuda_emulated" not in dispatch.BACKENDS:
            library.load_emulated()
            dispatch.BACKENDS["cuda_emulated"] = dispatch.Backend("vadit_emulated", "cpu", None)
            kernels.register("vadit_emulated")
            dispatch.NOT_WRITTEN.update([(op, "cuda_emulated") for op, name in dispatch.NOT_WRITTEN if name == "cuda"])
        return "cuda_emulated"
    if missing := dispatch.BACKENDS[backend].missing:
        pytest.skip(missing)
    return backend


@pytest.fixture(params=KERNEL_BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """Each backend of the ops in turn; results start as NaN, and Triton's kernels have fences around their tensors."""
    from vadit.kernels import dispatch

    with dispatch.setting(resolve(request.param)):
        if request.param == "triton":
            from fences import fenced, rounded
            from triton.runtime import interpreter

            from vadit.kernels.triton_kernels import common

            monkeypatch.setattr(common, "launch", fenced(common.launch))
            monkeypatch.setattr(interpreter, "_convert_float", rounded(interpreter._convert_float))
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is empty
        yield request.param
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def environment_read_anew() -> Iterator[None]:
    """A test that sets a launcher's environment sets it for itself."""
    yield
    from vadit.runtime import launcher

    launcher._place = None


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3 of small networks; not to be changed."""
    from checkpoint_worker import three_checkpoints

    return three_checkpoints(tmp_path_factory.mktemp("three") / "checkpoints")


@pytest.fixture
def folder(three: Path, tmp_path: Path) -> Path:
    """A copy of these checkpoints."""
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, what runs on it can be asked for: pytest -m gpu."""
    for item in items:
        parameters = getattr(item, "callspec", None)
        if torch.cuda.is_available() and parameters and parameters.params.get("backend") in ("triton", "cuda"):
            item.add_marker(pytest.mark.gpu)

"""Builds csrc/cuda for the CPU: the very kernels, run by the emulator in cuda_on_cpu.h, as torch.ops.vadit_emulated."""

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wno-unknown-pragmas"]
FLAGS += ["-DVADIT_EMULATED", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
RENAMED = {
    "registration.cpp": ("STABLE_TORCH_LIBRARY(vadit, m)", "STABLE_TORCH_LIBRARY(vadit_emulated, m)"),
    "cuda/bindings.cpp": (
        "STABLE_TORCH_LIBRARY_IMPL(vadit, CUDA, m)",
        "STABLE_TORCH_LIBRARY_IMPL(vadit_emulated, CPU, m)",
    ),
}
"""The files that name the ops' namespace and key: they are compiled with these words replaced."""


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    return None if shutil.which("g++") else "g++ is not installed"


def _torch_include() -> Path:
    spec = find_spec("torch")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "include"


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def _compile(sources: list[Path], target: Path) -> None:
    """Build `sources` (.cu and .cpp) into the shared library `target`."""
    include = ["-include", str(HERE / "cuda_on_cpu.h"), f"-I{CSRC / 'cuda'}", f"-isystem{_torch_include()}"]
    objects = [target.with_name(f"{target.stem}-{source.stem}.o") for source in sources]
    steps = [
        ["g++", *FLAGS, *include, "-x", "c++", "-c", str(source), "-o", str(to)]
        for source, to in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, steps))
    partial = target.with_name(target.name + ".partial")
    # Python loads torch without exporting its symbols: the library must name torch's libraries itself.
    torch_libraries = [str(_torch_include().with_name("lib") / name) for name in ("libtorch.so", "libtorch_cpu.so")]
    _run(["g++", "-shared", *map(str, objects), "-Wl,--no-as-needed", *torch_libraries, "-o", str(partial)])
    for to in objects:
        to.unlink()
    partial.replace(target)


def _cached(name: str, sources: dict[str, str]) -> Path:
    """The library of these sources (file name -> text), built at most once however many processes ask."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*HERE.glob("*.h"), *HERE.glob("*.py"), *(CSRC / "cuda").iterdir()]):
        digest.update(path.read_bytes())
    digest.update(repr(sorted(sources.items())).encode())
    folder = Path(tempfile.gettempdir()) / f"vadit-simt-{os.getuid()}" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.so"
    with FileLock(folder / "lock"):
        if not target.exists():
            for file, text in sources.items():
                (folder / file).write_text(text)
            _compile([folder / file for file in sources], target)
    return target


def build_program(name: str, text: str) -> Path:
    """A library of one source of its own, for tests of the emulator itself."""
    return _cached(name, {f"{name}.cu": text})


@functools.cache
def build_emulated() -> Path:
    """The library with all CUDA kernels; load it with torch.ops.load_library."""
    sources = {path.name: path.read_text() for path in sorted((CSRC / "cuda").glob("*.cu"))}
    for file, (before, after) in RENAMED.items():
        text = (CSRC / file).read_text()
        assert text.count(before) == 1, f"csrc/{file} does not say {before!r}"
        sources[Path(file).name] = text.replace(before, after)
    return _cached("emulated", sources)


@functools.cache
def load_emulated() -> None:
    """Make torch.ops.vadit_emulated available in this process."""
    torch.ops.load_library(str(build_emulated()))

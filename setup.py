"""Builds csrc into vadit/_C.abi3.so and maps kernels/ops to vadit.kernels; everything else is in pyproject.toml.

The extension uses libtorch's stable ABI and no Python API, so one binary serves many versions of both. torch is
needed for its headers alone and is never imported. Where the extension cannot be built the install goes on without
it and says why in one line. VADIT_BUILD=0 skips the build, VADIT_BUILD=require makes a failure an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
BUILD = os.environ.get("VADIT_BUILD", "1")
SOURCES = ["csrc/registration.cpp", "csrc/cpu/rms_norm.cpp", "csrc/cpu/rope.cpp", "csrc/cpu/swiglu.cpp"]
HEADERS = ["csrc/cpu/vec.h"]
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",  # vector loops only: threads come from torch's own pool
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the oldest torch that may load the binary: 2.10
]
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so")


def torch_headers() -> Path:
    """Folder of the installed torch's headers, found without importing torch (which takes seconds)."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise CompileError("torch is not installed here (its headers are needed; use pip's --no-build-isolation)")
    include = Path(spec.submodule_search_locations[0]) / "include"
    if not (include / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise CompileError("this torch has no stable-ABI headers; install torch 2.10 or newer")
    return include


def compiler() -> list[str]:
    """The C++ compiler as a command line."""
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        raise CompileError(f"no C++ compiler: {command[0]} is not on PATH (Debian: apt-get install g++)")
    return command


def run(command: list[str]) -> None:
    """Run a build step; its output is part of the error."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from None
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise CompileError(f"{Path(command[0]).name} failed; its messages are above")


def link_stubs(cxx: list[str], folder: Path) -> list[str]:
    """Empty libraries with torch's names to link against.

    The binary must name both in DT_NEEDED, since Python loads torch without exporting its symbols; the names alone
    are enough, as the real ones are loaded by then. libtorch.so brings the CUDA part into scope where there is one.
    """
    for name in TORCH_LIBRARIES:
        run([*cxx, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{name}", "-o", str(folder / name)])
    return [str(folder / name) for name in TORCH_LIBRARIES]


class BuildExtension(build_ext):
    """Calls the C++ compiler itself: the object is a plain shared library, not a Python module."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (CompileError, OSError) as error:
            if BUILD == "require":
                raise SystemExit(f"vadit: the compiled ops were not built: {error}") from None
            print(f"vadit: installing without the compiled ops: {error}", file=sys.stderr, flush=True)
            raise CompileError(str(error)) from None

    def _build(self, ext: Extension) -> None:
        cxx, include = compiler(), torch_headers()
        temporary = Path(self.build_temp).resolve() / "csrc"
        temporary.mkdir(parents=True, exist_ok=True)
        objects = [temporary / (Path(source).stem + ".o") for source in ext.sources]
        steps = [
            [*cxx, *CXX_FLAGS, f"-I{include}", "-c", source, "-o", str(target)]
            for source, target in zip(ext.sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, steps))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        # --no-as-needed keeps the two names although the stubs resolve nothing; -s drops local symbols.
        libraries = ["-Wl,--no-as-needed", *link_stubs(cxx, temporary), "-Wl,--as-needed", "-s"]
        run([*cxx, "-shared", *map(str, objects), *libraries, "-o", str(partial)])
        os.replace(partial, target)


def packages() -> list[str]:
    """vadit and its subpackages, with vadit.kernels from kernels/ops."""
    return [*find_packages(include=["vadit", "vadit.*"]), "vadit.kernels"]


setup(
    packages=packages(),
    package_dir={"vadit": "vadit", "vadit.kernels": "kernels/ops"},
    ext_modules=[]
    if BUILD == "0"
    else [Extension("vadit._C", SOURCES, depends=HEADERS, py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

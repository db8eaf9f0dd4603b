"""Builds csrc into vadit/_C.abi3.so and maps kernels/ops to vadit.kernels; everything else is in pyproject.toml.

The extension uses libtorch's stable ABI and no Python API, so one binary serves many versions of both. torch is
needed for its headers alone and is never imported. The CUDA kernels are built where there is an nvcc, also on a machine
without a GPU; the CUDA runtime is linked in, so the binary loads where there is no driver.

What cannot be built is left out with one line that says why. Environment variables:
VADIT_BUILD       0 builds nothing; require makes a failure an error.
VADIT_CUDA        0 leaves out the CUDA kernels; require makes their failure an error.
VADIT_CUDA_ARCHS  what they are built for, such as "80 90+PTX"; without it the list below.
CXX, CUDA_HOME    the C++ compiler; the folder of the CUDA toolkit (else nvcc from PATH, else /usr/local/cuda).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
BUILD = os.environ.get("VADIT_BUILD", "1")
CUDA = os.environ.get("VADIT_CUDA", "1")


def files(*patterns: str) -> list[str]:
    """Files below csrc, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


SOURCES = files("*.cpp", "cpu/*.cpp")
CUDA_SOURCES = files("cuda/*.cu", "cuda/*.cpp")
HEADERS = files("*.h", "*/*.h", "*/*.cuh")
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
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
CUDA_ARCHITECTURES = "80 90+PTX 100"
"""A100 and all of 8.x; H100 and H200; B200. The PTX is for other GPUs, whose driver compiles it."""
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so")


def note(message: str) -> None:
    print(f"vadit: {message}", file=sys.stderr, flush=True)


def torch_headers() -> Path:
    """Folder of the installed torch's headers, found without importing torch (which takes seconds)."""
    spec = find_spec("torch")
    found = list(spec.submodule_search_locations or []) if spec else []
    # pip hides the environment from an isolated build, but runs the build with that environment's interpreter.
    found += [f"{sysconfig.get_path(name)}/torch" for name in ("purelib", "platlib")]
    for include in (Path(folder) / "include" for folder in found):
        if (include / "torch" / "csrc" / "stable" / "library.h").is_file():
            return include
    if any(Path(folder).is_dir() for folder in found):
        raise CompileError("this torch has no stable-ABI headers; install torch 2.10 or newer")
    raise CompileError("torch is not installed here (its headers are needed): install it first")


def compiler() -> list[str]:
    """The C++ compiler as a command line."""
    command = os.environ.get("CXX", "c++").split()
    if shutil.which(command[0]) is None:
        raise CompileError(f"no C++ compiler: {command[0]} is not on PATH (Debian: apt-get install g++)")
    return command


def run(command: list[str]) -> str:
    """Run a build step; its output is part of the error."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise CompileError(f"{command[0]}: {error}") from None
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise CompileError(f"{Path(command[0]).name} failed; its messages are above")
    return done.stdout


def cuda_compiler() -> str:
    """nvcc. It may be a wrapper script, so nothing is derived from where it lies."""
    home = os.environ.get("CUDA_HOME")
    for place in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        if found := shutil.which(place):
            return found
    raise CompileError("nvcc is not installed (set CUDA_HOME where it is not on PATH)")


def cuda_targets(nvcc: str) -> list[str]:
    """nvcc's flags for the wanted architectures, less those that this nvcc does not know yet, or no longer."""
    known = run([nvcc, "--list-gpu-arch"]).split()
    flags, dropped = [], []
    for name in os.environ.get("VADIT_CUDA_ARCHS", CUDA_ARCHITECTURES).replace(",", " ").replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "")
        if f"compute_{number.rstrip('af')}" not in known:  # variants such as 90a are not listed
            dropped.append(name)
            continue
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    if dropped:
        note(f"this nvcc cannot build for {', '.join(dropped)}: left out")
    if not flags:
        raise CompileError("no architecture is left to build the CUDA kernels for")
    return flags


def link_stubs(cxx: list[str], folder: Path) -> list[str]:
    """Empty libraries with torch's names to link against.

    The binary must name both in DT_NEEDED, since Python loads torch without exporting its symbols; the names alone
    are enough, as the real ones are loaded by then. libtorch.so brings the CUDA part into scope where there is one.
    """
    for name in TORCH_LIBRARIES:
        run([*cxx, "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,{name}", "-o", str(folder / name)])
    return [str(folder / name) for name in TORCH_LIBRARIES]


class BuildExtension(build_ext):
    """Calls the compilers itself: the object is a plain shared library, not a Python module."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except (CompileError, OSError) as error:
            if BUILD == "require":
                raise SystemExit(f"vadit: the compiled ops were not built: {error}") from None
            note(f"installing without the compiled ops: {error}")
            raise CompileError(str(error)) from None

    def _build(self, ext: Extension) -> None:
        cxx, include = compiler(), torch_headers()
        temporary = Path(self.build_temp).resolve() / "csrc"
        temporary.mkdir(parents=True, exist_ok=True)
        stubs = link_stubs(cxx, temporary)

        def compiled(command: list[str], source: str) -> str:
            target = str(temporary / (source.replace("/", "-") + ".o"))
            run([*command, "-c", source, "-o", target])
            return target

        def cxx_object(source: str) -> str:
            return compiled([*cxx, *CXX_FLAGS, f"-I{include}"], source)

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                nvcc = None if CUDA == "0" else cuda_compiler()
                command = [nvcc, *NVCC_FLAGS, *cuda_targets(nvcc)] if nvcc else []
            except CompileError as error:
                nvcc = None
                self._without_cuda(error)
            # The CUDA sources take longest, so they come first.
            cuda_steps = [
                pool.submit(compiled, command, source) if source.endswith(".cu") else pool.submit(cxx_object, source)
                for source in (CUDA_SOURCES if nvcc else [])
            ]
            objects = list(pool.map(cxx_object, SOURCES))
            # --no-as-needed keeps the two names although the stubs resolve nothing; -s drops local symbols.
            libraries = ["--no-as-needed", *stubs, "--as-needed", "--exclude-libs,ALL", "-s"]
            if nvcc:
                try:
                    cuda_objects = [step.result() for step in cuda_steps]
                    # One list: nvcc would change the order of libraries and other options for the linker.
                    link = [nvcc, "-shared", "-cudart=static", f"-Xlinker={','.join(libraries)}"]
                    run([*link, *objects, *cuda_objects, "-o", str(partial)])
                except CompileError as error:
                    nvcc = None
                    self._without_cuda(error)
            if not nvcc:
                run([*cxx, "-shared", *objects, f"-Wl,{','.join(libraries)}", "-o", str(partial)])
        os.replace(partial, target)

    @staticmethod
    def _without_cuda(error: CompileError) -> None:
        if CUDA == "require":
            raise SystemExit(f"vadit: the CUDA kernels were not built: {error}")
        note(f"building without the CUDA kernels: {error}")


def packages() -> list[str]:
    """vadit and its subpackages, with vadit.kernels from kernels/ops."""
    below = [f"vadit.kernels.{name}" for name in find_packages("kernels/ops")]
    return [*find_packages(include=["vadit", "vadit.*"]), "vadit.kernels", *below]


setup(
    packages=packages(),
    package_dir={"vadit": "vadit", "vadit.kernels": "kernels/ops"},
    package_data={"vadit.report": ["page.css"]},
    ext_modules=[]
    if BUILD == "0"
    else [Extension("vadit._C", SOURCES + CUDA_SOURCES, depends=HEADERS, py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

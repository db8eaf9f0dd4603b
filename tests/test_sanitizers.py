"""The C++ kernels under the address and undefined-behaviour sanitizers: the tests of the ops on a build with both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
COMPILER = f'#!/bin/bash\nexec g++ {SANITIZE} "${{@/#-O3/-O1}}"\n'
"""Without most optimizations, which take most of the time: what the kernels read and write is the same."""


def runtime() -> str:
    """What has to be loaded before Python: the address sanitizer, and the C++ library whose exceptions it watches."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        done = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(Path(done.stdout.strip()))
    if not all(path.is_absolute() for path in paths):
        pytest.skip("this g++ has no address sanitizer")
    return " ".join(str(path.resolve()) for path in paths)


def build(folder: Path) -> Path:
    """csrc/cpu with both sanitizers."""
    compiler = folder / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = os.environ | {"CXX": str(compiler), "VADIT_CUDA": "0", "VADIT_BUILD": "require"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "lib" / "vadit" / "_C.abi3.so"


def run(library: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python and torch keep what they allocate
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "VADIT_LIBRARY": str(library),
        "OMP_NUM_THREADS": "2",
    }
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_ops_are_clean_and_the_sanitizer_watches(tmp_path: Path) -> None:
    asan = runtime()
    library = build(tmp_path)
    tests = [f"tests/test_op_{op}.py" for op in ("rms_norm", "rope", "swiglu", "vf_loss")]
    # the tests of compilation and of schemas run the same kernels, slowly
    chosen = ["-p", "no:cacheprovider", "-k", "cpp and not compiles and not opcheck"]
    done = run(library, "-m", "pytest", "-q", "-x", *chosen, *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout

    # a read behind the end of a buffer, to see that a fault of the kernels would have been seen
    source = tmp_path / "fault.cpp"
    source.write_text('extern "C" int fault(int n) { int* p = new int[n]; int x = p[n]; delete[] p; return x; }\n')
    fault = tmp_path / "fault.so"
    subprocess.run(["g++", *SANITIZE.split(), "-shared", "-fPIC", str(source), "-o", str(fault)], check=True)
    found = run(library, "-c", f"import ctypes; ctypes.CDLL({str(fault)!r}).fault(3)")
    assert found.returncode != 0 and "heap-buffer-overflow" in found.stderr, asan

"""The build of the extension, what its binary depends on, and its kernels under the sanitizers."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import vadit
from vadit.kernels import dispatch

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh")
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no compiler")
LIBRARY = Path(vadit.__file__).with_name("_C.abi3.so")
needs_extension = pytest.mark.skipif(not LIBRARY.is_file(), reason="vadit/_C.abi3.so is not built")


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py build_ext into `folder`."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


@needs_compiler
def test_builds_and_depends_on_nothing_unstable(tmp_path: Path) -> None:
    # An nvcc that is too old for one architecture and then fails: the CPU part is built all the same.
    script(tmp_path / "cuda" / "bin" / "nvcc", 'test "$1" = --list-gpu-arch && echo compute_80 compute_90 || exit 1')
    done = build(tmp_path, VADIT_BUILD="require", CUDA_HOME=str(tmp_path / "cuda"))
    assert done.returncode == 0, done.stderr
    assert "vadit: this nvcc cannot build for 100: left out" in done.stderr
    assert "vadit: building without the CUDA kernels: nvcc failed" in done.stderr
    library = tmp_path / "lib" / "vadit" / "_C.abi3.so"
    needed = dynamic_section(library)
    for name in ("libtorch.so", "libtorch_cpu.so"):
        assert f"[{name}]" in needed
    undefined = undefined_symbols(library)
    assert "aoti_torch_" in undefined
    assert "cuda_stream" not in undefined


def dynamic_section(library: Path) -> str:
    return subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout


def undefined_symbols(library: Path) -> str:
    """Demangled; holds that none is of an interface without a promise of stability."""
    undefined = subprocess.run(["nm", "-DCu", str(library)], capture_output=True, text=True).stdout
    for unstable in ("c10::", "at::", "torch::", " Py", "GOMP"):
        assert unstable not in undefined, undefined
    return undefined


@needs_extension
def test_installed_library_loads_where_there_is_no_driver() -> None:
    needed = dynamic_section(LIBRARY)
    for name in ("libpython", "libgomp", "libc10", "libtorch_python", "libtorch_cuda", "libcuda"):
        assert name not in needed
    # What names the current stream differs between versions of torch, so it is weak.
    strong = [line.split()[1] for line in undefined_symbols(LIBRARY).splitlines() if line.split()[0] == "U"]
    assert [name for name in strong if "cuda" in name] in ([], ["aoti_torch_device_type_cuda"])
    assert "torch_stream_native_handle" not in strong


def toolchain(folder: Path) -> dict[str, str]:
    """Environment with compilers that note what they are asked for and write empty objects at once."""
    listing = "if [ $1 = --list-gpu-arch ]; then echo compute_80 compute_90 compute_100 compute_120; exit; fi\n"
    write = f'echo "$(basename $0) $*" >> {folder}/calls\nfor last; do :; done\n: > "$last"\n'
    script(folder / "bin" / "nvcc", listing + write)
    return {"CXX": str(script(folder / "c++", write)), "CUDA_HOME": str(folder), "VADIT_BUILD": "require"}


def calls(folder: Path) -> list[list[str]]:
    """The compilers' command lines; the first word is the compiler."""
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


def test_every_source_is_compiled_once(tmp_path: Path) -> None:
    done = build(tmp_path, **toolchain(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    compiled = {(call[0], call[call.index("-c") + 1]) for call in calls(tmp_path) if "-c" in call}
    sources = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu"))
    assert compiled == {("nvcc" if p.suffix == ".cu" else "c++", str(p)) for p in sources}
    link = calls(tmp_path)[-1]
    assert link[:3] == ["nvcc", "-shared", "-cudart=static"]
    assert len({word for word in link if word.endswith(".o")}) == len(sources)
    assert (tmp_path / "lib" / "vadit" / "_C.abi3.so").exists()


def test_architectures_can_be_chosen(tmp_path: Path) -> None:
    done = build(tmp_path, **toolchain(tmp_path), VADIT_CUDA_ARCHS="9.0a;120+PTX 130")
    assert done.returncode == 0
    assert done.stderr == "vadit: this nvcc cannot build for 130: left out\n"
    flags = {word for call in calls(tmp_path) for word in call if word.startswith("-gencode")}
    assert flags == {"-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_120,code=[sm_120,compute_120]"}


def test_cuda_can_be_left_out(tmp_path: Path) -> None:
    done = build(tmp_path, **toolchain(tmp_path), VADIT_CUDA="0")
    assert done.returncode == 0 and done.stderr == ""
    assert {call[0] for call in calls(tmp_path)} == {"c++"}
    assert not any("csrc/cuda" in word for call in calls(tmp_path) for word in call)


def test_cuda_can_be_required(tmp_path: Path) -> None:
    environment = toolchain(tmp_path)
    script(tmp_path / "bin" / "nvcc", "exit 1")
    done = build(tmp_path, **environment, VADIT_CUDA="require")
    assert done.returncode != 0 and "vadit: the CUDA kernels were not built: nvcc failed" in done.stderr
    assert not list(tmp_path.rglob("*.abi3.so"))


@pytest.mark.parametrize("how", ["no compiler", "no such flag"])
def test_install_goes_on_without_the_extension(tmp_path: Path, how: str) -> None:
    broken = {"CXX": "/nonexistent/c++" if how == "no compiler" else "c++ --no-such-flag-at-all"}
    done = build(tmp_path, **broken)
    assert done.returncode == 0, done.stderr
    assert "vadit: installing without the compiled ops: " in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    required = build(tmp_path, **broken, VADIT_BUILD="require")
    assert required.returncode != 0 and "vadit: the compiled ops were not built" in required.stderr


def test_build_can_be_skipped(tmp_path: Path) -> None:
    done = build(tmp_path, VADIT_BUILD="0")
    assert done.returncode == 0 and not tmp_path.joinpath("lib").exists()


def test_source_distribution_holds_what_the_build_needs(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist"]
    done = subprocess.run([*command, "--dist-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [p for folder in ("csrc", "kernels/ops") for p in (ROOT / folder).rglob("*") if p.suffix in SUFFIXES]
    assert {str(p.relative_to(ROOT)) for p in wanted} | {"setup.py", "pyproject.toml"} <= held


COMPARE = """
import sys, torch
from vadit.kernels import adamw_ema, gated_norm, rms_norm, rope_qkv, swiglu, vf_loss
from vadit.kernels.testing import results_and_gradients
g = torch.Generator().manual_seed(0)
r = lambda *s: torch.randn(s, generator=g)
cos, sin, features = r(5, 36), r(5, 36), r(2, 19, 37)
vf = lambda z, w: vf_loss(z, w, features, cos_margin=0.5, distmat_margin=0.25)
found = []
for dtype in (torch.float32, torch.bfloat16):
    found += results_and_gradients(rms_norm, [r(3, 7, 45).to(dtype), r(45), r(3, 45), r(3, 45)])
    rows = [r(3, 7, 45).to(dtype), r(3, 7, 45).to(dtype), r(3, 45), r(45), r(45), r(3, 45)]
    found += results_and_gradients(gated_norm, rows)
    found += results_and_gradients(swiglu, [(10 * r(4, 90)).to(dtype)])
    found += results_and_gradients(swiglu, [(10 * r(35, 90)).to(dtype), r(90)])
    packed = lambda t, b, *w: rope_qkv(t, cos, sin, *w, bias=b)[: 2 if b is None else 3]
    found += results_and_gradients(packed, [r(2, 5, 3, 3, 36).to(dtype), None])
    found += results_and_gradients(packed, [r(2, 5, 3, 3, 36).to(dtype), r(324), r(36), r(36)])
    features = features.to(dtype)
    found += results_and_gradients(vf, [r(2, 5, 37), r(19, 5)])
    weights, grads, m, v, average = ([r(5, 9).square(), r(35)] for _ in range(5))
    half = [weight.bfloat16() for weight in weights] if dtype == torch.bfloat16 else []
    adamw_ema(weights, [grad.to(dtype) for grad in grads], m, [each.abs() for each in v], averages=[average],
              rates=(0.1,), copies=half, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=3)
    found += weights + m + average + half
"""


@needs_extension
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(tmp_path: Path, name: str) -> None:
    # one that the processor lacks is ignored: the best of the others runs
    done = python(COMPARE + f"torch.save(found, {str(tmp_path / 'x')!r})", VADIT_CPU_ISA=name, VADIT_KERNELS="cpp")
    assert done.returncode == 0, done.stderr
    scope: dict[str, list[torch.Tensor]] = {}
    with dispatch.setting("cpp"):
        exec(COMPARE, scope)
    for ours, other in zip(scope["found"], torch.load(tmp_path / "x"), strict=True):
        tolerance = 1e-5 if ours.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, other, rtol=tolerance, atol=tolerance)


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
    compiler = tmp_path / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    done = build(tmp_path, CXX=str(compiler), VADIT_CUDA="0", VADIT_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    library = tmp_path / "lib" / "vadit" / "_C.abi3.so"
    tests = [f"tests/test_op_{op}.py" for op in ("gated_norm", "rms_norm", "rope", "swiglu", "vf_loss")]
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

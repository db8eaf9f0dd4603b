"""The build of the extension, what its binary depends on, and the choice of backends."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vadit import kernels
from vadit.kernels import dispatch

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no compiler")
needs_extension = pytest.mark.skipif(not dispatch.CPP_LOADED, reason="vadit/_C.abi3.so is not built")


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py build_ext into `folder`."""
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)


@needs_compiler
def test_builds_and_depends_on_nothing_unstable(tmp_path: Path) -> None:
    done = build(tmp_path, VADIT_BUILD="require")
    assert done.returncode == 0, done.stderr
    library = tmp_path / "lib" / "vadit" / "_C.abi3.so"
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True).stdout
    for name in ("libtorch.so", "libtorch_cpu.so"):
        assert f"[{name}]" in needed
    for name in ("libpython", "libgomp", "libc10", "libtorch_python"):
        assert name not in needed
    undefined = subprocess.run(["nm", "-DCu", str(library)], capture_output=True, text=True).stdout
    assert "aoti_torch_" in undefined
    for unstable in ("c10::", "at::", "torch::", " Py", "GOMP"):
        assert unstable not in undefined, undefined


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


def test_every_op_has_its_files() -> None:
    assert {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} == set(dispatch.CPP_OPS)
    for op in dispatch.OPS:
        assert (ROOT / "kernels" / "ops" / f"{op}.py").is_file()
        assert (ROOT / "tests" / f"test_op_{op}.py").is_file()
        assert op in kernels.__all__
    assert set(dispatch.AUTO_CPP_OPS) <= set(dispatch.CPP_OPS) <= set(dispatch.OPS)


def test_unknown_setting_names_the_variable() -> None:
    program = "import torch, vadit.kernels as k\ntry: k.swiglu(torch.ones(2))\nexcept ValueError as e: print(e)"
    done = python(program, VADIT_KERNELS="turbo")
    assert done.stdout.strip() == "VADIT_KERNELS is 'turbo'; set it to one of auto, reference, cpp", done.stderr
    z = torch.ones(1, 1, 1)
    for op in (kernels.backends, kernels.reasons, lambda: kernels.vf_loss(z, None, z, cos_margin=0, distmat_margin=0)):
        with dispatch.setting("turbo"), pytest.raises(ValueError, match="VADIT_KERNELS"):
            op()


def test_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CPP_LOADED", False)
    monkeypatch.setattr(dispatch, "_missing", "_C.abi3.so is not built")
    with dispatch.setting("auto"):
        assert set(kernels.backends().values()) == {"reference"}
        assert "not built" in kernels.reasons()["rms_norm"]
        assert kernels.swiglu(torch.ones(4)).shape == (2,)
    with dispatch.setting("cpp"), pytest.raises(ValueError, match="VADIT_KERNELS is 'cpp', but _C"):
        kernels.swiglu(torch.ones(4))


@needs_extension
def test_choice_of_backend() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with dispatch.setting("cpp"):
        assert dispatch.takes_cpp("rms_norm", x, weight, None)
        assert not dispatch.takes_cpp("rms_norm", x.bfloat16(), weight)
        assert not dispatch.takes_cpp("rms_norm", x, weight.double())
        assert not dispatch.takes_cpp("rms_norm", x.to("meta"))
        assert not dispatch.takes_cpp("vf_loss", x)
        assert kernels.backends() == {"rms_norm": "cpp", "rope": "cpp", "swiglu": "cpp", "vf_loss": "reference"}
    with dispatch.setting("reference"):
        assert set(kernels.backends().values()) == {"reference"}
    with dispatch.setting("auto"):
        assert {op for op, name in kernels.backends().items() if name == "cpp"} == set(dispatch.AUTO_CPP_OPS)
    assert set(kernels.reasons()) == set(kernels.backends()) == set(dispatch.OPS)


@needs_extension
def test_wrong_call_reads_the_same_from_every_backend() -> None:
    messages = set()
    for name in ("reference", "cpp"):
        with dispatch.setting(name), pytest.raises(ValueError) as error:
            kernels.rms_norm(torch.ones(2, 3, 8), torch.ones(7))
        messages.add(str(error.value))
    assert messages == {"rms_norm: found weight (7,); needed weight (8,) for x (2, 3, 8)"}


@needs_extension
def test_op_called_directly_refuses_what_it_cannot_read() -> None:
    with pytest.raises(RuntimeError, match="width of x"):
        torch.ops.vadit.rms_norm(torch.ones(2, 8), torch.ones(7), None, None, 1e-6)
    with pytest.raises(RuntimeError, match="float32"):
        torch.ops.vadit.swiglu(torch.ones(2, 8).double())


COMPARE = """
import sys, torch
from vadit.kernels import rms_norm, rope, swiglu
from vadit.kernels.testing import results_and_gradients
g = torch.Generator().manual_seed(0)
r = lambda *s: torch.randn(s, generator=g)
cos, sin = r(5, 36), r(5, 36)
found = results_and_gradients(rms_norm, [r(3, 7, 45), r(45), r(3, 45), r(3, 45)])
found += results_and_gradients(swiglu, [10 * r(4, 90)])
found += results_and_gradients(lambda q, k: rope(q, k, cos, sin), [r(2, 3, 5, 36), r(2, 3, 5, 36)])
"""


@needs_extension
def test_both_instruction_sets_agree(tmp_path: Path) -> None:
    done = python(COMPARE + f"torch.save(found, {str(tmp_path / 'x')!r})", VADIT_CPU_BASELINE="1", VADIT_KERNELS="cpp")
    assert done.returncode == 0, done.stderr
    scope: dict[str, list[torch.Tensor]] = {}
    with dispatch.setting("cpp"):
        exec(COMPARE, scope)
    for ours, baseline in zip(scope["found"], torch.load(tmp_path / "x"), strict=True):
        torch.testing.assert_close(ours, baseline, rtol=1e-5, atol=1e-5)

"""Which backend runs: the setting, what each takes, what is there, the self-check, and the rows that justify `auto`."""

import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vadit import kernels
from vadit.kernels import dispatch
from vadit.kernels.self_check import self_check
from vadit.kernels.testing import device

ROOT = Path(__file__).parents[1]
needs_extension = pytest.mark.skipif(
    dispatch.BACKENDS["cpp"].missing is not None, reason="vadit/_C.abi3.so is not built or old"
)


def python(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)


def calls() -> dict[str, object]:
    """A small call of each public op."""
    x, table = torch.ones(2, 3, 8), torch.ones(3, 8)
    q = torch.ones(2, 1, 3, 8)
    weight, adam = [torch.ones(3)], {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    return {
        "adamw_ema": lambda: kernels.adamw_ema(weight, weight, weight, weight, **adam),  # type: ignore[arg-type]
        "gated_norm": lambda: kernels.gated_norm(x, x, torch.ones(2, 8), torch.ones(8)),
        "group_norm_silu": lambda: kernels.group_norm_silu(
            torch.ones(2, 3, 3, 8).permute(0, 3, 1, 2), *torch.ones(2, 8), 2
        ),
        "rms_norm": lambda: kernels.rms_norm(x, torch.ones(8)),
        "rope": lambda: kernels.rope(q, q, table, table),
        "swiglu": lambda: kernels.swiglu(x),
        "vf_loss": lambda: kernels.vf_loss(x, torch.eye(3), x, cos_margin=0, distmat_margin=0),
    }


def test_unknown_setting_names_the_variable() -> None:
    program = "import torch, vadit.kernels as k\ntry: k.swiglu(torch.ones(2))\nexcept ValueError as e: print(e)"
    done = python(program, VADIT_KERNELS="turbo")
    expected = "VADIT_KERNELS is 'turbo'; set it to one of auto, reference, cpp, triton, cuda"
    assert done.stdout.strip() == expected, done.stderr
    for call in (kernels.backends, kernels.reasons, *calls().values()):
        with dispatch.setting("turbo"), pytest.raises(ValueError, match="VADIT_KERNELS"):
            call()


@pytest.mark.parametrize("name", ["cpp", "cuda", "triton"])
def test_missing_backend(monkeypatch, name: str) -> None:
    place = dispatch.BACKENDS[name].device
    for each in {"cuda", "triton"} if place == "cuda" else {name}:
        monkeypatch.setitem(dispatch.BACKENDS, each, dispatch.Backend("vadit", place, "it is not there"))
    monkeypatch.setitem(dispatch.AUTO, place, dict.fromkeys(dispatch.OPS, name))
    with dispatch.setting("auto"):
        assert set(kernels.backends(place).values()) == {"reference"}
        assert set(kernels.reasons(place).values()) == {"it is not there"}
        assert kernels.swiglu(torch.ones(4)).shape == (2,)
    for call in calls().values():
        with dispatch.setting(name), pytest.raises(ValueError, match=f"VADIT_KERNELS is '{name}', but it is not there"):
            call()


def test_on_a_gpu_other_kernels_take_the_place_of_what_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(dispatch.BACKENDS, "cuda", dispatch.Backend("vadit", "cuda", None))
    monkeypatch.setitem(dispatch.BACKENDS, "triton", dispatch.Backend("vadit_triton", "cuda", None))
    monkeypatch.setattr(dispatch, "_distrusted", {})
    with dispatch.setting("auto"):
        assert kernels.backends("cuda") == dispatch.AUTO["cuda"] == dict.fromkeys(dispatch.OPS, "triton")
        dispatch.distrust("rope", "triton", "it is wrong")
        assert kernels.backends("cuda") == dispatch.AUTO["cuda"] | {"rope": "cuda"}
        dispatch.distrust("rope", "cuda", "so is this one")
        assert kernels.backends("cuda")["rope"] == "reference"
        assert "it is wrong" in kernels.reasons("cuda")["rope"]
        monkeypatch.setitem(dispatch.BACKENDS, "triton", dispatch.Backend("vadit_triton", "cuda", "no compiler"))
        assert kernels.backends("cuda")["swiglu"] == "cuda"
    with dispatch.setting("triton"), pytest.raises(ValueError, match="no compiler"):
        kernels.backends("cuda")


@needs_extension
def test_choice_of_backend_is_made_once(monkeypatch) -> None:
    x = torch.ones(2, 8)
    with dispatch.setting("cpp"):
        assert dispatch.kernels_for("rms_norm", x) is dispatch.kernels_for("rms_norm", x.bfloat16()) is torch.ops.vadit
        for other in (x.double(), x.half(), x.to("meta")):
            assert dispatch.kernels_for("rms_norm", other) is None
        assert dispatch.kernels_for("vf_loss", x, x.double()) is None
        assert kernels.backends() == dict.fromkeys(dispatch.OPS, "cpp")
        assert kernels.backends("cuda") == dict.fromkeys(dispatch.OPS, "reference")
        assert kernels.reasons("cuda")["rope"] == "the cpp kernels take cpu tensors only"
    with dispatch.setting("reference"):
        assert set(kernels.backends().values()) == {"reference"}
    with dispatch.setting("auto"):
        assert kernels.backends() == dispatch.AUTO["cpu"]
        assert set(kernels.backends("mps").values()) == {"reference"}
    assert set(kernels.reasons()) == set(kernels.backends()) == set(dispatch.OPS)
    with dispatch.setting("auto"):
        monkeypatch.setattr(dispatch, "_backend_of", lambda *_: pytest.fail("decided again"))
        assert all(dispatch.kernels_for(op, torch.ones(2)) is torch.ops.vadit for op in dispatch.OPS)
        monkeypatch.undo()


def test_exact_takes_plain_torch_and_any_layout() -> None:
    x = torch.ones(2, 8, 3).transpose(1, 2)
    with dispatch.setting("auto"):
        pytest.raises(ValueError, kernels.rms_norm, x, torch.ones(8)).match("contiguous")
        with kernels.exact():
            assert kernels.is_exact() and set(kernels.backends().values()) == {"reference"}
            assert kernels.rms_norm(x, torch.ones(8)).shape == x.shape
        assert not kernels.is_exact()


@needs_extension
def test_schemas_are_the_librarys_and_an_older_one_is_refused(monkeypatch) -> None:
    for op in dispatch.OPS:
        module = sys.modules[f"vadit.kernels.{op}"]
        for name, schema in module.SCHEMAS.items():
            compiled = str(getattr(torch.ops.vadit, name).default._schema).removeprefix("vadit::")
            parsed = str(torch._C.parse_schema(name + schema))
            assert compiled == parsed
    monkeypatch.setattr(dispatch, "NEWEST_OP", "vadit::of_tomorrow")
    assert "older than this source" in (dispatch._load_library() or "")


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("fault", ["wrong", "raises", "nan"])
@needs_extension
def test_self_check_leaves_out_what_is_wrong(monkeypatch, op: str, fault: str) -> None:
    monkeypatch.setattr(dispatch, "_distrusted", {})
    name = {"vf_loss": "vf_distmat"}.get(op, op)

    class Faulty:
        """torch.ops.vadit, one op of which is broken."""

        name = "vadit_faulty"

        def __getattr__(self, attribute: str):
            right = getattr(torch.ops.vadit, attribute)
            if attribute != name:
                return right

            def wrong(*args: object) -> object:
                if fault == "raises":
                    raise RuntimeError("no kernel image\nis available")
                found = right(*args)
                spoil = (lambda t: t * 1.01) if fault == "wrong" else (lambda t: t * torch.nan)
                if found is None:  # the op updates its first tensors in place
                    return [weight.copy_(spoil(weight)) for weight in args[0]]  # type: ignore[attr-defined]
                return spoil(found) if isinstance(found, Tensor) else (spoil(found[0]), *found[1:])

            return wrong

    monkeypatch.setitem(dispatch.BACKENDS, "cpp", dispatch.Backend("vadit_faulty", "cpu", None))
    monkeypatch.setattr(torch.ops, "vadit_faulty", Faulty(), raising=False)
    with dispatch.setting("auto"):
        failures = self_check(torch.device("cpu"))
        assert list(failures) == [op] and failures[op].startswith("cpp failed its self-check (")
        assert kernels.backends() == dispatch.AUTO["cpu"] | {op: "reference"}
        assert "failed its self-check" in kernels.reasons()[op]


@needs_extension
def test_a_kernel_that_breaks_the_device_ends_the_run_by_name(monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    module = sys.modules[self_check.__module__]
    monkeypatch.setattr(module, "_deviation", broken)
    monkeypatch.setattr(module.torch, "zeros", broken)
    with dispatch.setting("auto"), pytest.raises(RuntimeError, match="cpp's gated_norm broke the GPU's context"):
        self_check(torch.device("cpu"))


def test_self_check_passes(backend: str) -> None:
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("its sizes take long in the interpreter; tests/test_op_*.py have smaller ones")
    assert self_check(torch.device(device())) == {}


def newest_medians(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """(op, shape, dtype) to the medians of all of it per contender, from the newest rows of a file."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in csv.DictReader(path.open()):
        if row["part"] in ("forward+backward", "update"):
            found.setdefault((row["op"], row["shape"], row["dtype"]), {})[row["contender"]] = float(row["median_ms"])
    return found


def test_auto_takes_what_the_committed_rows_show_to_be_fastest() -> None:
    ours = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
    files = sorted((ROOT / "benchmarks" / "results").glob("kernels-*.csv"))
    shown = set()
    for path in files:
        medians = newest_medians(path)
        place = "cuda" if "nvidia" in path.name else "cpu"
        for op in dispatch.OPS:
            cases = [times for (row_op, *_), times in medians.items() if row_op == op]
            if not cases:
                continue  # newer than what was measured on that machine
            shown.add(op)
            # "eager" is the reference but for the VF loss, whose naive form is listed under that name
            cases = [{"reference": times["eager"]} | times for times in cases]
            candidates = ("reference", *(name for name in ours[place] if all(name in times for times in cases)))
            # the geometric mean over shapes and dtypes, so that each counts alike
            score = {name: statistics.geometric_mean(times[name] for times in cases) for name in candidates}
            assert dispatch.AUTO[place][op] == min(score, key=score.__getitem__), (path.name, score)
    assert shown == set(dispatch.OPS), "kernels/README.md shows the rows of a file"

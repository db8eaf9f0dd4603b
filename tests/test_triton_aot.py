"""Every Triton kernel that is launched at the models' shapes compiles for three generations of GPUs, without one.

What the launchers would launch is compiled, by a process for each architecture (this file as a script), since the other
tests have Triton interpret its kernels. Registers must not spill, and loads of aligned bfloat16 rows are 128 bits wide.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor

ARCHITECTURES = [80, 90, 100]
WIDTHS = {"XL": (1152, 3072, 16), "L": (1024, 2730, 16), "B": (768, 2048, 12)}
"""LightningDiT: hidden size, hidden width of SwiGLU, heads."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int8: "*i8", torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
STACK_BYTES = {("ones", "vf_loss._distmat", 90): 8, ("XL-bfloat16-norms", "norm._forward", 80): 8}
"""Spills that are accepted: (case, kernel, architecture) -> bytes.

One position is no shape that has to be fast. For rows of XL normed without sum and modulation ptxas keeps two registers
on the stack, in code for sm_80 alone.
"""
Launch = tuple[Any, tuple[Any, ...], dict[str, Any], dict[str, Any]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(run: Callable[[], object]) -> list[Launch]:
    """(kernel, arguments, constants, options) of each launch of `run`, which launches nothing."""
    from vadit.kernels.triton_kernels import common

    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            assert 0 < grid[0] < 2**31
            return self.record

        def record(self, *arguments: Any, **keywords: Any) -> None:
            options = {key: keywords.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
            found.append((self.kernel, arguments, keywords, options))

    launch = common.launch
    common.launch = lambda kernel, *rest, **more: launch(Recorder(kernel), *rest, **more)
    run()
    common.launch = launch
    return found


def compiled(launch: Launch, architecture: int) -> Any:
    """A kernel specialised as by a launch: multiples of 16 are known as such, ones are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, constants, options = launch
    signature, constants, attributes = dict.fromkeys(constants, "constexpr"), dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """What the assembler reserved: REG, STACK, LOCAL, SHARED, ..."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}


def operations(model: str, dtype: torch.dtype, *, norms: bool = False, modulated: bool = True) -> Callable[[], None]:
    """The ops of a transformer block, forward and backward."""

    def run() -> None:
        from vadit.kernels.triton_kernels import rms_norm, rope, swiglu

        (D, hidden, H), B, N = WIDTHS[model], 128, 256
        K = D // H
        x, weight = empty(B, N, D, dtype=dtype), empty(D, dtype=dtype)
        scale, shift, gate = empty(B, 3 * D, dtype=dtype).chunk(3, dim=1)
        modulation = (scale, shift) if modulated else (None, None)
        rms_norm.rms_norm(x, weight, *modulation, False, 1e-6)
        rms_norm.rms_norm_backward(x, x, weight, *modulation, 1e-6)
        residual(x, x, gate, weight, *modulation)
        for bias in (None, empty(2 * hidden)):
            swiglu.swiglu(empty(B, N, 2 * hidden, dtype=dtype), bias)
            swiglu.swiglu_backward(empty(B, N, hidden, dtype=dtype), empty(B, N, 2 * hidden, dtype=dtype), bias)
        q, k, _ = empty(B, N, 3, H, K, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
        gradient = empty(B, N, H, K, dtype=dtype).transpose(1, 2)
        rest = (empty(N, K), empty(N, K), *([empty(K)] * 2 if norms else [None, None]), 1e-6)
        saved = (q, k) if norms else (None, None)
        rope.rope(q, k, *rest)
        for bias in (None, empty(3, H, K)):
            rope.rope_qkv_backward(gradient, gradient, gradient, *saved, bias, *rest)
        rope.rope_qkv(q, k, q, empty(3, H, K), *rest)

    return run


def residual(x: Tensor, h: Tensor, gate: Tensor, weight: Tensor, *modulation: Tensor | None) -> None:
    from vadit.kernels.triton_kernels import gated_norm

    rest = (h, gate, weight, weight, *modulation, 1e-6)
    gated_norm.gated_norm(x, *rest)
    gated_norm.gated_norm_backward(x, h, x, *rest)


def autocast(D: int) -> Callable[[], None]:
    """The norms of a block of which the residual stream and the parameters alone are float32."""

    def run() -> None:
        from vadit.kernels.triton_kernels import rms_norm

        x, h = empty(128, 256, D), empty(128, 256, D, dtype=torch.bfloat16)
        scale, shift, gate = empty(128, 3 * D, dtype=torch.bfloat16).chunk(3, dim=1)
        rms_norm.rms_norm(x, empty(D), scale, shift, True, 1e-6)
        rms_norm.rms_norm_backward(h, x, empty(D), scale, shift, 1e-6)
        residual(x, h, gate, empty(D), scale, shift)

    return run


def float8() -> None:
    """The casts of XL's products, and of a weight in float32."""
    from vadit.kernels.triton_kernels import float8

    D, hidden, _ = WIDTHS["XL"]
    M, bf16 = 128 * 256, torch.bfloat16
    for x in (empty(M, D, dtype=bf16), empty(M, 3 * D, dtype=bf16), empty(2 * hidden, D), empty(D, 2 * hidden)):
        float8.float8_rows(x)
    x12, bias = empty(M, 2 * hidden, dtype=bf16), empty(2 * hidden)
    float8.float8_swiglu(x12, bias)
    float8.float8_swiglu_backward(empty(M, hidden, dtype=bf16), x12, bias)


def vf_loss(B: int, d: int, D: int, N: int, dtype: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        from vadit.kernels.triton_kernels import vf_loss

        vf_loss.vf_gram(empty(B, D, N, dtype=dtype))
        if dtype == torch.float32:
            vf_loss.vf_distmat(empty(B, d, N), empty(B, d, N), empty(B, N, N), 0.25)

    return run


def norms_of_images(dtype: torch.dtype) -> Callable[[], None]:
    """Of the autoencoder: at its widest level with SiLU, at its deepest without."""

    def run() -> None:
        from vadit.kernels.triton_kernels import group_norm_silu as op

        for B, N, C, silu in ((8, 256 * 256, 128, True), (32, 16 * 16, 512, False)):
            x, weight, statistics = empty(B, N, C, dtype=dtype), empty(C), empty(B, 32)
            op.group_norm_silu(x, weight, weight, 32, 1e-6, silu)
            op.group_norm_silu_backward(x, x, weight, weight, statistics, statistics, silu)

    return run


def adamw_ema() -> None:
    from vadit.kernels.triton_kernels import adamw_ema

    weights = [empty(1152, 1152), empty(1152)]
    half = [weight.bfloat16() for weight in weights]
    adamw_ema.adamw_ema(weights, half, weights, weights, weights, half, empty(), [0.1], [0.1] * 7)


def ones() -> None:
    """Numbers that are 1 become constants, which other code in Triton compiles."""
    from vadit.kernels.triton_kernels import group_norm_silu, rms_norm, rope, swiglu

    x, weight, bf16 = empty(1, 1, 6, dtype=torch.bfloat16), empty(6), torch.bfloat16
    rms_norm.rms_norm(x, weight, empty(1, 6), None, False, 1e-6)
    rms_norm.rms_norm_backward(x, x, weight, empty(1, 6), None, 1e-6)
    residual(x, x, empty(1, 6), weight, None, empty(1, 6))
    swiglu.swiglu_backward(empty(1, 1, dtype=bf16), empty(1, 2, dtype=bf16), empty(2))
    q, table = empty(1, 1, 1, 6, dtype=bf16), empty(1, 6)
    rope.rope(q, q, table, table, weight, None, 1e-6)
    rope.rope_backward(q, q, q, None, table, table, weight, None, 1e-6)
    rope.rope_qkv_backward(q, q, q, q, None, empty(3, 1, 6), table, table, weight, None, 1e-6)
    group_norm_silu.group_norm_silu(x, weight, weight, 1, 1e-6, True)
    group_norm_silu.group_norm_silu_backward(x, x, weight, weight, empty(1, 1), empty(1, 1), True)
    vf_loss(1, 1, 1, 1, torch.float32)()


CASES = {
    **{f"{model}-{name}": operations(model, dtype) for model in WIDTHS for name, dtype in DTYPES.items()},
    "XL-bfloat16-norms": operations("XL", torch.bfloat16, norms=True, modulated=False),
    "XL-autocast": autocast(1152),
    "2048-autocast": autocast(2048),
    "vf_loss-bfloat16": vf_loss(32, 32, 1024, 256, torch.bfloat16),
    "vf_loss-float32": vf_loss(32, 32, 1024, 256, torch.float32),
    "images-bfloat16": norms_of_images(torch.bfloat16),
    "images-float32": norms_of_images(torch.float32),
    "adamw_ema": adamw_ema,
    "ones": ones,
    "float8": float8,
}
ONCE = ("ones", "images-float32", "L-float32", "B-float32")
"""Cases for one architecture only: specialisation is no matter of it, and XL stands for the others in float32."""
PAIRS = [(case, sm) for case in CASES for sm in ARCHITECTURES if case not in ONCE or sm == 90]
PAIRS.remove(("float8", 80))  # which has no float8


def check(case: str, architecture: int) -> list[str]:
    """Compile what a case launches; returns a line about each kernel."""
    lines = []
    for launch in launches(CASES[case]):
        name = f"{launch[0].__module__.rsplit('.')[-1]}.{launch[0].__name__}"
        kernel = compiled(launch, architecture)
        used = resources(kernel)
        lines.append(f"{name} sm_{architecture} {used}")
        assert used["STACK"] <= STACK_BYTES.get((case, name, architecture), 0) and used["LOCAL"] == 0, lines[-1]
        if case in ("XL-bfloat16", "B-bfloat16") and not name.endswith(("_finish", "_add_up")):
            loads = re.findall(r"ld\.global\S*", kernel.asm["ptx"])
            narrow = [load for load in loads if not re.search(r"\.v[48]\.b32$", load)]
            assert loads and not narrow, f"{name} sm_{architecture}: {narrow}"
        if case == "adamw_ema":  # but for the last tile of a weight
            assert len(re.findall(r"(?:ld|st)\.global\.v4", kernel.asm["ptx"])) >= 18, f"{name} sm_{architecture}"
    assert lines, "nothing was launched"
    return lines


def main(path: str, architecture: int) -> None:
    """Run an architecture's cases and write {case: [seconds, lines or None, traceback or None]}."""
    outcomes = {}
    for case in (case for case, of in PAIRS if of == architecture):
        start, lines, error = time.perf_counter(), None, None
        try:
            lines = check(case, architecture)
        except Exception:
            error = traceback.format_exc()
        outcomes[case] = [time.perf_counter() - start, lines, error]
    Path(path).write_text(json.dumps(outcomes, indent=1))


@pytest.fixture
def outcomes(tmp_path_factory: pytest.TempPathFactory, architecture: int) -> dict[str, list]:
    """What the compiling process of the test's architecture found, once for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"triton-{architecture}.json"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
            command = [sys.executable, __file__, str(path), str(architecture)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("case", "architecture"), PAIRS)
def test_compiles_without_spills(case: str, outcomes: dict[str, list]) -> None:
    _, lines, error = outcomes[case]
    assert error is None, error
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""The CUDA kernels without a GPU: they compile for every architecture without spilling registers, and, run by the
emulator in tests/simt, they agree with their formulas in float64."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from simt import library
from torch import Tensor

from vadit.kernels.testing import relative_error

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6

emulated = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))


@pytest.fixture
def ops():
    library.load_emulated()
    return torch.ops.vadit_emulated


def nvcc() -> str | None:
    """The compiler, looked for where setup.py looks."""
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else []
    return next(filter(None, map(shutil.which, [*places, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


@pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    command = [str(nvcc()), "-O3", "-std=c++17", "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "x.o")]
    for name in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    entries = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores",
        done.stderr + done.stdout,
        flags=re.DOTALL,
    )
    assert {arch for _, arch, _, _ in entries} == set(ARCHITECTURES)
    assert not [entry for entry in entries if entry[2:] != ("0", "0")]


# --- the emulator itself

KERNEL = """
__global__ void kernel_%s(float* out) {
  __shared__ float slots[64];
  const int i = threadIdx.x;
  %s
}
extern "C" __attribute__((visibility("default"))) const char* %s(float* out) {
  return run(kernel_%s, out);
}
"""
HEAD = """
const char* run(void (*kernel)(float*), float* out) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  static std::string message;
  try {
    cudaLaunchKernelEx(&config, kernel, out);
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
"""
SHIFT = "slots[i] = i; %s out[blockIdx.x * 64 + i] = slots[(i + %d) %% 64];"
PROGRAMS = {
    "forward": SHIFT % ("__syncthreads();", 1),
    "backward": SHIFT % ("__syncthreads();", 63),
    "forward_unguarded": SHIFT % ("", 1),
    "backward_unguarded": SHIFT % ("", 63),
    "not_all": "if (i < 40) __syncthreads();",
    "two_places": "if (i < 32) { __syncthreads(); }\n else { __syncthreads(); }",
    "not_all_lanes": "if (i % 32 < 5) out[i] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);",
    "misaligned": "*reinterpret_cast<float4*>(out + i) = make_float4(1, 2, 3, 4);",
}


def run_program(name: str) -> tuple[str, Tensor]:
    """The error and what the program of two blocks of 64 threads wrote."""
    text = HEAD + "".join(KERNEL % (name, body, name, name) for name, body in PROGRAMS.items())
    run = getattr(ctypes.CDLL(str(library.build_program("programs", text))), name)
    run.restype = ctypes.c_char_p
    out = torch.zeros(2, 64)
    return run(ctypes.c_void_p(out.data_ptr())).decode(), out


@emulated
@pytest.mark.parametrize(("name", "distance"), [("forward", 1), ("backward", 63)])
def test_emulator_shows_a_missing_barrier(name: str, distance: int) -> None:
    error, out = run_program(name)
    assert error == "" and torch.equal(out, torch.arange(64.0).roll(-distance).expand(2, 64))
    error, out = run_program(f"{name}_unguarded")
    assert error == "" and out.isnan().any()


@emulated
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_all", "40 of 64 threads wait at line"),
        ("two_places", "and at line"),
        ("not_all_lanes", "10 of 64 threads wait at line"),
        ("misaligned", "access of 16 bytes"),
    ],
)
def test_emulator_names_what_a_gpu_would_not(name: str, message: str) -> None:
    error, _ = run_program(name)
    assert message in error


# --- the kernels


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """Within the rounding of the result and a few of float32, relative to the largest element."""
    assert found.shape == exact.shape
    rounding = torch.finfo(found.dtype).eps / 2 if found.dtype == torch.bfloat16 else 0.0
    error, allowed = relative_error(found, exact), rounding + factor * 8 * torch.finfo(torch.float32).eps
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def exact_gradients(formula: Callable, inputs: list[Tensor | None], gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Gradients of the formula in float64, one per given input."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    results = formula(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    given = [t for t in leaves if t is not None]
    return list(torch.autograd.grad(results, given, [g.double() for g in gradients]))


def rms_norm_formula(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight
    middle = [1] * (x.ndim - 2)
    y = y if scale is None else y * (1 + scale.view(x.shape[0], *middle, -1))
    return y if shift is None else y + shift.view(x.shape[0], *middle, -1)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modulation", ["none", "scale", "shift", "both"])
@pytest.mark.parametrize(
    "shape",  # the last two: several rows and warps per block
    [(3, 7, 45), (2, 65, 64), (2, 3, 2, 1152), (40, 16), (1, 2, 4104), (2, 1500, 264), (1, 2100, 33)],
    ids=str,
)
def test_rms_norm(ops, shape: tuple[int, ...], modulation: str, dtype: torch.dtype) -> None:
    x, dy = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    weight = 1 + 0.2 * normal(shape[-1], seed=2)
    scale = normal(shape[0], shape[-1], seed=3) if modulation in ("scale", "both") else None
    shift = normal(shape[0], shape[-1], seed=4) if modulation in ("shift", "both") else None
    inputs = [x, weight, scale, shift]
    y = ops.rms_norm(*inputs, EPS)
    assert y.dtype == dtype
    assert_close(y, rms_norm_formula(*(None if t is None else t.double() for t in inputs)))

    modulated = modulation != "none"
    # Both gradients of the modulation come whenever there is one: the missing input is a zero.
    zeros = torch.zeros(shape[0], shape[-1])
    wanted = exact_gradients(
        rms_norm_formula,
        [x, weight, *((zeros if t is None else t) for t in (scale, shift))] if modulated else inputs,
        (dy,),
    )
    found = ops.rms_norm_backward(dy, x, weight, scale, modulated, EPS)
    for f, w in zip(found, wanted, strict=False):
        assert_close(f, w, factor=4)
    if not modulated:
        assert found[2].shape == found[3].shape == (0, shape[-1])
    again = ops.rms_norm_backward(dy, x, weight, scale, modulated, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def misaligned(t: Tensor) -> Tensor:
    """A contiguous copy that starts one element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(ops, dtype: torch.dtype) -> None:
    x, dy, weight = normal(2, 3, 16, dtype=dtype), normal(2, 3, 16, seed=1, dtype=dtype), normal(16, seed=2)
    q, k = normal(2, 3, 5, 8, dtype=dtype), normal(2, 3, 5, 8, seed=1, dtype=dtype)
    cos, sin, u = normal(5, 8, seed=2), normal(5, 8, seed=3), normal(2, 8, 16, seed=4)
    cosines = torch.zeros(2, 16, 16)

    def results(move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tables = move(cos), move(sin), weight[:8], None, EPS
        return [
            ops.rms_norm(move(x), move(weight), None, None, EPS),
            *ops.rms_norm_backward(move(dy), move(x), move(weight), move(weight.expand(2, 16)), True, EPS),
            ops.swiglu(move(x)),
            ops.swiglu_backward(move(dy[..., :8]), move(x)),
            *ops.rope(move(q), move(k), *tables),
            *ops.rope_backward(move(k), move(q), move(q), None, *tables),
            *ops.vf_gram(move(x)),
            *ops.vf_distmat(move(u), move(u), move(cosines), 0.5),
        ]

    for found, expected in zip(results(misaligned), results(lambda t: t.contiguous()), strict=True):
        assert_close(found, expected.double())


def swiglu_formula(x12: Tensor) -> Tensor:
    x1, x2 = x12.chunk(2, -1)
    return torch.nn.functional.silu(x1) * x2


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 90), (2, 5, 16), (7, 2256), (4, 2), (0, 8), (3, 0)], ids=str)
def test_swiglu(ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x12 = 4 * normal(*shape, dtype=dtype)
    if x12.numel():
        x12[0, ..., 0], x12[-1, ..., 0] = 1e4, -1e4
    dy = normal(*shape[:-1], shape[-1] // 2, seed=1, dtype=dtype)
    assert_close(ops.swiglu(x12), swiglu_formula(x12.double()))
    assert_close(ops.swiglu_backward(dy, x12), exact_gradients(swiglu_formula, [x12], (dy,))[0])


def rope_formula(cos: Tensor, sin: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            t = t / torch.sqrt((t * t).mean(-1, keepdim=True) + EPS) * weight
        even, odd = t[..., 0::2], t[..., 1::2]
        c, s = cos.double(), sin.double()
        rotated = [even * c[:, 0::2] - odd * s[:, 0::2], odd * c[:, 1::2] + even * s[:, 1::2]]
        return torch.stack(rotated, -1).flatten(-2)

    def formula(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return rotate(q, q_weight), rotate(k, k_weight)

    return formula


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", ["neither", "both", "queries", "keys"])
@pytest.mark.parametrize(
    "shape",  # (B, H, N, K)
    [(2, 5, 17, 72), (2, 4, 9, 64), (1, 2, 3, 256), (1, 3, 4, 264), (2, 3, 5, 6), (3, 1, 1, 2), (0, 2, 3, 8)],
    ids=str,
)
def test_rope(ops, shape: tuple[int, ...], normed: str, dtype: torch.dtype) -> None:
    batch, heads, tokens, width = shape
    packed = normal(batch, tokens, 3, heads, width, dtype=dtype)
    q, k, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = normal(tokens, width, seed=5), normal(tokens, width, seed=6)
    q_weight = 1 + 0.2 * normal(width, seed=7) if normed in ("both", "queries") else None
    k_weight = 1 + 0.2 * normal(width, seed=8) if normed in ("both", "keys") else None
    formula, weights = rope_formula(cos, sin), (q_weight, k_weight)
    results = ops.rope(q, k, cos, sin, *weights, EPS)
    inputs = [q, k, q_weight, k_weight]
    for found, exact in zip(results, formula(*(None if t is None else t.double() for t in inputs)), strict=True):
        assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
        assert_close(found, exact)

    dq = normal(batch, tokens, heads, width, seed=9, dtype=dtype).transpose(1, 2)  # as attention may give them
    dk = normal(1, 1, 1, width, seed=10, dtype=dtype).expand(shape)
    dv = normal(*shape, seed=11, dtype=dtype)
    wanted = exact_gradients(formula, inputs, (dq, dk))
    kept = (None if q_weight is None else q, None if k_weight is None else k)
    *found, dq_weight, dk_weight = ops.rope_backward(dq, dk, *kept, cos, sin, *weights, EPS)
    dqkv, *packed_weights = ops.rope_qkv_backward(dq, dk, dv, *kept, cos, sin, *weights, EPS)
    for weight, gradient in ((q_weight, dq_weight), (k_weight, dk_weight)):
        assert gradient.shape == (0 if weight is None else width,)
    found += [g for g, w in zip((dq_weight, dk_weight), weights, strict=True) if w is not None]
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w, factor=4)
    assert torch.equal(dqkv, torch.stack([*found[:2], dv]).permute(1, 3, 0, 2, 4))
    assert all(torch.equal(a, b) for a, b in zip(packed_weights, (dq_weight, dk_weight), strict=True))


@emulated
def test_rope_where_a_warp_takes_several_tokens(ops) -> None:
    q, k, dq, dk = (normal(2, 1, 4200, 8, seed=s) for s in range(4))
    tables, weights = (normal(4200, 8, seed=5), normal(4200, 8, seed=6)), (normal(8, seed=7), normal(8, seed=8))
    found = ops.rope_backward(dq, dk, q, k, *tables, *weights, EPS)
    wanted = exact_gradients(rope_formula(*tables), [q, k, *weights], (dq, dk))
    for f, w in zip(found, wanted, strict=True):
        assert_close(f, w, factor=4)
    again = ops.rope_backward(dq, dk, q, k, *tables, *weights, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 11, 7), (2, 100, 64), (1, 1024, 72), (2, 5, 130), (1, 40, 1)], ids=str)
def test_vf_gram(ops, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features = normal(*shape, dtype=dtype) + normal(1, seed=1, dtype=dtype)
    if shape[-1] > 1:
        features[0, :, -1] = 1e-14
    cosines, inverse_norm = ops.vf_gram(features)
    f = features.double()
    squares = f.square().sum(1)
    exact = torch.where(squares > 1e-24, squares.rsqrt(), 0.0)
    f = f * exact[:, None]
    assert_close(inverse_norm, exact)
    assert_close(cosines, f.transpose(1, 2) @ f)
    assert torch.equal(cosines, cosines.transpose(1, 2))
    diagonal = cosines.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, (exact > 0).float(), rtol=0, atol=3e-7)


@emulated
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 32, 128), (1, 16, 130), (3, 64, 12), (1, 1, 1)], ids=str)
def test_vf_distmat(ops, shape: tuple[int, ...]) -> None:
    batch, _, tokens = shape
    u = 0.3 * normal(*shape)
    mixing = normal(shape[1], shape[1], seed=1)
    v = (mixing @ mixing.T) @ u / shape[1]
    cosines = normal(batch, tokens, tokens, seed=2).clamp(-1, 1)
    cosines = (cosines + cosines.transpose(1, 2)) / 2
    loss, sign = ops.vf_distmat(u, v, cosines, 0.25)
    gap = u.double().transpose(1, 2) @ v.double() - cosines
    excess = gap.abs() - 0.25
    assert loss.shape == () and sign.dtype == torch.int8
    assert_close(loss, excess.relu().mean())
    clear = excess.abs() > 1e-5
    assert torch.equal(sign[clear].double(), (gap.sign() * (excess > 0))[clear])
    assert torch.equal(sign, sign.transpose(1, 2))


@emulated
def test_nothing_to_do(ops) -> None:
    loss, sign = ops.vf_distmat(torch.zeros(0, 4, 8), torch.zeros(0, 4, 8), torch.zeros(0, 8, 8), 0.5)
    assert loss.isnan() and sign.shape == (0, 8, 8)
    cosines, inverse_norm = ops.vf_gram(torch.zeros(0, 4, 8))
    assert cosines.shape == (0, 8, 8) and inverse_norm.shape == (0, 8)
    weight = torch.ones(8)
    for x in (torch.zeros(0, 5, 8), torch.zeros(2, 0, 8)):
        scale = torch.ones(x.shape[0], 8)
        assert ops.rms_norm(x, weight, scale, None, EPS).shape == x.shape
        dx, dweight, dscale, dshift = ops.rms_norm_backward(x, x, weight, scale, True, EPS)
        assert dx.shape == x.shape and dscale.shape == dshift.shape == scale.shape
        assert not dweight.any() and not dscale.any() and not dshift.any()


@emulated
def test_a_nan_reaches_the_loss(ops) -> None:
    u = torch.ones(1, 4, 8)
    u[0, 0, 3] = float("nan")
    assert ops.vf_distmat(u, u, torch.zeros(1, 8, 8), 0.5)[0].isnan()


@emulated
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ops: ops.rms_norm(torch.ones(2, 8), torch.ones(7), None, None, EPS), "weight must have 8 elements"),
        (lambda ops: ops.rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(3, 8), None, EPS), "scale must have 16"),
        (lambda ops: ops.swiglu(torch.ones(2, 8).double()), "float32 or bfloat16"),
        (lambda ops: ops.swiglu(torch.ones(2, 7)), "even last axis"),
        (lambda ops: ops.rope(*[torch.ones(1, 1, 2, 4)] * 2, *[torch.ones(3, 4)] * 2, None, None, EPS), "cos must"),
        (lambda ops: ops.vf_gram(torch.ones(2, 8)), "(B, D, N)"),
        (lambda ops: ops.vf_distmat(*[torch.ones(1, 2, 3)] * 2, torch.ones(1, 3, 2), 0.5), "cosines must"),
    ],
)
def test_op_called_directly_refuses_what_it_cannot_read(ops, call: Callable, words: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(words)):
        call(ops)

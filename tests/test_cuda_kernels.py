"""The CUDA kernels without a GPU: they compile for every architecture without spilling registers, and, run by the
emulator in tests/simt, they agree with their formulas in float64."""

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

from vadit.kernels import dispatch, gated_norm, group_norm_silu, rms_norm, rope_qkv, swiglu, vf_loss
from vadit.kernels.gated_norm import gated_norm_reference
from vadit.kernels.group_norm_silu import group_norm_silu_reference
from vadit.kernels.rms_norm import rms_norm_reference
from vadit.kernels.rope import rope_reference
from vadit.kernels.swiglu import swiglu_reference
from vadit.kernels.testing import Op, assert_as_exact_as_torch, results_and_gradients
from vadit.kernels.vf_loss import vf_loss_reference

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


# --- what is special about the kernels; tests/test_op_*.py hold them to their formulas


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
class TestLarge:
    """Sizes at which a warp takes several rows, a block several warps, and sums go through several blocks.

    All of it again is the same to the bit: sums have an order.
    """

    @pytest.mark.parametrize("shape", [(40, 16), (1, 2, 4104), (2, 1500, 264), (1, 2100, 33)], ids=str)
    def test_norms(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        width, images = shape[-1], shape[0]
        scale, shift, gate = (normal(images, width, seed=s) for s in (3, 4, 5))
        inputs = [normal(*shape, dtype=dtype), 1 + 0.2 * normal(width, seed=2), scale, shift]
        check(rms_norm, lambda *t: rms_norm_reference(*t, EPS), inputs)
        check(rms_norm, lambda x, weight: rms_norm_reference(x, weight, None, None, EPS), inputs[:2])

        def residual(x: Tensor, weight: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            h, gate, bias = rest
            return gated_norm(x, h, gate, weight, bias, scale)

        def formula(x: Tensor, weight: Tensor, scale: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            return gated_norm_reference(x, *rest, weight, scale, None, EPS)

        branch = [normal(*shape, seed=6, dtype=dtype), gate, normal(width, seed=7)]
        check(residual, formula, inputs[:3] + branch)

    @pytest.mark.parametrize("shape", [(2, 1, 4200, 8), (1, 2, 3, 256), (1, 3, 4, 264)], ids=str)
    def test_rope(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        B, H, N, K = shape
        cos, sin = normal(N, K, seed=5), normal(N, K, seed=6)
        weights = [1 + 0.2 * normal(K, seed=s) for s in (7, 8)]
        inputs = [normal(B, N, 3, H, K, dtype=dtype), normal(3 * H * K, seed=9), *weights]

        def op(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return rope_qkv(qkv, cos, sin, *weights, bias=bias)

        def formula(qkv: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (qkv + bias.view(3, H, K)).permute(2, 0, 3, 1, 4).unbind(0)
            q, k = rope_reference(q, k, cos.to(weights[0]), sin.to(weights[0]), *weights, 1e-6)
            return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype)

        check(op, formula, inputs)

    @pytest.mark.parametrize("shape", [(4200, 32), (2100, 6), (40, 2080)], ids=str)
    def test_swiglu(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        check(swiglu, swiglu_reference, [normal(*shape, dtype=dtype), normal(shape[-1], seed=2)])

    @pytest.mark.parametrize("shape", [(1, 16, 50, 60), (1, 264, 7, 9)], ids=str)
    def test_group_norm_silu(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        inputs = [normal(*shape, dtype=dtype), normal(shape[1], seed=1), normal(shape[1], seed=2)]

        def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return group_norm_silu(x.contiguous(memory_format=torch.channels_last), weight, bias, 8)

        check(op, lambda *t: group_norm_silu_reference(*t, 8, 1e-6, True), inputs)

    @pytest.mark.parametrize("shape", [(1, 16, 1024, 130), (2, 64, 100, 128)], ids=str)
    def test_vf_loss(self, backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        B, d, D, N = shape
        features = normal(B, D, N, dtype=dtype) + normal(1, seed=1, dtype=dtype)

        def loss(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return vf_loss(z, weight, features, cos_margin=0.5, distmat_margin=0.25)

        def formula(z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return vf_loss_reference(z, weight, features, 0.5, 0.25, None)

        check(loss, formula, [normal(B, d, N, seed=2), normal(D, d, seed=3)])


def check(op: Op, formula: Op, inputs: list[Tensor]) -> None:
    assert_as_exact_as_torch(op, formula, inputs)
    if inputs[0].dtype == torch.bfloat16:
        return  # its sums are those of float32
    once, again = results_and_gradients(op, inputs), results_and_gradients(op, inputs)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


def misaligned(t: Tensor) -> Tensor:
    """A contiguous copy that starts one element after an aligned address."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_tensors(ops, dtype: torch.dtype) -> None:
    x, dy, weight = normal(2, 3, 16, dtype=dtype), normal(2, 3, 16, seed=1, dtype=dtype), normal(16, seed=2)
    q, k = normal(2, 3, 5, 8, dtype=dtype), normal(2, 3, 5, 8, seed=1, dtype=dtype)
    cos, sin, u = normal(5, 8, seed=2), normal(5, 8, seed=3), normal(2, 8, 16, seed=4)
    cosines, bias = torch.zeros(2, 16, 16), normal(3, 3, 8, seed=5)

    def results(move: Callable[[Tensor], Tensor]) -> list[Tensor]:
        tables = move(cos), move(sin), weight[:8], None, EPS
        modulation = move(weight.expand(2, 16))
        weights = modulation, move(weight), move(weight), modulation, modulation
        return [
            ops.rms_norm(move(x), move(weight), None, None, False, EPS),
            *ops.rms_norm_backward(move(dy), move(x), move(weight), move(weight.expand(2, 16)), None, EPS),
            *ops.gated_norm(move(x), move(dy), *weights, EPS),
            *ops.gated_norm_backward(move(dy), move(dy), move(x), move(dy), *weights, EPS),
            ops.swiglu(move(x), move(weight)),
            *ops.swiglu_backward(move(dy[..., :8]), move(x), move(weight)),
            *ops.rope(move(q), move(k), *tables),
            *ops.rope_backward(move(k), move(q), move(q), None, *tables),
            *ops.rope_qkv(move(q), move(k), move(q), move(bias), *tables),
            *ops.rope_qkv_backward(move(k), move(q), move(k), move(q), None, move(bias), *tables),
            *ops.group_norm_silu(move(x), move(weight), move(weight), 2, EPS, True),
            *ops.group_norm_silu_backward(*map(move, (dy, x, weight, weight, u[:, 0, :2], u[:, 0, :2])), True),
            *ops.vf_gram(move(x)),
            *ops.vf_distmat(move(u), move(u), move(cosines), 0.5),
        ]

    for found, expected in zip(results(misaligned), results(lambda t: t.contiguous()), strict=True):
        torch.testing.assert_close(found, expected)


@emulated
@pytest.mark.parametrize("namespace", ["vadit_emulated", "vadit"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ops: ops.rms_norm(torch.ones(2, 8), torch.ones(7), None, None, False, EPS), "weight must have"),
        (lambda ops: ops.rms_norm(*[torch.ones(2, 8)[0]] * 2, torch.ones(3, 8), None, False, EPS), "x must have"),
        (lambda ops: ops.rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(3, 8), None, False, EPS), "scale must"),
        (lambda ops: ops.gated_norm(*[torch.ones(2, 8)] * 3, None, torch.ones(9), None, None, EPS), "weight must have"),
        (lambda ops: ops.swiglu(torch.ones(2, 8).double(), None), "float32 or bfloat16"),
        (lambda ops: ops.swiglu(torch.ones(2, 7), None), "even last axis"),
        (lambda ops: ops.swiglu(torch.ones(2, 8), torch.ones(4)), "bias must have"),
        (lambda ops: ops.rope(*[torch.ones(1, 1, 2, 4)] * 2, *[torch.ones(3, 4)] * 2, None, None, EPS), "cos"),
        (lambda ops: ops.group_norm_silu(torch.ones(2, 3, 8), *torch.ones(2, 8), 3, EPS, True), "groups must divide"),
        (lambda ops: ops.vf_gram(torch.ones(2, 8)), "(B, D, N)"),
        (lambda ops: ops.vf_distmat(*[torch.ones(1, 2, 3)] * 2, torch.ones(1, 3, 2), 0.5), "cosines must"),
    ],
)
def test_op_called_directly_refuses_what_it_cannot_read(ops, call: Callable, words: str, namespace: str) -> None:
    if namespace == "vadit" and (missing := dispatch.BACKENDS["cpp"].missing):
        pytest.skip(missing)
    pytest.raises(RuntimeError, call, getattr(torch.ops, namespace)).match(re.escape(words))

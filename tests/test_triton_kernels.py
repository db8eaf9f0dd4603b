"""The Triton kernels in Triton's interpreter on the CPU, against their formulas in float64.

Triton decides when a kernel is defined whether it will be interpreted, so the cases run in one process of their own
(this file as a script), which writes what went wrong with each; the tests report that. Every tensor lies between two
margins, of NaN around inputs, and results start as NaN: reading or writing out of bounds shows, and so does an element
not written.
The interpreter knows nothing of races and of shared memory.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

EPS = 1e-6
MARGIN = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FENCE = 99
torch_empty = torch.empty
blocks: list[tuple[Tensor, int]] = []
originals: list[tuple[Tensor, Tensor]] = []


def guarded_empty(shape: int | Sequence[int], dtype: torch.dtype, device: object = None) -> Tensor:
    """torch.empty between margins, filled with NaN: what the kernels' results are."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    count = torch.Size(shape).numel()
    flat = torch_empty(count + 2 * MARGIN, dtype=dtype).fill_(FENCE)
    blocks.append((flat, count))
    inner = flat[MARGIN : MARGIN + count]
    return (inner.fill_(float("nan")) if dtype.is_floating_point else inner).view(shape)


def guarded(t: Tensor) -> Tensor:
    """A copy between margins of NaN, with the same strides (those of a dense tensor)."""
    order = sorted(range(t.ndim), key=lambda axis: -t.stride(axis))
    flat = torch_empty(t.numel() + 2 * MARGIN, dtype=t.dtype).fill_(float("nan"))
    copy = flat[MARGIN : MARGIN + t.numel()].view([t.shape[axis] for axis in order]).copy_(t.permute(order))
    originals.append((flat, flat.clone()))
    return copy.permute([order.index(axis) for axis in range(t.ndim)])


def assert_nothing_else_written() -> None:
    for flat, count in blocks:
        assert (flat[:MARGIN] == FENCE).all() and (flat[MARGIN + count :] == FENCE).all(), "written out of bounds"
    for flat, original in originals:
        assert torch.equal(flat.nan_to_num(), original.nan_to_num()), "an input was modified"


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return guarded(torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype))


Formula = Callable[..., tuple[Tensor, ...]]


def evaluate(
    formula: Formula, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor | None]:
    """Results of a formula in one precision, then the gradient of each input."""
    leaves = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in inputs]
    results = formula(*leaves)
    given = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(results, given, [t.to(dtype) for t in cotangents]))
    return [t.detach() for t in results] + [None if t is None else next(gradients) for t in leaves]


def assert_exact(
    found: Sequence[Tensor | None],
    formula: Formula,
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
) -> None:
    """error <= 2 * error of the formula in float32, rounded once, + half a unit in the last place + a few roundings."""
    exact, plain = (evaluate(formula, inputs, cotangents, dtype) for dtype in (torch.float64, torch.float32))
    assert len(found) == len(exact)
    for position, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        if f is None:
            continue
        assert f.shape == e.shape, f"result {position}: {tuple(f.shape)}, not {tuple(e.shape)}"
        if f.numel():
            scale = e.abs().max() if e.any() else 1
            error, torch_error = ((t.double() - e).abs().max() / scale for t in (f, p.to(f.dtype)))
            allowed = 2 * torch_error + torch.finfo(f.dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
            assert error <= allowed, f"result {position}: error {error:.3g}, allowed {allowed:.3g}"


# ------------------------------------------------------------------------------------------------------ RMSNorm


def rms_norm_formula(x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor]:
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight
    tokens = (slice(None),) + (None,) * (x.ndim - 2)
    if scale is not None:
        y = y * (1 + scale[tokens])
    return (y if shift is None else y + shift[tokens],)


def rms_norm(shape: tuple[int, ...], dtype: torch.dtype, modulation: str = "both", magnitude: float = 1.0) -> None:
    from vadit.kernels.triton_kernels import rms_norm as ops

    D, images = shape[-1], shape[0]
    x, dy = guarded(normal(*shape, dtype=dtype) * magnitude), normal(*shape, dtype=dtype, seed=1)
    if modulation == "strided":  # gradients of a sum have strides of 0
        x, dy = normal(*shape[:-1], 2 * D, dtype=dtype)[..., :D], guarded(dy[..., :1]).expand(shape)
    weight, scale, shift = normal(D, seed=2), normal(images, D, seed=3), normal(images, D, seed=4)
    scale = scale if modulation in ("scale", "both") else None
    shift = shift if modulation in ("shift", "both") else None
    modulated = scale is not None or shift is not None
    y = ops.rms_norm(x, weight, scale, shift, EPS)
    dx, dweight, dscale, dshift = ops.rms_norm_backward(dy, x, weight, scale, modulated, EPS)
    assert dscale.shape == dshift.shape == ((images, D) if modulated else (0, D))
    assert y.dtype == dx.dtype == dtype and {t.dtype for t in (dweight, dscale, dshift)} == {torch.float32}
    if modulated:  # where only one of the two is given, the other's gradient is that at 0
        scale, shift = (torch.zeros(images, D) if t is None else t for t in (scale, shift))
    else:
        dscale = dshift = None
    assert_exact((y, dx, dweight, dscale, dshift), rms_norm_formula, (x, weight, scale, shift), (dy,))


def rms_norm_zeros(dtype: torch.dtype) -> None:
    from vadit.kernels.triton_kernels import rms_norm as ops

    x, weight = guarded(torch.zeros(2, 5, 24, dtype=dtype)), normal(24)
    assert not ops.rms_norm(x, weight, None, None, EPS).any()
    dx, dweight, *_ = ops.rms_norm_backward(x, x, weight, None, False, EPS)
    assert not dx.any() and not dweight.any()


def rms_norm_empty() -> None:
    from vadit.kernels.triton_kernels import rms_norm as ops

    for shape in ((0, 16, 24), (2, 0, 24)):
        x, weight, scale = torch.zeros(shape), torch.ones(24), torch.ones(shape[0], 24)
        assert ops.rms_norm(x, weight, scale, scale, EPS).shape == shape
        dx, *sums = ops.rms_norm_backward(x, x, weight, scale, True, EPS)
        assert dx.shape == shape and [t.shape for t in sums] == [(24,), scale.shape, scale.shape]
        assert not any(t.any() for t in sums)


# ------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu_formula(x12: Tensor) -> tuple[Tensor]:
    x1, x2 = x12.chunk(2, dim=-1)
    return (x1 / (1 + torch.exp(-x1.clamp(min=-80))) * x2,)


def swiglu(shape: tuple[int, ...], dtype: torch.dtype, magnitude: float = 1.0, strided: bool = False) -> None:
    from vadit.kernels.triton_kernels import swiglu as ops

    *rows, width = shape
    x12 = guarded(normal(*rows, 2 * width, dtype=dtype) * magnitude)
    dy = normal(*rows, width, dtype=dtype, seed=1)
    if strided:
        x12 = normal(*rows, 3 * width, dtype=dtype)[..., : 2 * width]
        dy = guarded(dy[..., :1]).expand(*rows, width)
    y, dx12 = ops.swiglu(x12), ops.swiglu_backward(dy, x12)
    assert y.dtype == dx12.dtype == dtype
    assert_exact((y, dx12), swiglu_formula, (x12,), (dy,))


def swiglu_empty() -> None:
    from vadit.kernels.triton_kernels import swiglu as ops

    x12 = torch.zeros(0, 3, 16)
    assert ops.swiglu(x12).shape == (0, 3, 8) and ops.swiglu_backward(x12[..., :8], x12).shape == x12.shape


# --------------------------------------------------------------------------------------------------------- RoPE


def rope_formula(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    def rotate(t: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            t = t / torch.sqrt((t * t).mean(-1, keepdim=True) + EPS) * weight
        partner = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)
        return t * cos + partner * sin

    return rotate(q, q_weight), rotate(k, k_weight)


def gradient_views(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    B, H, N, K = shape
    if layout == "expanded":
        return normal(B, 1, N, 1, dtype=dtype, seed=seed).expand(shape)
    if layout == "heads first":
        return normal(B, H, N, K, dtype=dtype, seed=seed)
    if layout == "last axis strided":
        return normal(B, H, K, N, dtype=dtype, seed=seed).transpose(2, 3)
    return normal(B, N, H, K, dtype=dtype, seed=seed).transpose(1, 2)


def rope(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    norms: str = "",
    layout: str = "tokens first",
    magnitude: float = 1.0,
    programs: int = 512,
) -> None:
    from vadit.kernels.triton_kernels import common
    from vadit.kernels.triton_kernels import rope as ops

    B, H, N, K = shape
    qkv = guarded(normal(B, N, 3, H, K, dtype=dtype) * magnitude)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    # Tables that are no rotation: the two of a pair differ.
    cos, sin = normal(N, K, seed=1), normal(N, K, seed=2)
    q_weight = normal(K, seed=3) if "q" in norms else None
    k_weight = normal(K, seed=4) if "k" in norms else None
    dq, dk, dv = (gradient_views(shape, layout, dtype, seed) for seed in (5, 6, 7))
    before, common.PROGRAMS = common.PROGRAMS, programs
    results = ops.rope(q, k, cos, sin, q_weight, k_weight, EPS)
    saved = (q if "q" in norms else None, k if "k" in norms else None)
    *gradients, dq_weight, dk_weight = ops.rope_backward(dq, dk, *saved, cos, sin, q_weight, k_weight, EPS)
    dqkv, *dweights = ops.rope_qkv_backward(dq, dk, dv, *saved, cos, sin, q_weight, k_weight, EPS)
    common.PROGRAMS = before
    for t in (*results, *gradients):
        assert t.dtype == dtype and t.shape == shape and t.stride() == (N * H * K, K, H * K, 1)
    assert dqkv.dtype == dtype and dqkv.is_contiguous() and dqkv.shape == qkv.shape
    packed = dqkv.permute(2, 0, 3, 1, 4)
    assert torch.equal(packed[2], dv) and all(map(torch.equal, packed[:2], gradients))
    for one, other, weight in zip((dq_weight, dk_weight), dweights, (q_weight, k_weight), strict=True):
        assert one.dtype == torch.float32 and one.shape == ((0,) if weight is None else (K,))
        assert torch.equal(one, other)
    dq_weight, dk_weight = (None if not t.numel() else t for t in (dq_weight, dk_weight))
    found = (*results, *gradients, None, None, dq_weight, dk_weight)
    assert_exact(found, rope_formula, (q, k, cos, sin, q_weight, k_weight), (dq, dk))


def rope_empty() -> None:
    from vadit.kernels.triton_kernels import rope as ops

    for B, H, N, K in ((0, 2, 3, 4), (2, 3, 0, 4)):
        q, table, weight = torch.zeros(B, H, N, K), torch.zeros(N, K), torch.ones(K)
        assert ops.rope(q, q, table, table, None, weight, EPS)[1].shape == q.shape
        dqkv, dq_weight, dk_weight = ops.rope_qkv_backward(q, q, q, None, q, table, table, None, weight, EPS)
        assert dqkv.shape == (B, N, 3, H, K) and dq_weight.shape == (0,) and torch.equal(dk_weight, torch.zeros(K))


# ------------------------------------------------------------------------------------------------------ VF loss


def gram_formula(features: Tensor) -> tuple[Tensor, Tensor]:
    squared_norm = features.square().sum(1)
    inverse = torch.where(squared_norm > 1e-24, squared_norm.clamp(min=1e-24).rsqrt(), 0.0)
    unit = features * inverse[:, None]
    return unit.transpose(1, 2) @ unit, inverse


def vf_gram(B: int, D: int, N: int, dtype: torch.dtype, magnitude: float = 1.0) -> None:
    from vadit.kernels.triton_kernels import vf_loss as ops

    features = normal(B, D, N, dtype=dtype) * magnitude
    features[0, :, 1] = 0
    features[0, :, 2] = 1e-14
    features = guarded(features)
    cosines, inverse_norm = ops.vf_gram(features)
    assert cosines.dtype == inverse_norm.dtype == torch.float32
    zeros = [torch.zeros(B, N, N), torch.zeros(B, N)]
    assert_exact((cosines, inverse_norm, None), gram_formula, (features,), zeros)
    assert torch.equal(cosines, cosines.transpose(1, 2)), "not symmetric"
    diagonal = torch.where(inverse_norm > 0, 1.0, 0.0)
    assert (cosines.diagonal(dim1=1, dim2=2) - diagonal).abs().max() <= 4 * torch.finfo(torch.float32).eps
    assert not inverse_norm[0, 1:3].any() and inverse_norm.count_nonzero() == B * N - 2


def vf_distmat(B: int, d: int, N: int, margin: float = 0.25) -> None:
    from vadit.kernels.triton_kernels import vf_loss as ops

    def formula(u: Tensor, v: Tensor, cosines: Tensor) -> tuple[Tensor]:
        return (torch.relu((u.transpose(1, 2) @ v - cosines).abs() - margin).mean(),)

    u, A = normal(B, d, N) / d**0.5, normal(d, d)
    u, v = guarded(u), guarded((A + A.T) @ u / d**0.5)
    cosines = normal(B, N, N)
    cosines = guarded((cosines + cosines.transpose(1, 2)) / 4)
    loss, sign = ops.vf_distmat(u, v, cosines, margin)
    assert loss.shape == () and loss.dtype == torch.float32 and sign.dtype == torch.int8
    assert_exact((loss, None, None, None), formula, (u, v, cosines), (torch.zeros(()),))
    assert torch.equal(sign, sign.transpose(1, 2)), "not symmetric"
    gap = u.double().transpose(1, 2) @ v.double() - cosines.double()
    wrong = sign != torch.where(gap.abs() > margin, gap.sign(), 0.0)
    near = (gap.abs() - margin).abs() < 1e-5 * (1 + gap.abs().max())
    assert not (wrong & ~near).any() and near.sum() <= 0.01 * near.numel() + 2


def vf_special_values() -> None:
    from vadit.kernels.triton_kernels import vf_loss as ops

    u, cosines = normal(1, 3, 5), torch.zeros(1, 5, 5)
    cosines[0, 1, 2] = float("nan")
    assert ops.vf_distmat(u, u, cosines, 0.25)[0].isnan(), "a NaN was lost"
    loss, sign = ops.vf_distmat(torch.zeros(0, 3, 5), torch.zeros(0, 3, 5), torch.zeros(0, 5, 5), 0.25)
    assert loss.isnan() and sign.shape == (0, 5, 5)
    for B, D, N in ((0, 4, 5), (2, 0, 5)):
        cosines, inverse_norm = ops.vf_gram(torch.zeros(B, D, N))
        assert cosines.shape == (B, N, N) and inverse_norm.shape == (B, N)
        assert not cosines.any() and not inverse_norm.any()


# -------------------------------------------------------------------------------------------------------- cases


def cases() -> Iterator[tuple[str, Callable[..., None], dict[str, object]]]:
    """(name, function, arguments); those with a shape run in both dtypes."""
    modulations = ["none", "scale", "shift", "both"]
    for shape in [(2, 3, 1152), (1, 21, 760), (2, 40, 72), (3, 7, 9)]:
        for modulation in modulations if shape[-1] in (9, 1152) else ["both"]:
            yield "rms_norm", rms_norm, {"shape": shape, "modulation": modulation}
    for shape, modulation in [((5, 64), "both"), ((2, 3, 4, 24), "both"), ((2, 3, 5000), "none"), ((1, 1, 3), "scale")]:
        yield "rms_norm", rms_norm, {"shape": shape, "modulation": modulation}
    yield "rms_norm", rms_norm, {"shape": (24,), "modulation": "none"}
    yield "rms_norm", rms_norm, {"shape": (2, 5, 40), "modulation": "strided"}
    yield "rms_norm", rms_norm, {"shape": (2, 5, 40), "magnitude": 1e4}
    yield "swiglu_empty", swiglu_empty, {}
    yield "rms_norm_empty", rms_norm_empty, {}
    yield "rope_empty", rope_empty, {}
    yield "vf_special_values", vf_special_values, {}
    for name, dtype in DTYPES.items():
        yield f"rms_norm_zeros-{name}", rms_norm_zeros, {"dtype": dtype}
    for shape in [(3, 1128), (2, 3, 3072), (2, 2730), (70, 9), (4,)]:
        yield "swiglu", swiglu, {"shape": shape}
    yield "swiglu", swiglu, {"shape": (3, 40), "magnitude": 1e4}
    yield "swiglu", swiglu, {"shape": (3, 40), "magnitude": 0.0}
    yield "swiglu", swiglu, {"shape": (3, 40), "strided": True}
    for shape in [(2, 3, 7, 64), (1, 16, 5, 72), (3, 5, 3, 2), (1, 1, 1, 6)]:
        for norms in ["", "qk"]:
            yield "rope", rope, {"shape": shape, "norms": norms}
    yield "rope", rope, {"shape": (2, 3, 40, 64), "norms": "qk", "programs": 2}
    yield "rope", rope, {"shape": (2, 3, 5, 72), "norms": "k"}
    yield "rope", rope, {"shape": (2, 3, 5, 72), "norms": "qk", "magnitude": 1e4}
    yield "rope", rope, {"shape": (2, 3, 5, 72), "norms": "qk", "magnitude": 0.0}
    for layout in ["expanded", "heads first", "last axis strided"]:
        yield "rope", rope, {"shape": (2, 3, 5, 8), "norms": "k", "layout": layout}
    for B, D, N in [(2, 11, 7), (1, 5, 255), (2, 130, 70), (1, 64, 64)]:
        for name, dtype in DTYPES.items():
            yield f"vf_gram-{B}x{D}x{N}-{name}", vf_gram, {"B": B, "D": D, "N": N, "dtype": dtype}
    yield "vf_gram-1e4", vf_gram, {"B": 1, "D": 20, "N": 9, "dtype": torch.bfloat16, "magnitude": 1e4}
    for B, d, N in [(2, 5, 7), (2, 32, 70), (1, 40, 255), (1, 11, 64)]:
        yield f"vf_distmat-{B}x{d}x{N}", vf_distmat, {"B": B, "d": d, "N": N}
    yield "vf_distmat-no-margin", vf_distmat, {"B": 1, "d": 5, "N": 7, "margin": 0.0}


def named_cases() -> dict[str, tuple[Callable[..., None], dict[str, object]]]:
    named = {}
    for name, function, arguments in cases():
        if "shape" not in arguments:
            named[name] = function, arguments
            continue
        words = ["x".join(map(str, v)) if k == "shape" else str(v) for k, v in arguments.items() if v != ""]
        for dtype_name, dtype in DTYPES.items():
            named["-".join([name, *words, dtype_name])] = function, arguments | {"dtype": dtype}
    return named


def round_as_a_gpu_does() -> None:
    """The interpreter cuts bits off where a GPU rounds to the nearest bfloat16."""
    from triton.runtime import interpreter

    cut_off = interpreter._convert_float

    def convert(data, from_dtype, to_dtype, mode):  # numpy arrays, bfloat16 as its bits
        if (from_dtype.name, to_dtype.name) == ("fp32", "bf16"):
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()
        return cut_off(data, from_dtype, to_dtype, mode)

    interpreter._convert_float = convert


def main(path: str) -> None:
    """Run all cases and write {name: [seconds, traceback or None]}."""
    torch.set_num_threads(1)
    torch.empty = guarded_empty
    round_as_a_gpu_does()
    outcomes = {}
    for name, (function, arguments) in named_cases().items():
        blocks.clear()
        originals.clear()
        start, error = time.perf_counter(), None
        try:
            function(**arguments)
            assert_nothing_else_written()
        except Exception:
            error = traceback.format_exc()
        outcomes[name] = [time.perf_counter() - start, error]
    Path(path).write_text(json.dumps(outcomes))


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What the interpreting process found."""
    import own_process

    return own_process.outcomes(__file__, tmp_path_factory, {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", named_cases())
def test_in_the_interpreter(name: str, outcomes: dict[str, list]) -> None:
    _, error = outcomes[name]
    assert error is None, error


if __name__ == "__main__":
    main(sys.argv[1])

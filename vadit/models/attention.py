"""Scaled dot-product attention of the generator: torch's own choice of kernel, or one that was tried out at start-up.

Nothing is guessed from a version or a GPU's name: a kernel is taken where it has computed a small attention of the
run's head width forward and backward, and agrees with plain fp32 arithmetic. Candidates are torch's kernels (cuDNN,
flash, memory-efficient, math) and the flash-attn package, version 2 (`flash_attn`) and 3 (`flash_attn_interface`).

Shapes: B batch, H heads, N tokens, K head width.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vadit.runtime.choices import Choice
from vadit.runtime.errors import first_line

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v to their attention, all (B, H, N, K)

SETTING = "engine.attention"
TORCH = "torch"  # name of torch's own choice among its kernels: what runs on a CPU and in fp32

_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_FLASH_ATTN = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}  # modules of the package

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Largest relative error (2-norm) of output and gradient. Kernels round probabilities and outputs to the dtype (2^-8 in
bf16) and may take TF32 (2^-11) in fp32; a wrong layout, scale or mask is off by the size of the result."""


def torch_attention(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v by the kernel that torch finds best."""
    return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)


def named(name: str) -> Attend:
    """The attention called `name`; ImportError where its package is not there."""
    if name == TORCH:
        return torch_attention
    return _by_torch(_KERNELS[name]) if name in _KERNELS else _by_flash_attn(_FLASH_ATTN[name])


def _by_torch(kernel: SDPBackend) -> Attend:
    def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)

    return attend


def _by_flash_attn(module: str) -> Attend:
    function: Callable[..., Any] = importlib.import_module(module).flash_attn_func
    deterministic = torch.are_deterministic_algorithms_enabled()  # the package does not ask torch itself

    def attend(q_BHNK: Tensor, k_BHNK: Tensor, v_BHNK: Tensor) -> Tensor:
        # It wants (B, N, H, K), any strides before the last: views of what the model has, and no copy.
        out = function(
            q_BHNK.transpose(1, 2), k_BHNK.transpose(1, 2), v_BHNK.transpose(1, 2), deterministic=deterministic
        )
        # Early releases of version 3 return the log-sum-exp, too.
        out_BNHK: Tensor = out[0] if isinstance(out, tuple) else out
        return out_BNHK.transpose(1, 2)

    return attend


def choose(requested: str, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """What computes attention of this width and dtype here: what was asked for where it works, else what auto takes."""
    if requested == "auto":
        return _automatic(head_dim, dtype, device)
    fault = try_out(requested, head_dim=head_dim, dtype=dtype, device=device)
    if fault is None:
        return Choice(SETTING, requested, "asked for")
    found = _automatic(head_dim, dtype, device)
    return Choice(SETTING, found.name, found.reason, refused=f"{requested} cannot be had here ({fault})")


def _automatic(head_dim: int, dtype: torch.dtype, device: torch.device) -> Choice:
    if device.type != "cuda":
        return Choice(SETTING, TORCH, "torch's own choice on a CPU")
    if dtype == torch.float32:
        return Choice(SETTING, TORCH, "torch's own choice: the half-precision kernels do not take fp32")
    order, reason = preference(head_dim, torch.cuda.get_device_capability(device))
    faults: list[str] = []
    for name in order:
        fault = try_out(name, head_dim=head_dim, dtype=dtype, device=device)
        if fault is None:
            return Choice(SETTING, name, "; ".join([reason, *faults]))
        faults.append(f"not {name}: {fault}")
    return Choice(SETTING, TORCH, "; ".join([reason, *faults]))


def preference(head_dim: int, capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """Kernels for bf16 on a GPU of this capability, best first, and why: an order by reasoning, not yet measured here.

    At 256 tokens version 3 of flash-attn pads head width 72 to 96 and, with tiles of 192 x 144, the tokens to 384 x
    288: 2.25 times the work; at 64 and 128 there is no padding of the width. Version 2, and torch's flash kernel, which
    descends from it, pad 72 to 96 as well (1.33), and their tiles divide 256. cuDNN takes every multiple of 8; others
    report it ahead of torch's flash kernel on Hopper, and behind it on Ampere and Blackwell.
    """
    if head_dim % 8:
        return (), "torch's own choice: a head width that is no multiple of 8 is copied into one by the others"
    if capability[0] != 9:
        return ("flash_attn_2", "flash", "cudnn", "efficient"), "flash kernels first, by reasoning (not Hopper)"
    if head_dim in (64, 128):
        order = ("flash_attn_3", "cudnn", "flash_attn_2", "flash", "efficient")
        return order, "flash-attn 3 first, by reasoning (Hopper, a head width without padding)"
    order = ("cudnn", "flash_attn_2", "flash", "flash_attn_3", "efficient")
    return order, "cuDNN first, by reasoning (Hopper, a head width that flash-attn pads)"


def try_out(name: str, *, head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Run a small attention forward and backward and compare it with fp32; what is wrong, or None."""
    if name in _FLASH_ATTN and (device.type != "cuda" or dtype == torch.float32):
        return "flash-attn computes in bf16 on a GPU"
    if name in _FLASH_ATTN and head_dim % 8:
        return f"flash-attn copies a head width of {head_dim}, no multiple of 8"
    generator = torch.Generator().manual_seed(0)  # one of its own: trying must not move the run's random numbers
    # Laid out as the linear layer before it leaves them; 144 tokens: more than a tile, and not whole ones.
    packed = torch.randn(2, 144, 3, 2, head_dim, generator=generator).to(device, dtype)
    wanted = torch.randn(2, 2, 144, head_dim, generator=generator).to(device, dtype)
    with warnings.catch_warnings(record=True) as caught:  # torch's kernels say by warnings why they will not run
        warnings.simplefilter("always")
        try:
            found = _run(named(name), packed, wanted)
        except Exception as error:  # whatever a missing package or an unfit kernel raises
            warned = [str(warning.message).split("(Triggered")[0].strip(" .") for warning in caught]
            warned = [text for text in warned if "not used because" not in text and "runtime disabled" not in text]
            return "; ".join([first_line(error).rstrip("."), *warned])
    expected = _run(named("math"), packed.float(), wanted.float())
    for what, value, reference in zip(("output", "gradient"), found, expected, strict=True):
        off = ((value.float() - reference).norm() / reference.norm()).item()
        if not off <= TOLERANCE[dtype]:  # NaN, too
            return f"its {what} is off by {off:.1e}, allowed are {TOLERANCE[dtype]:.0e}"
    return None


def _run(attend: Attend, packed_BN3HK: Tensor, wanted_BHNK: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient of its product with `wanted_BHNK` in q, k and v."""
    leaf = packed_BN3HK.detach().requires_grad_()
    with torch.enable_grad():
        out_BHNK = attend(*leaf.permute(2, 0, 3, 1, 4).unbind(0))
        (gradient,) = torch.autograd.grad(out_BHNK, leaf, wanted_BHNK)
    return out_BHNK.detach(), gradient

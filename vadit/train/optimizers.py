"""AdamW by whoever has it: torch, DeepSpeed, apex, or torchao with moments of 8 bits.

Each is tried at start-up (built, and one step on a small tensor of the run's device). Where that fails, torch's AdamW
takes its place and one line says why. The state of one kind is of no use to another: a checkpoint records which kind
wrote it, and a resumed run that would end up with another one is refused (`vadit.train.checkpoint.checkpoints`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vadit.config import OptimizerSpec
from vadit.runtime import distributed
from vadit.runtime.choices import Choice, quiet_torchao
from vadit.runtime.errors import UsageError, first_line

SETTING = "optimizer.kind"
TORCH = "adamw"
BLOCK = 256
"""Numbers that share a scale in an 8-bit moment (Dettmers et al. 2022)."""
SMALLEST = 4096
"""Weights with fewer numbers keep fp32 moments, as in bitsandbytes."""

MUON = "muon"

Builder = Callable[..., torch.optim.Optimizer]


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for matrices, torch's AdamW for everything else.

    Muon's step is scaled to AdamW's typical size (0.2 sqrt(longer side), Liu et al. 2025): one rate serves both.
    The two share this optimizer's groups and state: schedules and checkpoints see one optimizer.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self._muon = torch.optim.Muon(
            matrices, lr=lr, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.defaults = self._adamw.defaults
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], self.defaults)
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adamw, self.param_groups[1:])):
            part.param_groups = groups
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        assert closure is None, "the engine computes gradients before it steps"
        self._muon.step()
        self._adamw.step()


def build(
    weights: list[torch.nn.Parameter],
    spec: OptimizerSpec,
    *,
    device: torch.device,
    deepspeed_fused: Callable[[], Builder],
    matrices: Iterable[torch.nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, Choice]:
    """AdamW over `weights`, and whose; `deepspeed_fused` imports DeepSpeed's. Collective.

    torch's is its fused one, on a CPU as well (offloaded states): one pass over the memory instead of a dozen.
    `matrices`: those of the weights that Muon takes where it is asked for.
    """
    if spec.kind == MUON:
        chosen = {id(weight) for weight in matrices}
        hidden = [weight for weight in weights if id(weight) in chosen]
        others = [weight for weight in weights if id(weight) not in chosen]
        if not hidden:
            raise UsageError("optimizer.kind muon is for a generator's blocks, and there are none; set it to adamw")
        return MuonWithAdamW(hidden, others, **_settings(spec)), Choice(SETTING, MUON, "asked for")
    choice = Choice(SETTING, TORCH, "the default" if spec.kind == TORCH else "asked for")
    make: Builder = functools.partial(torch.optim.AdamW, fused=True)
    if spec.kind != TORCH:
        sources = {"deepspeed_fused": deepspeed_fused, "apex_fused": _apex, "adamw_8bit": eight_bit_adamw}
        found, fault = _try_out(sources[spec.kind], spec, device)
        # Processes shard one optimizer among them: all must have the same.
        if distributed.any_rank(fault is not None, device):
            why = fault or "another process lacks it"
            choice = Choice(SETTING, TORCH, "what is always there", refused=f"{spec.kind} cannot be had here ({why})")
        elif found is not None:
            make, choice = found, Choice(SETTING, spec.kind, "asked for")
    return make(weights, **_settings(spec)), choice


def _settings(spec: OptimizerSpec) -> dict[str, Any]:
    return {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}


def _try_out(
    source: Callable[[], Builder], spec: OptimizerSpec, device: torch.device
) -> tuple[Builder | None, str | None]:
    """What `source` imports, or why it does not work on this device."""
    try:
        builder = source()
        generator = torch.Generator().manual_seed(0)  # one of its own: trying must not move the run's random numbers
        start = torch.randn(SMALLEST + 1, generator=generator)
        weight = torch.nn.Parameter(start.to(device, copy=True))
        weight.grad = torch.randn(SMALLEST + 1, generator=generator).to(device)
        builder([weight], **{**_settings(spec), "lr": 0.1, "weight_decay": 0.0}).step()
        moved = weight.detach().cpu() - start
    except Exception as error:  # whatever a missing package, compiler or GPU raises
        return None, first_line(error)
    # The first step of Adam has the size of the rate, whatever the gradient (eps aside); 8 bits change it little.
    size = moved.abs().median().item()
    return (builder, None) if 0.09 < size < 0.11 else (None, f"its first step is {size:.3g} instead of 0.1")


def _apex() -> Builder:
    from apex.optimizers import FusedAdam  # NVIDIA's; PyPI's package of that name has none

    return FusedAdam  # its default, adam_w_mode, decouples the weight decay


def eight_bit_adamw() -> Builder:
    """torchao's AdamW, made to work on the flat shards of ZeRO.

    torchao quantises the moments of tensors whose size is a multiple of 256, and silently keeps fp32 for the others.
    A shard of ZeRO is all weights in one row, of a size that is hardly ever one; and DeepSpeed cuts every state that
    has the shard's shape into the weights' parts, which a quantised one does not allow. So the whole blocks of a
    tensor are stepped as a matrix (blocks, 256) with 8-bit moments, and the rest, less than a block, in fp32.
    """
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
    with quiet_torchao():
        from torchao.optim import AdamW8bit
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit

    class BlockwiseAdamW(AdamW8bit):  # type: ignore[misc]
        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            assert closure is None, "the engine computes gradients before it steps"
            compiled = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            with torch._dynamo.utils.disable_cache_limit():  # as torchao: one graph per shape, and shapes are few
                for group in self.param_groups:
                    for weight in (weight for weight in group["params"] if weight.grad is not None):
                        state = self.state[weight]
                        if not state:
                            state["step"] = torch.tensor(0.0)
                        state["step"] += 1
                        for name, part, gradient in _parts(weight, weight.grad):
                            moments = [f"{moment}_{name}" for moment in ("exp_avg", "exp_avg_sq")]
                            for moment in moments:
                                if moment not in state:
                                    state[moment] = _zeros(moment, part)
                            compiled(
                                part,
                                gradient,
                                state["step"],
                                *(state[moment] for moment in moments),
                                None,
                                group["lr"],
                                *group["betas"],
                                group["weight_decay"],
                                group["eps"],
                                True,
                                False,
                            )

    def _zeros(moment: str, part: torch.Tensor) -> torch.Tensor:
        if not moment.endswith("blocks"):
            return torch.zeros_like(part)
        zeros: torch.Tensor = OptimState8bit.zeros(
            part.shape, moment == "exp_avg_blocks", BLOCK, part.device, dtype=part.dtype
        )
        return zeros

    return BlockwiseAdamW


def _parts(weight: torch.Tensor, gradient: torch.Tensor) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    """The whole blocks of a tensor as a matrix, and the rest of it: views of the weight and of its gradient."""
    row, slope = weight.detach().view(-1), gradient.reshape(-1)
    whole = row.numel() // BLOCK * BLOCK if row.numel() >= SMALLEST else 0
    if whole:
        yield "blocks", row[:whole].view(-1, BLOCK), slope[:whole].view(-1, BLOCK)
    if whole < row.numel():
        yield "rest", row[whole:], slope[whole:]


def learning_rate(spec: OptimizerSpec, *, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that starts at `images_seen`."""
    done = images_seen / total_images
    if spec.schedule == "one_cycle":  # Smith & Topin 2019: cosine up from 1/25 over 30%, cosine down to nothing
        if done < 0.3:
            return spec.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / 0.3)) / 2)
        return spec.lr * (1 + math.cos(math.pi * min((done - 0.3) / 0.7, 1.0))) / 2
    warmup = min((images_seen + 1) / spec.warmup_images, 1.0) if spec.warmup_images else 1.0
    return spec.lr * warmup * (1 - done if spec.schedule == "linear" else 1.0)

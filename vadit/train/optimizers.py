"""AdamW of torch or apex, Muon of torch, and the learning rate over a run.

apex's is tried at start-up, on a small tensor of the run's device: where that fails, torch's AdamW takes its place and
one line says why. The state of one kind is of no use to another: a checkpoint records which kind wrote it, and a
resumed run that would end up with another one is refused (`vadit.train.checkpoint.checkpoints`).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from vadit.config import OptimizerSpec
from vadit.runtime import distributed
from vadit.runtime.choices import Choice
from vadit.runtime.errors import UsageError, first_line

SETTING = "optimizer.kind"
TORCH = "adamw"
APEX = "apex_fused"
MUON = "muon"


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon (Jordan et al. 2024) for matrices, torch's AdamW for everything else.

    Muon's step is scaled to AdamW's typical size (0.2 sqrt(longer side), Liu et al. 2025): one rate serves both.
    The two share this optimizer's groups and state: schedules and checkpoints see one optimizer.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], settings: dict[str, Any]
    ) -> None:
        shared = {name: settings[name] for name in ("lr", "weight_decay")}
        self._muon = torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **shared)
        self._adamw = torch.optim.AdamW(others, fused=True, **settings)
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
    matrices: Iterable[torch.nn.Parameter] = (),
) -> tuple[torch.optim.Optimizer, Choice]:
    """The optimizer of `weights` that `spec` asks for, or what takes its place. Collective.

    torch's AdamW is its fused one, on a CPU as well (offloaded states): one pass over the memory instead of a dozen.
    `matrices`: those of the weights that Muon takes where it is asked for.
    """
    settings: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "weight_decay": spec.weight_decay}
    if spec.kind == MUON:
        chosen = {id(weight) for weight in matrices}
        hidden = [weight for weight in weights if id(weight) in chosen]
        others = [weight for weight in weights if id(weight) not in chosen]
        if not hidden:
            raise UsageError("optimizer.kind muon is for a generator's blocks, and there are none; set it to adamw")
        return MuonWithAdamW(hidden, others, settings), Choice(SETTING, MUON, "asked for")
    choice = Choice(SETTING, TORCH, "the default")
    if spec.kind == APEX:
        fault = _apex_fault(settings, device)
        # Processes shard one optimizer among them: all must have the same.
        if not distributed.any_rank(fault is not None, device):
            return _apex()(weights, **settings), Choice(SETTING, APEX, "asked for")
        why = fault or "another process lacks it"
        choice = Choice(SETTING, TORCH, "what is always there", refused=f"{APEX} cannot be had here ({why})")
    return torch.optim.AdamW(weights, fused=True, **settings), choice


def _apex() -> type[torch.optim.Optimizer]:
    from apex.optimizers import FusedAdam  # NVIDIA's; PyPI's package of that name has none

    return FusedAdam  # its default, adam_w_mode, decouples the weight decay


def _apex_fault(settings: dict[str, Any], device: torch.device) -> str | None:
    """Why apex's AdamW does not work on this device, or None."""
    try:
        generator = torch.Generator().manual_seed(0)  # one of its own: trying must not move the run's random numbers
        start = torch.randn(1000, generator=generator)
        weight = torch.nn.Parameter(start.to(device, copy=True))
        weight.grad = torch.randn(1000, generator=generator).to(device)
        _apex()([weight], **{**settings, "lr": 0.1, "weight_decay": 0.0}).step()
        moved = weight.detach().cpu() - start
    except Exception as error:  # whatever a missing package, compiler or GPU raises
        return first_line(error)
    # The first step of Adam has the size of the rate, whatever the gradient (eps aside).
    size = moved.abs().median().item()
    return None if 0.09 < size < 0.11 else f"its first step is {size:.3g} instead of 0.1"


def learning_rate(spec: OptimizerSpec, *, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that starts at `images_seen`."""
    done = images_seen / total_images
    if spec.schedule == "one_cycle":  # Smith & Topin 2019: cosine up from 1/25 over 30%, cosine down to nothing
        if done < 0.3:
            return spec.lr * (1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * done / 0.3)) / 2)
        return spec.lr * (1 + math.cos(math.pi * min((done - 0.3) / 0.7, 1.0))) / 2
    warmup = min((images_seen + 1) / spec.warmup_images, 1.0) if spec.warmup_images else 1.0
    return spec.lr * warmup * (1 - done if spec.schedule == "linear" else 1.0)

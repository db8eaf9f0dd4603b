"""AdamW of vadit's kernels or apex, Muon of torch, and the learning rate over a run.

apex's is tried at start-up, on a small tensor of the run's device: where that fails, torch's AdamW takes its place and
one line says why. The state of one kind is of no use to another: a checkpoint records which kind wrote it, and a
resumed run that would end up with another one is refused (`vadit.train.checkpoint.checkpoints`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from vadit.config import OptimizerSpec
from vadit.kernels import adamw_ema
from vadit.runtime import distributed
from vadit.runtime.choices import Choice
from vadit.runtime.errors import UsageError, first_line

SETTING = "optimizer.kind"
TORCH = "adamw"
APEX = "apex_fused"
MUON = "muon"


class AdamW(torch.optim.Optimizer):
    """torch's AdamW, its state included, which clips, moves averages and rounds to bf16 in the same pass.

    copies: the bf16 weight of each fp32 one, whose gradient it has.
    """

    def __init__(
        self,
        weights: list[torch.nn.Parameter],
        copies: dict[torch.nn.Parameter, torch.nn.Parameter] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(weights, settings)
        self.copies = copies or {}
        self.scale: torch.Tensor | None = None  # Of the gradients, () fp32, for the step to come.
        self.averages: dict[torch.Tensor, list[torch.Tensor]] = {}
        """What follows each weight, as many tensors as `rates`; moved in the step to come."""
        self.rates: tuple[float, ...] = ()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None, "the engine computes gradients before it steps"
        for group in self.param_groups:
            alike: dict[float, list[torch.nn.Parameter]] = {}  # weights that have made as many steps
            for weight in group["params"]:
                if gradient(weight, self.copies) is None:
                    for average, rate in zip(self.averages.get(weight, ()), self.rates, strict=False):
                        average.lerp_(weight, rate)
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state |= {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] += 1
                alike.setdefault(state["step"].item(), []).append(weight)
            for count, weights in alike.items():
                self._step(weights, group, count)

    def _step(self, weights: list[torch.nn.Parameter], group: dict[str, Any], step: float) -> None:
        scale = None if self.scale is None else self.scale.to(weights[0].device)
        adamw_ema(
            [weight.data for weight in weights],
            [gradient(weight, self.copies) for weight in weights],  # type: ignore[misc]
            *([self.state[weight][name] for weight in weights] for name in ("exp_avg", "exp_avg_sq")),
            averages=[[self.averages[weight][k] for weight in weights] for k in range(len(self.rates))],
            rates=self.rates,
            copies=[self.copies[weight].data for weight in weights] if self.copies else [],
            scale=scale,
            step=step,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )


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


def gradient(weight: torch.Tensor, copies: Mapping[Any, torch.Tensor]) -> torch.Tensor | None:
    """A weight's own, where micro-batches are summed in fp32, else that of its bf16 copy."""
    return weight.grad if weight.grad is not None else copies.get(weight, weight).grad


@torch.no_grad()
def add_gradients(copies: Mapping[Any, torch.Tensor]) -> None:
    """Add the gradients of bf16 copies to those of their fp32 weights, and clear them."""
    for weight, copy in copies.items():
        if copy.grad is not None:
            added = copy.grad.float()
            weight.grad = added if weight.grad is None else weight.grad.add_(added)
            copy.grad = None


def sum_of_squares(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """() fp32, with one read of the gradients and no copy."""
    norms = torch._foreach_norm(list(gradients), 2, torch.float32) if gradients else [torch.zeros(())]
    return torch.stack(norms).square().sum()


def clipping(norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """What gradients of this norm are multiplied by, () fp32; None without a limit."""
    return torch.clamp(limit / (norm + 1e-6), max=1.0) if limit > 0 else None


def build(
    weights: list[torch.nn.Parameter],
    spec: OptimizerSpec,
    *,
    device: torch.device,
    matrices: Iterable[torch.nn.Parameter] = (),
    copies: dict[torch.nn.Parameter, torch.nn.Parameter] | None = None,
) -> tuple[torch.optim.Optimizer, Choice]:
    """The optimizer of `weights` that `spec` asks for, or what takes its place. Collective.

    `matrices`: those of the weights that Muon takes where it is asked for. `copies`: AdamW's bf16 weights, where
    `weights` are the fp32 ones behind them.
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
    return AdamW(weights, copies, **settings), choice


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

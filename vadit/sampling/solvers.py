"""From noise to latents: ODE and SDE solvers and the DDPM sampler, with guidance.

Everything here works on one batch that the caller made; `draw` decides which samples form a batch. Latents are
(B, C, h, w), labels (B,) int64. Times of the grid are fp32 scalars on the CPU: no fixed-step solver waits for a GPU.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vadit.config import FlowSpec, SampleSpec
from vadit.kernels import exact
from vadit.objectives import ddpm
from vadit.objectives.flow import path_point, sampling_interval, sde_diffusion, sde_interval, to_score, to_velocity
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError

Network = Callable[[Tensor, Tensor, Tensor], Tensor]

LAST_STEP_SIZE = 0.04  # of an SDE's last step, where it has one (SiT)
MAX_ADAPTIVE_STEPS = 2_000  # of dopri5, those that it takes back included; a trained generator needs about a hundred


@dataclass(frozen=True)
class Guidance:
    """output = weak + scale (strong - weak) on the first channels (Ho & Salimans 2022), the strong one elsewhere.

    The strong output is the conditional one. The weak one is the same network's at the null label, or, with `guide`,
    that network's at the same label (autoguidance: Karras et al. 2024). At a scale of 1 the weak network does not run.
    """

    spec: SampleSpec  # scale, its schedule (Gao et al. 2023), interval (Kynkaanniemi et al. 2024) and channels
    guide: Any = None  # a weaker network to guide with, called as the sampled one is

    def active(self, t: Tensor) -> bool:
        """Whether guidance acts at t, an fp32 scalar (compared in fp32, as the authors' code does)."""
        low, high = self.spec.cfg_interval
        # high = 1 is no limit: dopri5 steps beyond 1 and interpolates back, guided all the way
        return self.spec.cfg_scale != 1 and not bool(t < low) and (high >= 1 or not bool(t > high))

    def scale(self, t: Tensor) -> float:
        """The scale at t, as its schedule has it there."""
        if self.spec.cfg_power is None:
            return self.spec.cfg_scale
        rise = (1 - math.cos(math.pi * min(max(float(t), 0.0), 1.0) ** self.spec.cfg_power)) / 2
        return 1 + (self.spec.cfg_scale - 1) * rise

    def combine(self, t: Tensor, strong: Tensor, weak: Tensor, num_channels: int) -> Tensor:
        """The guided output; channels after the latent's `num_channels` (a variance) stay the strong one's."""
        channels = self.spec.cfg_channels or num_channels
        guided = weak[:, :channels] + self.scale(t) * (strong[:, :channels] - weak[:, :channels])
        return torch.cat([guided, strong[:, channels:]], dim=1)


def time_grid(num_steps: int, low: float = 0.0, high: float = 1.0, shift: float = 0.0) -> Tensor:
    """linspace(low, high, num_steps) with t' = s t / (1 + (s - 1) t) where s > 0 (Esser et al. 2024, eq. 23); fp32."""
    times = torch.linspace(low, high, num_steps)
    return shift * times / (1 + (shift - 1) * times) if shift > 0 else times


def sample_ode(
    model: Any,
    noise: Tensor,
    labels: Tensor,
    spec: SampleSpec | None = None,
    *,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    **settings: Any,
) -> Tensor:
    """Integrate the probability-flow ODE from noise (B, C, h, w) to latents of that shape.

    model: callable (x, t (B,) fp32, labels (B,)) -> output, with `num_classes`, whose value is the null label.
    settings: those of `SampleSpec`, over `spec`: method, num_steps, timestep_shift, cfg_scale, cfg_interval, ...
    num_steps counts the points of linspace(0, 1): 250 points are 249 steps. heun is the second-order Heun method
    (torchdiffeq's heun2: two evaluations per step); dopri5 takes its steps by atol and rtol over the whole batch
    and only the end points of the grid. flow says what the output means (default: velocity on the linear path).
    Guidance acts on the output, before it is turned into a velocity. Outside cfg_interval, and at cfg_scale 1, only
    the conditional pass runs; the one exception is dopri5 that guides a part of the channels (see `_DoubledField`).
    """
    flow, spec = flow or FlowSpec(), _settings(noise, labels, spec, settings)
    if spec.method not in ("euler", "heun", "dopri5"):
        raise UsageError(f"method {spec.method!r} is no ODE solver; choose euler, heun or dopri5")
    guidance = Guidance(spec, guide)
    times = time_grid(spec.num_steps, *sampling_interval(flow), spec.timestep_shift)
    with evaluation(model, guide):
        if spec.method == "dopri5":
            return _dopri5(model, noise, labels, guidance, flow, times)
        field = _Field(model, labels, guidance, flow)
        x = noise
        for t, t_next in itertools.pairwise(times):
            dt = t_next - t
            slope = field.velocity(x, t)
            if spec.method == "heun":
                # at t + dt, not at t_next: one ulp can decide on which side of cfg_interval it lies
                slope_next = field.velocity(x + dt * slope, t + dt)
                slope = slope * 0.5 + slope_next * 0.5
            x = x + dt * slope
        return x


def sample_sde(
    model: Any,
    noise: Tensor,
    labels: Tensor,
    spec: SampleSpec | None = None,
    *,
    flow: FlowSpec | None = None,
    guide: nn.Module | None = None,
    indices: Sequence[int] | None = None,
    **settings: Any,
) -> Tensor:
    """Euler-Maruyama on dx = (v + w score) dt + sqrt(2 w) dW (SiT, eq. 5), then one step without noise.

    num_steps - 1 steps over linspace(0, 1 - LAST_STEP_SIZE, num_steps), then the last one: mean (the SDE's drift),
    euler (the ODE's velocity), tweedie (E[x1 | x_t]) or none (the grid then ends at 1). The shift acts on the share
    of the interval. The noise of step k in sample i is a function of (seed, i, k); indices default to 0..B-1.
    The arguments are `sample_ode`'s.
    """
    flow, spec = flow or FlowSpec(), _settings(noise, labels, spec, settings)
    form, last_step = spec.sde_diffusion, spec.sde_last_step
    low, high = sde_interval(flow, form, 0.0 if last_step == "none" else LAST_STEP_SIZE)
    times = low + (high - low) * time_grid(spec.num_steps, shift=spec.timestep_shift)
    with evaluation(model, guide):
        field = _Field(model, labels, Guidance(spec, guide), flow)
        x = noise
        for step, (t, t_next) in enumerate(itertools.pairwise(times)):
            dt = t_next - t
            velocity, score = field.velocity_and_score(x, t)
            w = sde_diffusion(flow.path, form, t)
            kick = _step_noise(spec.seed, step, indices, x)
            x = x + dt * (velocity + w * score) + torch.sqrt(2 * w * dt) * kick
        if last_step == "none":
            return x
        velocity, score = field.velocity_and_score(x, times[-1])
        if last_step == "tweedie":
            point = path_point(flow.path, times[-1])
            return x / point.alpha + point.sigma**2 / point.alpha * score
        if last_step == "mean":
            velocity = velocity + sde_diffusion(flow.path, form, times[-1]) * score
        return x + LAST_STEP_SIZE * velocity


def sample_ddpm(
    model: Any,
    noise: Tensor,
    labels: Tensor,
    spec: SampleSpec | None = None,
    *,
    guide: nn.Module | None = None,
    indices: Sequence[int] | None = None,
    **settings: Any,
) -> Tensor:
    """Ancestral sampling in num_steps of the 1000 steps of a DDPM with learned variance (ADM, DiT).

    model has `forward_with_variance(x, t, labels) -> (B, 2C, h, w)` and `num_classes`. Guidance acts on the noise
    prediction, the variance is the conditional one's (DiT); its time is 1 - timestep / 1000 (MDT), so 1 is data.
    """
    spec = _settings(noise, labels, spec, {**settings, "method": "ddpm"})
    guidance = Guidance(spec, guide)
    schedule = ddpm.make_schedule(spec.num_steps)
    timesteps, schedule = schedule.timesteps.tolist(), schedule.to(noise.device)
    predict = _with_variance(model)
    weak = None if guide is None else _with_variance(guide)
    with evaluation(model, guide):
        x = noise
        for step in reversed(range(spec.num_steps)):
            times = _fill(x, float(timesteps[step]))
            t = torch.tensor(1 - timesteps[step] / ddpm.NUM_STEPS)
            if guidance.active(t):
                strong_and_weak = _both(predict, weak, x, times, labels, model.num_classes)
                output = guidance.combine(t, *strong_and_weak, x.shape[1])
            else:
                output = predict(x, times, labels).to(x.dtype)
            kick = _step_noise(spec.seed, step, indices, x) if step else torch.zeros_like(x)
            x = ddpm.ancestral_step(schedule, output, x, step, kick)
        return x


class _Field:
    """The guided velocity of one batch; torchdiffeq calls it and its `callback_step`."""

    def __init__(self, model: Any, labels: Tensor, guidance: Guidance, flow: FlowSpec) -> None:
        self.model, self.labels, self.guidance, self.flow = model, labels, guidance, flow
        self._steps = 0

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's guided output; t an fp32 scalar."""
        times = _fill(x, t)
        if not self.guidance.active(t):
            return self.model(x, times, self.labels).to(x.dtype)
        strong, weak = self.strong_and_weak(x, times)
        return self.guidance.combine(t, strong, weak, x.shape[1])

    def strong_and_weak(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        return _both(self.model, self.guidance.guide, x, times, self.labels, self.model.num_classes)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return to_velocity(self.flow.path, self.flow.prediction, self.output(x, t), x, _fill(x, t))

    def velocity_and_score(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output, times = self.output(x, t), _fill(x, t)
        path, prediction = self.flow.path, self.flow.prediction
        return to_velocity(path, prediction, output, x, times), to_score(path, prediction, output, x, times)

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        return self.velocity(x, t.float())

    def callback_step(self, t: Tensor, x: Tensor, dt: Tensor) -> None:
        """Before each step of dopri5: end an integration that gets nowhere (torchdiffeq itself only asserts)."""
        self._steps += 1
        tolerances = f"atol {self.guidance.spec.atol:g} and rtol {self.guidance.spec.rtol:g}"
        if not x.isfinite().all():
            what = f"the latents became infinite or NaN at t = {float(t):.4g}"
        elif not t + dt > t:
            what = f"no step at t = {float(t):.4g} meets {tolerances}, or the output is not finite there"
        elif self._steps > MAX_ADAPTIVE_STEPS:
            what = f"{MAX_ADAPTIVE_STEPS:,} steps with {tolerances} only lead to t = {float(t):.4g}"
        else:
            return
        raise RunError(f"dopri5 ends: {what}; raise the tolerances, lower the guidance or take method euler")


class _DoubledField(_Field):
    """The authors' doubled state [guided; shadow], (2B, C, h, w), for dopri5 that guides a part of the channels.

    Their unconditional half integrates the guided channels together with the null label's other channels. It never
    feeds back into the guided half, but dopri5 picks its steps by an error norm over both: equal results need it,
    and with it the unconditional pass at every t. With all channels guided the halves are equal and so is the norm.
    """

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        half = x.chunk(2)[0]
        strong, weak = self.strong_and_weak(half, _fill(half, t))
        channels = self.guidance.spec.cfg_channels
        guided = self.guidance.combine(t, strong, weak, x.shape[1]) if self.guidance.active(t) else strong
        shadow = torch.cat([guided[:, :channels], weak[:, channels:]], dim=1)
        output = torch.cat([guided, shadow])
        return to_velocity(self.flow.path, self.flow.prediction, output, x, _fill(x, t))


def _dopri5(model: Any, noise: Tensor, labels: Tensor, guidance: Guidance, flow: FlowSpec, times: Tensor) -> Tensor:
    from torchdiffeq import odeint

    spec = guidance.spec
    part = spec.cfg_channels is not None and spec.cfg_channels < noise.shape[1]
    doubled = part and spec.cfg_scale != 1 and guidance.guide is None
    field = (_DoubledField if doubled else _Field)(model, labels, guidance, flow)
    state = torch.cat([noise, noise]) if doubled else noise
    # points between the ends would only be interpolated and kept in memory: the steps do not depend on them
    ends = times[[0, -1]].to(noise.device)
    # dopri5 steps past the end and interpolates back; the vp path has no sigma past t = 1, so there a step ends with it
    options = {"step_t": ends[1:]} if flow.path == "vp" else {}
    # tolerances as lists, like the authors: torchdiffeq then takes the error norm in fp64, and the first steps, whose
    # error is rounding alone, come out equal. For the same reason plain torch ops: those steps make 5e-5 of the 3e-7
    # by which the compiled ops round otherwise
    with exact():
        tolerances = {"atol": [spec.atol], "rtol": [spec.rtol]}
        latents = odeint(field, state, ends, method="dopri5", **tolerances, options=options)[-1]
    return latents[: len(noise)]


def _both(
    strong: Network, weak: Network | None, x: Tensor, times: Tensor, labels: Tensor, null_label: int
) -> tuple[Tensor, Tensor]:
    """Conditional output and the one to guide away from: in one pass of 2B rows, or from a network of its own.

    Both in x's type, that of the solver's sums, whatever the networks compute in.
    """
    if weak is not None:
        return strong(x, times, labels).to(x.dtype), weak(x, times, labels).to(x.dtype)
    null = torch.full_like(labels, null_label)
    output = strong(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, null])).to(x.dtype)
    conditional, other = output.chunk(2)
    return conditional, other


def _with_variance(model: Any) -> Network:
    predict = getattr(model, "forward_with_variance", None)
    if predict is None or not getattr(getattr(model, "spec", None), "learn_sigma", True):
        raise UsageError(f"method ddpm needs a generator with learned variance, found {type(model).__name__} without")
    return predict


def _fill(x: Tensor, t: Tensor | float) -> Tensor:
    """(B,) times on x's device: a fill, no copy from the host, where t lies on the CPU."""
    if isinstance(t, Tensor) and t.device.type != "cpu":
        return t.expand(len(x))
    return torch.full((len(x),), float(t), dtype=torch.float32, device=x.device)


def _step_noise(seed: int, step: int, indices: Sequence[int] | None, x: Tensor) -> Tensor:
    indices = range(len(x)) if indices is None else indices
    noise = rng.normal(rng.fold(seed, "step", step), indices, x.shape[1:])
    # a GPU takes pinned memory as it comes to it; for other memory the host would wait until all before is done
    return (noise.pin_memory() if x.device.type == "cuda" else noise).to(x, non_blocking=True)


@contextmanager
def evaluation(*models: Any) -> Iterator[None]:
    """No gradients, and every module in eval mode (label dropout off); the modes come back afterwards."""
    modules = [part for model in models if isinstance(model, nn.Module) for part in model.modules() if part.training]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in modules:
            module.training = True


def _settings(noise: Tensor, labels: Tensor, spec: SampleSpec | None, changes: dict[str, Any]) -> SampleSpec:
    """The settings of a batch; refuses what cannot be meant."""
    spec = replace(spec or SampleSpec(), **changes)
    if labels.shape != noise.shape[:1]:
        raise UsageError(f"labels have shape {tuple(labels.shape)}; noise {tuple(noise.shape)} needs ({len(noise)},)")
    if (spec.cfg_channels or 0) > noise.shape[1]:
        raise UsageError(f"cfg_channels is {spec.cfg_channels}; the latent has {noise.shape[1]} channels")
    return spec

"""Flow matching between noise and data: path, law of t, velocity and direction loss, and what a network's output means.

Time runs from 0 (noise, x0 ~ N(0, 1)) to 1 (data, x1). On a path x_t = alpha(t) x1 + sigma(t) x0 the velocity is
v = alpha'(t) x1 + sigma'(t) x0 (Lipman et al. 2023, eq. 14 and following; Albergo & Vanden-Eijnden 2023).
Names of tensors: x0 noise, x1 data, x_t between them, all (B, C, h, w); t is (B,), fp32.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vadit.config import FlowSpec

Path = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "noise", "score"]
DiffusionForm = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"]

# beta of the VP path at the data's and at the noise's end (Song et al. 2021, eq. 32-33: beta_min, beta_max)
VP_BETA_DATA, VP_BETA_NOISE = 0.1, 20.0


@dataclass(frozen=True)
class PathPoint:
    """The path at times t: each a tensor shaped like t (or broadcastable against x where `like` was given)."""

    alpha: Tensor  # share of the data
    d_alpha: Tensor  # d alpha / dt
    sigma: Tensor  # share of the noise
    d_sigma: Tensor  # d sigma / dt
    drift: Tensor  # f = alpha' / alpha, of the forward SDE dx = f x dt + sqrt(2 g) dw whose marginals the path has
    diffusion: Tensor  # g = f sigma^2 - sigma sigma', so that v = f x_t + g score


@dataclass(frozen=True)
class Drawn:
    """Noise and time drawn for data, and what a network is asked there."""

    x_t: Tensor
    t: Tensor  # (B,) fp32
    x0: Tensor
    velocity: Tensor


def path_point(path: Path, t: Tensor, like: Tensor | None = None) -> PathPoint:
    """alpha, sigma, their derivatives and the SDE's coefficients at t (any shape); SiT (Ma et al. 2024), section 2.

    linear: alpha = t, sigma = 1 - t. gvp: alpha = sin(pi t / 2), sigma = cos(pi t / 2). vp: alpha =
    exp(-(1-t)^2 (b1 - b0) / 4 - (1-t) b0 / 2), sigma = sqrt(1 - alpha^2). With `like` (B, ...), t is (B,) and the
    results broadcast against it.
    """
    if like is not None:
        t = t.reshape(-1, *[1] * (like.dim() - 1))
    if path == "linear":
        alpha, d_alpha, sigma, d_sigma = t, torch.ones_like(t), 1 - t, -torch.ones_like(t)
        drift = 1 / t
    elif path == "gvp":
        angle = t * (math.pi / 2)
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        d_alpha, d_sigma = math.pi / 2 * sigma, -math.pi / 2 * alpha
        drift = math.pi / (2 * torch.tan(angle))
    else:
        noise_time, slope = 1 - t, VP_BETA_NOISE - VP_BETA_DATA
        log_alpha = -0.25 * noise_time**2 * slope - 0.5 * noise_time * VP_BETA_DATA
        drift = 0.5 * noise_time * slope + 0.5 * VP_BETA_DATA
        alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))
        d_alpha, d_sigma = alpha * drift, -(alpha**2) * drift / sigma
        # alpha^2 + sigma^2 = 1 makes f sigma^2 - sigma sigma' equal f: no cancellation near the ends
        return PathPoint(alpha, d_alpha, sigma, d_sigma, drift, drift)
    return PathPoint(alpha, d_alpha, sigma, d_sigma, drift, drift * sigma**2 - sigma * d_sigma)


def interpolate(path: Path, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and its velocity for noise x0 and data x1 (B, ...) at times t (B,)."""
    point = path_point(path, t, like=x1)
    return point.alpha * x1 + point.sigma * x0, point.d_alpha * x1 + point.d_sigma * x0


def training_interval(spec: FlowSpec) -> tuple[float, float]:
    """The range of t in training: vp avoids 1, noise and score prediction avoid both ends (SiT's settings)."""
    return _interval(spec, vp_end=1e-5)


def sampling_interval(spec: FlowSpec) -> tuple[float, float]:
    """First and last t of the probability-flow ODE."""
    return _interval(spec, vp_end=1e-3)


def sde_interval(spec: FlowSpec, form: DiffusionForm, last_step_size: float) -> tuple[float, float]:
    """First and last t of the SDE; a last step of its own covers the rest (size 0: no such step).

    Score and noise prediction, and the sbdm diffusion, divide by alpha, which is 0 at t = 0 on all paths but vp.
    (SiT starts velocity prediction with sbdm at 0 all the same and gets infinities: here it starts at 1e-3.)
    """
    low, high = sampling_interval(spec)
    if form == "sbdm" and spec.path != "vp":
        low = max(low, 1e-3)
    return low, 1 - last_step_size if last_step_size > 0 else high


def _interval(spec: FlowSpec, vp_end: float) -> tuple[float, float]:
    if spec.path == "vp":
        return 0.0, 1.0 - vp_end
    end = 0.0 if spec.prediction == "velocity" else 1e-3
    return end, 1.0 - end


def sample_time(
    spec: FlowSpec,
    batch_size: int,
    images_seen: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Times (batch_size,) for training, fp32: sigmoid(N(0, 1)) (Esser et al. 2024, eq. 19) or uniform.

    From `uniform_after_images` images on the law is uniform. `time_shift` s above 1 moves times towards the noise.
    """
    low, high = training_interval(spec)
    switched = spec.uniform_after_images is not None and images_seen >= spec.uniform_after_images
    if spec.time_law == "uniform" or switched:
        unit = torch.rand(batch_size, generator=generator, device=device)
    else:
        unit = torch.sigmoid(torch.randn(batch_size, generator=generator, device=device))
    if spec.time_shift != 1:
        # s u / (1 + (s - 1) u) of the share of noise u = 1 - t, written for t
        unit = unit / (1 + (spec.time_shift - 1) * (1 - unit))
    return low + (high - low) * unit


def velocity_loss(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Errors (B,) of velocities (B, C, ...), in fp32 or wider (LightningDiT, section 4.2).

    The mean of squares over channels and positions, and the mean over positions of 1 - cos along channels.
    """
    prediction, target = _comparable(prediction, target)
    cosine = F.cosine_similarity(prediction, target, dim=1)
    return _per_sample((prediction - target) ** 2), _per_sample(1 - cosine)


def draw(spec: FlowSpec, x1: Tensor, images_seen: int, generator: torch.Generator | None = None) -> Drawn:
    """One draw of noise and time for data x1 (B, C, h, w); `generator` must live on its device."""
    t = sample_time(spec, x1.shape[0], images_seen, generator, x1.device)
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    x_t, velocity = interpolate(spec.path, x0, x1, t.to(x1.dtype))
    return Drawn(x_t=x_t, t=t, x0=x0, velocity=velocity)


def loss(spec: FlowSpec, drawn: Drawn, output: Tensor) -> dict[str, Tensor]:
    """The loss of a network's output (B, C, h, w) at a draw, by its terms: scalars, means over the batch.

    loss: mse + direction - contrastive_weight x contrastive. mse: squared error of the prediction (weighted, where
    loss_weighting says so). direction: of velocity prediction, zero where it is off. contrastive: where it is on.
    """
    if spec.prediction == "velocity":
        squared, turned = velocity_loss(output, drawn.velocity)
        mse = squared.mean()
        direction = turned.mean() if spec.direction_loss else torch.zeros_like(mse)
    else:
        mse = denoising_loss(spec, output, drawn.x0, drawn.t).mean()
        direction = torch.zeros_like(mse)
    terms = {"loss": mse + direction, "mse": mse, "direction": direction}
    if spec.contrastive_weight > 0:
        terms["contrastive"] = contrastive_error(output, drawn.velocity)
        terms["loss"] = terms["loss"] - spec.contrastive_weight * terms["contrastive"]
    return terms


def contrastive_error(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error against the velocity of another sample of the batch (Stoica et al. 2025, eq. 6).

    The other one is the next in the batch, whose order is random: a permutation without fixed points.
    """
    prediction, velocity = _comparable(prediction, velocity)
    return ((prediction - velocity.roll(1, dims=0)) ** 2).mean()


def denoising_loss(spec: FlowSpec, output: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Weighted squared error (B,) of noise or score prediction (SiT, section 3; likelihood: Song et al. 2021b).

    The score's error is taken at the noise's scale: |sigma s + x0|^2.
    """
    output, x0 = _comparable(output, x0)
    point = path_point(spec.path, t.to(x0.dtype), like=x0)
    error = output - x0 if spec.prediction == "noise" else output * point.sigma + x0
    if spec.loss_weighting == "velocity":
        error = error * (point.diffusion / point.sigma)
    elif spec.loss_weighting == "likelihood":
        error = error * (point.diffusion.sqrt() / point.sigma)
    return _per_sample(error**2)


def to_velocity(path: Path, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity (drift of the probability-flow ODE) that a network's output stands for at x_t (B, ...), t (B,)."""
    if prediction == "velocity":
        return output
    point = path_point(path, t, like=x_t)
    score = output if prediction == "score" else -output / point.sigma
    return point.drift * x_t + point.diffusion * score


def to_score(path: Path, prediction: Prediction, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The score grad log p_t(x_t) that a network's output stands for; from velocities it is finite at t = 0, too."""
    if prediction == "score":
        return output
    point = path_point(path, t, like=x_t)
    if prediction == "noise":
        return -output / point.sigma
    ratio = point.alpha / point.d_alpha
    return (ratio * output - x_t) / (point.sigma**2 - ratio * point.d_sigma * point.sigma)


def sde_diffusion(path: Path, form: DiffusionForm, t: Tensor) -> Tensor:
    """w(t) of the sampling SDE dx = (v + w score) dt + sqrt(2 w) dW, shaped like t (SiT, section 2.4 and its code)."""
    if form == "constant":
        return torch.ones_like(t)
    if form == "sbdm":
        return path_point(path, t).diffusion
    if form == "sigma":
        return path_point(path, t).sigma
    if form == "linear":
        return 1 - t
    if form == "decreasing":
        return 0.25 * (torch.cos(math.pi * t) + 1) ** 2
    return torch.sin(math.pi * t) ** 2  # increasing_decreasing


def _per_sample(values: Tensor) -> Tensor:
    return values.reshape(values.shape[0], -1).mean(dim=1)


def _comparable(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32, or as they are where that is wider."""
    assert prediction.shape == target.shape, f"the model gave {tuple(prediction.shape)}, needed {tuple(target.shape)}"
    found = [values.to(torch.promote_types(values.dtype, torch.float32)) for values in (prediction, target)]
    return found[0], found[1]

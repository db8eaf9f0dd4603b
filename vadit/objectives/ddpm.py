"""The DDPM of the plain DiT: 1000 linear-beta steps, noise prediction, learned variance, hybrid loss.

Sources: Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance, hybrid loss, fewer steps), Dhariwal & Nichol
2021 (ADM), Peebles & Xie 2023 (DiT). Step t runs from 0 (least noise) to 999; x_t = signal x + noise eps. A network
gives (B, 2C, h, w): the noise, and v in [-1, 1] that places the log-variance between its two bounds.
"""

import functools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vadit.config.objectives import DDPM_STEPS as NUM_STEPS

BETA_FIRST, BETA_LAST = 1e-4, 0.02


@dataclass(frozen=True)
class Schedule:
    """Coefficients of N steps, each (N,) float64, entry 0 nearest to the data."""

    timesteps: Tensor  # (N,) int64: which of the 1000 steps the network gets as its time
    signal: Tensor  # sqrt(abar): share of the data in x_t
    noise: Tensor  # sqrt(1 - abar): share of the noise in x_t
    posterior_data: Tensor  # coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)
    posterior_state: Tensor  # coefficient of x_t in that mean
    log_variance_low: Tensor  # log of that posterior's variance; entry 0, whose variance is 0, repeats entry 1
    log_variance_high: Tensor  # log beta

    def to(self, device: torch.device | str) -> "Schedule":
        """The same on another device."""
        return Schedule(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True)
class Drawn:
    """Noise and step drawn for data."""

    x_t: Tensor
    t: Tensor  # (B,) steps 0..999 as floats, which the network is told
    x1: Tensor
    eps: Tensor


def make_schedule(num_steps: int = NUM_STEPS) -> Schedule:
    """The schedule of `num_steps` of the steps, evenly spread, both ends included (Nichol & Dhariwal 2021, section 4).

    Betas are recomputed so that abar at those steps stays.
    """
    all_betas = torch.linspace(BETA_FIRST, BETA_LAST, NUM_STEPS, dtype=torch.float64)
    stride = (NUM_STEPS - 1) / (num_steps - 1)
    timesteps = torch.tensor([round(stride * number) for number in range(num_steps)])
    kept = torch.cumprod(1 - all_betas, dim=0)[timesteps]
    before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    alphas = kept / before
    betas = 1 - alphas
    variance = betas * (1 - before) / (1 - kept)
    return Schedule(
        timesteps=timesteps,
        signal=kept.sqrt(),
        noise=(1 - kept).sqrt(),
        posterior_data=betas * before.sqrt() / (1 - kept),
        posterior_state=(1 - before) * alphas.sqrt() / (1 - kept),
        log_variance_low=torch.cat([variance[1:2], variance[1:]]).log(),
        log_variance_high=betas.log(),
    )


@functools.lru_cache(maxsize=8)
def _training_schedule(device: torch.device) -> Schedule:
    return make_schedule().to(device)


def draw(x1: Tensor, generator: torch.Generator | None = None) -> Drawn:
    """One draw of noise and step for data x1 (B, C, h, w)."""
    schedule = _training_schedule(x1.device)
    step = torch.randint(NUM_STEPS, (x1.shape[0],), generator=generator, device=x1.device)
    eps = torch.randn(x1.shape, generator=generator, device=x1.device, dtype=x1.dtype)
    x_t = _at(schedule.signal, step, x1) * x1 + _at(schedule.noise, step, x1) * eps
    return Drawn(x_t=x_t, t=step.float(), x1=x1, eps=eps)


def loss(drawn: Drawn, output: Tensor) -> dict[str, Tensor]:
    """The hybrid loss of a network's output (B, 2C, h, w) at a draw (LightningDiT: with_variance), by its terms.

    L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, eq. 16); L_vlb is 1000 times the term at a random step, so that
    the term's weight is 1. loss: mse + variational, scalars, means over the batch; mse is the noise prediction's,
    variational in bits per dimension, and trains the variance alone.
    """
    channels = drawn.x1.shape[1]
    output = output.to(torch.promote_types(drawn.x1.dtype, torch.float32))
    assert output.shape[1] == 2 * channels, f"the model gave {output.shape[1]} channels, needed {2 * channels}"
    prediction, variance_share = output.chunk(2, dim=1)
    mse = ((prediction - drawn.eps) ** 2).mean()
    # the mean is frozen in the bound: only the variance learns from it
    frozen = torch.cat([prediction.detach(), variance_share], dim=1)
    schedule = _training_schedule(drawn.x1.device)
    variational = variational_term(schedule, frozen, drawn.x1, drawn.x_t, drawn.t.long()).mean()
    return {"loss": mse + variational, "mse": mse, "variational": variational}


def posterior(schedule: Schedule, x1: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C, h, w) and log-variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0 = x1) at steps (B,)."""
    mean = _at(schedule.posterior_data, step, x_t) * x1 + _at(schedule.posterior_state, step, x_t) * x_t
    return mean, _at(schedule.log_variance_low, step, x_t)


def predicted_posterior(schedule: Schedule, output: Tensor, x_t: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance (B, C, h, w) of the network's p(x_{t-1} | x_t) (Nichol & Dhariwal 2021, eq. 15)."""
    eps, variance_share = output.to(x_t.dtype).chunk(2, dim=1)
    data = (x_t - _at(schedule.noise, step, x_t) * eps) / _at(schedule.signal, step, x_t)
    share = (variance_share + 1) / 2
    low, high = _at(schedule.log_variance_low, step, x_t), _at(schedule.log_variance_high, step, x_t)
    return posterior(schedule, data, x_t, step)[0], share * high + (1 - share) * low


def variational_term(schedule: Schedule, output: Tensor, x1: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
    """The bound's term at `step`, (B,), in bits per dimension: KL(q || p), or -log p(x_0 | x_1) at step 0.

    At step 0 the likelihood is that of a value in 1/127.5-wide bins over [-1, 1], as if the latent were an image
    (ADM; DiT keeps it), with the exact normal distribution function.
    """
    true_mean, true_log_variance = posterior(schedule, x1, x_t, step)
    mean, log_variance = predicted_posterior(schedule, output, x_t, step)
    kl = 0.5 * (
        log_variance
        - true_log_variance
        - 1
        + torch.exp(true_log_variance - log_variance)
        + (true_mean - mean) ** 2 * torch.exp(-log_variance)
    )
    nll = -_binned_log_likelihood(x1, mean, log_variance)
    term = torch.where(step.reshape(-1, *[1] * (x1.dim() - 1)) == 0, nll, kl)
    return term.flatten(1).mean(dim=1) / math.log(2)


def ancestral_step(schedule: Schedule, output: Tensor, x_t: Tensor, step: int, eps: Tensor) -> Tensor:
    """x_{t-1} from the network's output (B, 2C, h, w) at x_t; `eps` is the step's noise, and zero at step 0.

    The schedule must be on x_t's device.
    """
    steps = torch.full((x_t.shape[0],), step, device=x_t.device)
    mean, log_variance = predicted_posterior(schedule, output, x_t, steps)
    return mean + torch.exp(0.5 * log_variance) * eps


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    half_bin, inverse_std = 1 / 255, torch.exp(-0.5 * log_variance)
    upper = torch.special.ndtr((x - mean + half_bin) * inverse_std)
    lower = torch.special.ndtr((x - mean - half_bin) * inverse_std)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """Entries of a (N,) table at steps (B,), broadcastable against `like`, in its type (at least fp32)."""
    values = table[step].to(torch.promote_types(like.dtype, torch.float32))
    return values.reshape(-1, *[1] * (like.dim() - 1))

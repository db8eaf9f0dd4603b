"""The DDPM objective: identities of the schedule and posterior, the hybrid loss, ancestral sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vadit.objectives import ddpm
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.sampling.solvers import sample_ddpm


def _data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _output_for(eps: torch.Tensor, variance_share: float) -> torch.Tensor:
    """A network's output with this noise and this place between the log-variances (0: the posterior's, 1: beta)."""
    return torch.cat([eps, torch.full_like(eps, 2 * variance_share - 1)], dim=1)


def test_schedule_is_linear_beta():
    schedule = ddpm.make_schedule()
    betas = schedule.log_variance_high.exp()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000, dtype=torch.float64))
    assert float(schedule.signal[-1] ** 2) == pytest.approx(4.04e-5, rel=0.01)


def test_fewer_steps_keep_the_signal_at_their_timesteps():
    full, short = ddpm.make_schedule(), ddpm.make_schedule(50)
    assert short.timesteps.tolist() == [round(999 * number / 49) for number in range(50)]
    assert ddpm.spaced_timesteps(2) == [0, 999]
    torch.testing.assert_close(short.signal, full.signal[short.timesteps])
    # the product of the new 1 - beta is the kept signal squared
    torch.testing.assert_close(torch.cumprod(1 - short.log_variance_high.exp(), 0), short.signal**2)
    for steps in (1, 1001):
        with pytest.raises(UsageError, match=str(steps)):
            ddpm.make_schedule(steps)


@pytest.mark.parametrize("num_steps", [1000, 20])
def test_posterior_is_bayes_rule(num_steps):
    """q(x_{t-1} | x_t, x_0) from the two Gaussians q(x_{t-1} | x_0) and q(x_t | x_{t-1})."""
    schedule = ddpm.make_schedule(num_steps)
    x1, x_t = _data(6, 2, 2, 2), _data(6, 2, 2, 2, seed=1)
    step = torch.tensor([1, 2, 5, 9, 14, 19])
    mean, log_variance = ddpm.posterior(schedule, x1, x_t, step)
    beta = schedule.log_variance_high.exp()[step].reshape(-1, 1, 1, 1)
    prior_mean = schedule.signal[step - 1].reshape(-1, 1, 1, 1) * x1
    prior_variance = (schedule.noise[step - 1] ** 2).reshape(-1, 1, 1, 1)
    precision = 1 / prior_variance + (1 - beta) / beta
    torch.testing.assert_close(log_variance, -precision.log(), rtol=1e-9, atol=1e-9)
    expected = (prior_mean / prior_variance + (1 - beta).sqrt() / beta * x_t) / precision
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)


def test_bound_is_the_divergence_of_two_gaussians():
    schedule = ddpm.make_schedule()
    x1, eps, step = _data(4, 3, 2, 2), _data(4, 3, 2, 2, seed=1), torch.tensor([1, 10, 500, 999])
    x_t = schedule.signal[step].reshape(-1, 1, 1, 1) * x1 + schedule.noise[step].reshape(-1, 1, 1, 1) * eps
    exact = ddpm.variational_term(schedule, _output_for(eps, 0), x1, x_t, step)
    torch.testing.assert_close(exact, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    # another noise and another place of the log-variance between its bounds
    found = ddpm.variational_term(schedule, _output_for(eps + 1, 0.3), x1, x_t, step)
    alpha_bar, low, high = (
        table[step].reshape(-1, 1, 1, 1)
        for table in (schedule.signal**2, schedule.log_variance_low, schedule.log_variance_high)
    )
    true_mean, _ = ddpm.posterior(schedule, x1, x_t, step)
    data = (x_t - (1 - alpha_bar).sqrt() * (eps + 1)) / alpha_bar.sqrt()
    mean, _ = ddpm.posterior(schedule, data, x_t, step)
    true, predicted = (
        torch.distributions.Normal(*pair)
        for pair in ((true_mean, (0.5 * low).exp()), (mean, (0.5 * (0.3 * high + 0.7 * low)).exp()))
    )
    bits = torch.distributions.kl_divergence(true, predicted).mean(dim=(1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found, bits, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("place", [-1.0, 0.3, 1.0])
def test_bound_at_step_zero_is_a_likelihood_over_bins(place):
    """Over all 256 values of an 8-bit picture the probabilities sum to one, wherever the network expects them."""
    schedule = ddpm.make_schedule()
    values = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1)
    x_t = torch.full_like(values, place)
    output = _output_for(torch.full_like(values, 0.2), 0.5)
    bits = ddpm.variational_term(schedule, output, values, x_t, torch.zeros(256, dtype=torch.long))
    assert float(torch.exp(-bits * math.log(2)).sum()) == pytest.approx(1, abs=1e-6)


def test_hybrid_loss_trains_the_variance_only_through_the_bound():
    parameter = nn.Parameter(torch.zeros(1, 4, 1, 1))
    seen = []

    def model(x, t, labels):
        seen.append((x.detach(), t))
        return torch.cat([x, x], dim=1) * 0.1 + parameter

    x1 = torch.randn(64, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(64, dtype=torch.long)
    drawn = ddpm.draw(x1, torch.Generator().manual_seed(1))
    loss = ddpm.loss(drawn, model(drawn.x_t, drawn.t, labels))
    (from_bound,) = torch.autograd.grad(loss["variational"], parameter, retain_graph=True)
    (from_mse,) = torch.autograd.grad(loss["mse"], parameter)
    assert (from_bound[:, :2] == 0).all() and (from_bound[:, 2:] != 0).all()
    assert (from_mse[:, :2] != 0).all() and (from_mse[:, 2:] == 0).all()
    ((x_t, t),) = seen
    assert t.dtype == torch.float32 and (t == t.round()).all() and t.min() >= 0 and 500 < t.max() <= 999
    schedule, step = ddpm.make_schedule(), t.long()
    signal, noise = (table[step].float().reshape(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
    eps = (x_t - signal * x1) / noise
    assert loss["mse"].item() == pytest.approx((0.1 * x_t - eps).square().mean().item(), rel=1e-3)
    output = torch.cat([x_t, x_t], dim=1) * 0.1
    bound = ddpm.variational_term(schedule, output, x1, x_t, step).mean().item()
    assert loss["variational"].item() == pytest.approx(bound, rel=1e-5)
    assert loss["loss"].item() == pytest.approx(loss["mse"].item() + bound, rel=1e-5)


class GaussianDenoiser(nn.Module):
    """The exact noise prediction for data N(mean[label], std^2); counts the rows that it sees."""

    def __init__(self, std: float = 0.5) -> None:
        super().__init__()
        self.num_classes, self.std, self.rows, self.times = 2, std, [], []
        self.register_buffer("mean", torch.tensor([1.0, -1.0, 0.0]))

    def forward_with_variance(self, x, t, labels):
        self.rows.append(len(x))
        self.times.append(float(t[0]))
        schedule = ddpm.make_schedule()
        signal, noise = (table[t.long()].float().reshape(-1, 1, 1, 1) for table in (schedule.signal, schedule.noise))
        mean = self.mean[labels].reshape(-1, 1, 1, 1)
        eps = noise * (x - signal * mean) / (signal**2 * self.std**2 + noise**2)
        return _output_for(eps, 0.0)


def test_ancestral_sampling_reaches_the_data():
    model = GaussianDenoiser()
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4000) % 2
    samples = sample_ddpm(model, noise, labels, num_steps=100)
    for label, mean in ((0, 1.0), (1, -1.0)):
        own = samples[labels == label]
        # the standard error of the mean is 0.011; fewer steps than 1000 make the spread a little too small
        assert float(own.mean()) == pytest.approx(mean, abs=0.05)
        assert float(own.std()) == pytest.approx(0.5, abs=0.05)
    assert model.times[0] == 999 and model.times[-1] == 0


def test_ddpm_samples_do_not_depend_on_the_batch():
    noise, labels = torch.randn(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    whole = sample_ddpm(GaussianDenoiser(), noise, labels, num_steps=10, seed=3)
    part = sample_ddpm(GaussianDenoiser(), noise[4:], labels[4:], num_steps=10, seed=3, indices=[4, 5])
    other_seed = sample_ddpm(GaussianDenoiser(), noise, labels, num_steps=10, seed=4)
    torch.testing.assert_close(whole[4:], part)
    assert not torch.allclose(whole, other_seed)


@pytest.mark.parametrize(("interval", "guided_steps"), [((0.0, 1.0), [0, 1, 2, 3, 4]), ((0.5, 0.8), [1, 2])])
@pytest.mark.parametrize("power", [None, 4.0])
def test_ddpm_guidance_by_hand(interval, guided_steps, power):
    """Time is 1 - timestep / 1000: the timesteps 0, 250, 500, 749, 999 lie at 1, 0.75, 0.5, 0.251, 0.001."""
    model, schedule = GaussianDenoiser(), ddpm.make_schedule(5)
    x = noise = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels, null = torch.tensor([0, 0, 1]), torch.tensor([2, 2, 2])
    for step in reversed(range(5)):
        timestep = int(schedule.timesteps[step])
        output = model.forward_with_variance(x, torch.full((3,), float(timestep)), labels)
        if step in guided_steps:
            weak = model.forward_with_variance(x, torch.full((3,), float(timestep)), null)
            rise = 1 if power is None else (1 - math.cos(math.pi * (1 - timestep / 1000) ** power)) / 2
            eps = weak[:, :1] + (1 + 2 * rise) * (output - weak)[:, :1]
            output = torch.cat([eps, output[:, 1:]], dim=1)  # of one channel; the variance is the conditional one's
        kick = rng.normal(rng.fold(1, "step", step), range(3), (2, 2, 2)) if step else torch.zeros_like(x)
        x = ddpm.ancestral_step(schedule, output, x, step, kick)
    model.rows.clear()
    settings = {"cfg_scale": 3.0, "cfg_interval": interval, "cfg_channels": 1, "cfg_power": power}
    torch.testing.assert_close(sample_ddpm(model, noise, labels, num_steps=5, seed=1, **settings), x)
    assert model.rows == [6 if step in guided_steps else 3 for step in reversed(range(5))]


def test_ddpm_refuses_a_model_without_variance():
    with pytest.raises(UsageError, match="learned variance"):
        sample_ddpm(nn.Identity(), torch.randn(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))

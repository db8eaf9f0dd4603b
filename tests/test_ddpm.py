"""The DDPM objective: identities of the schedule and posterior, the hybrid loss, ancestral sampling."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vadit.objectives import ddpm
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
    assert short.timesteps[0] == 0 and short.timesteps[-1] == 999 and len(set(short.timesteps.tolist())) == 50
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


def test_bound_vanishes_where_the_network_is_the_posterior():
    schedule = ddpm.make_schedule()
    x1, eps, step = _data(4, 3, 2, 2), _data(4, 3, 2, 2, seed=1), torch.tensor([1, 10, 500, 999])
    x_t = schedule.signal[step].reshape(-1, 1, 1, 1) * x1 + schedule.noise[step].reshape(-1, 1, 1, 1) * eps
    exact = ddpm.variational_term(schedule, _output_for(eps, 0), x1, x_t, step)
    torch.testing.assert_close(exact, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-10)
    wrong_variance = ddpm.variational_term(schedule, _output_for(eps, 1), x1, x_t, step)
    wrong_mean = ddpm.variational_term(schedule, _output_for(eps + 1, 0), x1, x_t, step)
    assert (wrong_variance[:2] > 1e-4).all() and (wrong_mean > 1e-5).all()


def test_bound_at_step_zero_is_a_likelihood_over_bins():
    """Over all 256 values of an 8-bit picture the probabilities sum to one, whatever the network says."""
    schedule = ddpm.make_schedule()
    values = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(256, 1, 1, 1)
    x_t = torch.full_like(values, 0.3)
    output = _output_for(torch.full_like(values, 0.2), 0.5)
    bits = ddpm.variational_term(schedule, output, values, x_t, torch.zeros(256, dtype=torch.long))
    assert float(torch.exp(-bits * math.log(2)).sum()) == pytest.approx(1, abs=1e-6)


def test_hybrid_loss_trains_the_variance_only_through_the_bound():
    parameter = nn.Parameter(torch.zeros(1, 4, 1, 1))
    times = []

    def model(x, t, labels):
        times.append(t)
        return torch.cat([x, x], dim=1) * 0.1 + parameter

    x1 = torch.randn(64, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(64, dtype=torch.long)
    loss = ddpm.training_loss(model, x1, labels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.total, loss.mse + loss.variational)
    (from_bound,) = torch.autograd.grad(loss.variational, parameter, retain_graph=True)
    (from_mse,) = torch.autograd.grad(loss.mse, parameter)
    assert (from_bound[:, :2] == 0).all() and (from_bound[:, 2:] != 0).all()
    assert (from_mse[:, :2] != 0).all() and (from_mse[:, 2:] == 0).all()
    assert times[0].dtype == torch.float32 and (times[0] == times[0].round()).all()
    assert float(times[0].min()) >= 0 and 500 < float(times[0].max()) <= 999


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


def test_ddpm_guidance_runs_inside_its_interval_only():
    model, guided = GaussianDenoiser(), GaussianDenoiser()
    noise, labels = torch.randn(3, 1, 2, 2), torch.tensor([0, 0, 1])
    plain = sample_ddpm(model, noise, labels, num_steps=10)
    with_guidance = sample_ddpm(guided, noise, labels, num_steps=10, cfg_scale=3.0, cfg_interval=(0.5, 1.0))
    assert model.rows == [3] * 10 and guided.rows == [3] * 5 + [6] * 5
    assert (with_guidance[:2].mean() > plain[:2].mean()) and (with_guidance[2].mean() < plain[2].mean())


def test_ddpm_refuses_a_model_without_variance():
    with pytest.raises(UsageError, match="learned variance"):
        sample_ddpm(nn.Identity(), torch.randn(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))

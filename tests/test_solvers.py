"""Solvers against closed forms, and guidance by what the network sees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from vadit import kernels
from vadit.config import FlowSpec
from vadit.objectives import flow
from vadit.runtime.errors import RunError, UsageError
from vadit.sampling.solvers import sample_ode, sample_sde, time_grid

MEAN, STD = 1.5, 0.5


class GaussianVelocity(nn.Module):
    """The exact output for data N(MEAN * (label + 1), STD^2), for any path and prediction; null label 2: mean 0.

    Records rows and time of each call.
    """

    def __init__(self, path: str = "linear", prediction: str = "velocity") -> None:
        super().__init__()
        self.num_classes, self.path, self.prediction = 2, path, prediction
        self.means = torch.tensor([MEAN, 2 * MEAN, 0.0])
        self.calls: list[tuple[float, int]] = []

    def forward(self, x, t, labels):
        self.calls.append((float(t[0]), len(x)))
        point = flow.path_point(self.path, t, like=x)
        centred = x - point.alpha * self.means[labels].reshape(-1, 1, 1, 1)
        variance = point.alpha**2 * STD**2 + point.sigma**2
        noise = point.sigma / variance * centred
        data = self.means[labels].reshape(-1, 1, 1, 1) + point.alpha * STD**2 / variance * centred
        if self.prediction == "velocity":
            return point.d_alpha * data + point.d_sigma * noise
        return noise if self.prediction == "noise" else -noise / point.sigma


class SmallNet(nn.Module):
    """A smooth nonlinear network with two classes, whose dropout would show a forgotten eval mode."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.num_classes = 2
        self.weight = nn.Parameter(torch.randn(channels, channels, generator=generator) * 0.5)
        self.table = nn.Parameter(torch.randn(3, channels, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.calls: list[tuple[float, int]] = []

    def forward(self, x, t, labels):
        self.calls.append((float(t[0]), len(x)))
        hidden = torch.einsum("bchw,cd->bdhw", x, self.weight) + self.table[labels][:, :, None, None]
        return self.dropout(torch.sin(hidden + 3 * t.reshape(-1, 1, 1, 1)))


def _batch(size: int = 6, channels: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(size, channels, 2, 2, generator=torch.Generator().manual_seed(0))
    return noise, torch.arange(size) % 2


def _exact_transport(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The ODE of a Gaussian moves each point with its quantile: linear path, exactly mean + std * noise at t = 1."""
    return MEAN * (labels + 1).reshape(-1, 1, 1, 1) + STD * noise


# ------------------------------------------------------------------------------------------------ solvers


def test_time_grid_and_shift():
    times = time_grid(250, shift=0.3)
    assert len(times) == 250 and times.dtype == torch.float32
    for number in (0, 1, 100, 249):
        t = number / 249
        assert float(times[number]) == pytest.approx(0.3 * t / (1 - 0.7 * t), rel=1e-6)
    torch.testing.assert_close(time_grid(5), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    with pytest.raises(UsageError, match="num_steps is 1"):
        time_grid(1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_at_its_order(method, order):
    noise, labels = (part.double() if part.is_floating_point() else part for part in _batch())
    exact = _exact_transport(noise, labels)

    def error(num_steps: int) -> float:
        samples = sample_ode(GaussianVelocity(), noise, labels, method=method, num_steps=num_steps)
        return float((samples - exact).abs().max())

    assert math.log2(error(41) / error(81)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_dopri5_reaches_the_data_on_every_path(path, prediction):
    noise, labels = _batch(64)
    model = GaussianVelocity(path, prediction)
    spec = FlowSpec(path=path, prediction=prediction)
    samples = sample_ode(model, noise, labels, method="dopri5", rtol=1e-5, flow=spec)
    low, high = flow.sampling_interval(spec)
    ends = [flow.path_point(path, torch.tensor(t)) for t in (low, high)]
    spread = [torch.sqrt(point.alpha**2 * STD**2 + point.sigma**2) for point in ends]
    means = (MEAN * (labels + 1)).reshape(-1, 1, 1, 1)
    expected = ends[1].alpha * means + spread[1] / spread[0] * (noise - ends[0].alpha * means)
    torch.testing.assert_close(samples, expected, rtol=0, atol=2e-3)


def test_evaluations_per_solver():
    noise, labels = _batch()
    for method, evaluations in (("euler", 9), ("heun", 18)):
        model = GaussianVelocity()
        sample_ode(model, noise, labels, method=method, num_steps=10)
        assert len(model.calls) == evaluations


def test_unconditional_pass_runs_only_where_guidance_acts():
    noise, labels = _batch()
    for scale, interval, expected in (
        (1.0, (0.0, 1.0), [6] * 10),
        (4.0, (0.0, 1.0), [12] * 10),
        (4.0, (0.25, 1.0), [6] * 3 + [12] * 7),
        (4.0, (0.25, 0.55), [6] * 3 + [12] * 3 + [6] * 4),
    ):
        model = SmallNet()
        sample_ode(model, noise, labels, num_steps=11, cfg_scale=scale, cfg_interval=interval)
        assert [rows for _, rows in model.calls] == expected
        adaptive = SmallNet()
        sample_ode(adaptive, noise, labels, method="dopri5", cfg_scale=scale, cfg_interval=interval)
        for t, rows in adaptive.calls:
            acts = scale != 1 and interval[0] <= t and (t <= interval[1] or interval[1] == 1)
            assert rows == (12 if acts else 6), f"{rows} rows at t {t}"


def test_interval_ends_are_inside_in_fp32():
    noise, labels = _batch()
    model = SmallNet()
    # the points are k / 10 in fp32, not equal to the doubles 0.3 and 0.7
    sample_ode(model, noise, labels, num_steps=11, cfg_scale=2.0, cfg_interval=(0.3, 0.7))
    assert [rows for _, rows in model.calls] == [6] * 3 + [12] * 5 + [6] * 2


def _guided_by_hand(model, noise, labels, scale, channels):
    x, times = noise, torch.linspace(0, 1, 11)
    for t, t_next in itertools.pairwise(times):
        strong = model(x, t.expand(len(x)), labels)
        weak = model(x, t.expand(len(x)), torch.full_like(labels, 2))
        output = strong.clone()
        output[:, :channels] = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
        x = x + (t_next - t) * output
    return x.detach()


@pytest.mark.parametrize("channels", [1, 3, 4, None])
def test_guidance_formula_and_channels(channels):
    noise, labels = _batch()
    expected = _guided_by_hand(SmallNet().eval(), noise, labels, 3.0, channels)
    samples = sample_ode(SmallNet(), noise, labels, num_steps=11, cfg_scale=3.0, cfg_channels=channels)
    torch.testing.assert_close(samples, expected)


def test_dopri5_controls_its_steps_on_both_halves():
    """The doubled state changes which steps are taken, not what is integrated: tight tolerances agree with Euler."""
    noise, labels = _batch()
    settings = {"cfg_scale": 3.0, "cfg_channels": 3}
    fine = sample_ode(SmallNet().double(), noise.double(), labels, method="heun", num_steps=400, **settings)
    model = SmallNet().double()
    samples = sample_ode(model, noise.double(), labels, method="dopri5", atol=1e-8, rtol=1e-8, **settings)
    torch.testing.assert_close(samples, fine, rtol=1e-4, atol=1e-4)
    assert {rows for _, rows in model.calls} == {12} and samples.shape == noise.shape


def test_autoguidance_asks_the_weaker_network_for_the_same_class():
    noise, labels = _batch()
    strong, weak = GaussianVelocity(), SmallNet()
    samples = sample_ode(strong, noise, labels, num_steps=11, cfg_scale=2.0, cfg_interval=(0.45, 1), guide=weak)
    assert [rows for _, rows in strong.calls] == [6] * 10 and [rows for _, rows in weak.calls] == [6] * 5
    t, x = torch.full((6,), 0.9), noise
    by_hand = weak.eval()(x, t, labels) + 2.0 * (strong(x, t, labels) - weak(x, t, labels))
    last = sample_ode(
        strong, noise, labels, num_steps=2, cfg_scale=2.0, guide=lambda x, t, labels: weak(x, t + 0.9, labels)
    )
    start = torch.zeros(6)
    expected = noise + weak(x, t, labels) + 2.0 * (strong(x, start, labels) - weak(x, t, labels))
    torch.testing.assert_close(last, expected.detach())
    assert not torch.allclose(samples, by_hand)


def test_sampling_turns_dropout_off_and_restores_the_mode():
    noise, labels = _batch()
    model = SmallNet()
    first = sample_ode(model, noise, labels, num_steps=5)
    assert model.training and model.dropout.training and not first.requires_grad
    torch.testing.assert_close(sample_ode(model, noise, labels, num_steps=5), first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk4"}, "'rk4'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_channels": 5}, "cfg_channels is 5"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    noise, labels = _batch()
    with pytest.raises(UsageError, match=message):
        sample_ode(SmallNet(), noise, labels, **settings)
    with pytest.raises(UsageError, match="labels"):
        sample_ode(SmallNet(), noise, labels[:2])


def test_dopri5_reports_an_explosion_as_a_run_error():
    model = GaussianVelocity()
    model.forward = lambda x, t, labels: x * x * 1e3
    with pytest.raises(RunError, match="dopri5"):
        sample_ode(model, *_batch(), method="dopri5")


def test_dopri5_takes_plain_torch_ops():
    """It makes 5e-5 of the 3e-7 by which compiled ops round otherwise: too much for parity with the reference."""
    noise, labels = _batch()
    model, seen = SmallNet(), []
    model.register_forward_pre_hook(lambda *_: seen.append(set(kernels.backends().values())))
    before = kernels.backends()
    with kernels.dispatch.setting("auto"):
        sample_ode(model, noise, labels, method="dopri5")
    assert len(seen) > 6 and all(backends == {"reference"} for backends in seen)
    assert kernels.backends() == before


@pytest.mark.parametrize("last_step", ["mean", "tweedie", "euler", "none"])
@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"])
def test_sde_has_the_marginals_of_the_data(form, last_step):
    noise = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.long)
    samples = sample_sde(
        GaussianVelocity(), noise, labels, num_steps=100, diffusion_form=form, last_step=last_step, seed=1
    )
    # standard error of the mean 0.008; the bias of the last step, which adds no noise, is up to 17% of the spread
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(samples.std()) == pytest.approx(STD, abs=0.09 if last_step == "mean" else 0.04)


def test_sde_noise_is_a_function_of_seed_index_and_step():
    noise, labels = _batch(6, channels=1)
    whole = sample_sde(GaussianVelocity(), noise, labels, num_steps=10, seed=5)
    part = sample_sde(GaussianVelocity(), noise[3:], labels[3:], num_steps=10, seed=5, indices=[3, 4, 5])
    torch.testing.assert_close(whole[3:], part)
    assert not torch.allclose(whole, sample_sde(GaussianVelocity(), noise, labels, num_steps=10, seed=6))

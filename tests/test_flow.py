"""The flow and DDPM objectives against closed forms and naive loops, and ancestral sampling."""

import math

import pytest
import torch
from torch import nn
from training_plain import flow_terms

from vadit.config import FlowSpec
from vadit.objectives import ddpm, flow
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.sampling.solvers import sample_ddpm

PATHS = ("linear", "gvp", "vp")


def _pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_interpolation(path):
    x0, x1 = _pair(6, 3, 2, 2)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    step = 1e-6
    before, _ = flow.interpolate(path, x0, x1, t - step)
    after, _ = flow.interpolate(path, x0, x1, t + step)
    _, velocity = flow.interpolate(path, x0, x1, t)
    torch.testing.assert_close(velocity, (after - before) / (2 * step), rtol=1e-7, atol=1e-7)


def test_paths_are_the_papers():
    x0, x1 = _pair(3, 3, 2, 2)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    log_alpha = -((1 - t) ** 2) * (20 - 0.1) / 4 - (1 - t) * 0.1 / 2  # Song et al. 2021: beta from 0.1 to 20
    shares = {
        "linear": (t, 1 - t),
        "gvp": (torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)),
        "vp": (log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()),
    }
    for path, (alpha, sigma) in shares.items():
        x_t, velocity = flow.interpolate(path, x0, x1, t)
        expected = alpha.reshape(3, 1, 1, 1) * x1 + sigma.reshape(3, 1, 1, 1) * x0
        torch.testing.assert_close(x_t, expected, rtol=1e-9, atol=1e-9)
        if path == "linear":
            torch.testing.assert_close(velocity, x1 - x0)


@pytest.mark.parametrize("path", PATHS)
def test_conversions_agree_with_a_gaussian_in_closed_form(path):
    """Data N(m, s^2): score, noise and velocity of the marginal are known, so each must give the others."""
    mean, std = 0.7, 0.4
    x, _ = _pair(5, 2, 2, 2)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    point = flow.path_point(path, t, like=x)
    variance = point.alpha**2 * std**2 + point.sigma**2
    score = -(x - point.alpha * mean) / variance
    noise = -point.sigma * score
    data = mean + point.alpha * std**2 / variance * (x - point.alpha * mean)
    velocity = point.d_alpha * data + point.d_sigma * noise
    outputs = {"velocity": velocity, "noise": noise, "score": score}
    for prediction, output in outputs.items():
        torch.testing.assert_close(flow.to_velocity(path, prediction, output, x, t), velocity)
        torch.testing.assert_close(flow.to_score(path, prediction, output, x, t), score)


def test_velocity_loss_equals_a_naive_loop_and_is_taken_in_fp32():
    prediction, target = _pair(3, 4, 2, 5)
    mse, direction = flow.velocity_loss(prediction, target)
    for b in range(3):
        errors, directions = [], []
        for row in range(2):
            for column in range(5):
                p, v = prediction[b, :, row, column], target[b, :, row, column]
                errors.append(float(((p - v) ** 2).mean()))
                directions.append(1 - float(p @ v) / math.sqrt(float(p @ p) * float(v @ v)))
        assert float(mse[b]) == pytest.approx(sum(errors) / 10, rel=1e-10)
        assert float(direction[b]) == pytest.approx(sum(directions) / 10, rel=1e-10)
    prediction, target = (tensor.to(torch.bfloat16) for tensor in _pair(2, 8, 4, 4))
    errors = flow.velocity_loss(prediction, target)
    exact = flow.velocity_loss(prediction.double(), target.double())
    for found, expected in zip(errors, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_law_of_time_and_scores_at_pure_noise():
    t = flow.sample_time(FlowSpec(), 40_000, 0, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(0.0, 1.0)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = torch.sigmoid(normal.icdf(torch.tensor(level))).item()
        # the share below a quantile has standard deviation sqrt(p (1 - p) / n) <= 0.0025; 4 of them
        assert abs(float((t < expected).float().mean()) - level) < 0.01
    spec = FlowSpec(uniform_after_images=1000)

    def share_in_the_middle(images_seen: int) -> float:
        t = flow.sample_time(spec, 40_000, images_seen, torch.Generator().manual_seed(2))
        return float(((t > 0.25) & (t < 0.75)).float().mean())

    logit_normal_share = 0.728  # P(|n| < ln 3) of a standard normal
    assert share_in_the_middle(999) == pytest.approx(logit_normal_share, abs=0.01)
    assert share_in_the_middle(1000) == pytest.approx(0.5, abs=0.01)
    assert flow.sample_time(FlowSpec(time_law="uniform"), 10_000, 0).mean().item() == pytest.approx(0.5, abs=0.02)
    x, velocity = _pair(2, 1, 2, 2)
    score = flow.to_score("linear", "velocity", velocity, x, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(score, -x)


@pytest.mark.parametrize(
    ("spec", "training", "sampling"),
    [
        (FlowSpec(), (0, 1), (0, 1)),
        (FlowSpec(path="gvp", prediction="noise"), (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        (FlowSpec(path="vp"), (0, 1 - 1e-5), (0, 1 - 1e-3)),
    ],
)
def test_intervals_keep_away_from_singular_ends(spec, training, sampling):
    assert flow.training_interval(spec) == pytest.approx(training)
    assert flow.sampling_interval(spec) == pytest.approx(sampling)
    unit, t = (flow.sample_time(each, 100, 0, torch.Generator().manual_seed(0)) for each in (FlowSpec(), spec))
    torch.testing.assert_close(t, training[0] + (training[1] - training[0]) * unit)


def test_sde_intervals_and_diffusion_forms():
    assert flow.sde_interval(FlowSpec(), "sigma", 0.04) == pytest.approx((0, 0.96))
    assert flow.sde_interval(FlowSpec(), "sigma", 0) == pytest.approx((0, 1))
    assert flow.sde_interval(FlowSpec(), "sbdm", 0.04) == pytest.approx((1e-3, 0.96))
    assert flow.sde_interval(FlowSpec(path="vp"), "sbdm", 0) == pytest.approx((0, 1 - 1e-3))
    t = torch.tensor(0.25, dtype=torch.float64)
    expected = {
        "constant": 1.0,
        "sbdm": 0.75 / 0.25,
        "sigma": 0.75,
        "linear": 0.75,
        "decreasing": 0.25 * (math.cos(math.pi / 4) + 1) ** 2,
        "increasing_decreasing": 0.5,
    }
    for form, value in expected.items():
        assert float(flow.sde_diffusion("linear", form, t)) == pytest.approx(value)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("weighting", ["none", "velocity", "likelihood"])
def test_training_loss_vanishes_for_a_perfect_network(path, prediction, weighting):
    """With a single known datum x1 = 0 the noise is x_t / sigma, hence every output is known."""
    spec = FlowSpec(path=path, prediction=prediction, loss_weighting=weighting)

    def oracle(x_t, t, labels):
        point = flow.path_point(path, t, like=x_t)
        noise = x_t / point.sigma
        return {"velocity": point.d_sigma * noise, "noise": noise, "score": -noise / point.sigma}[prediction]

    x1, labels = torch.zeros(8, 4, 2, 2, dtype=torch.float64), torch.zeros(8, dtype=torch.long)
    loss = flow_terms(spec, oracle, x1, labels, 0, torch.Generator().manual_seed(0))
    assert float(loss["loss"]) == pytest.approx(0, abs=1e-8)
    worse = flow_terms(spec, lambda x, t, y: oracle(x, t, y) * 0.5, x1, labels, 0, torch.Generator().manual_seed(0))
    assert float(worse["loss"]) > 1e-3


def test_loss_weights_are_sits():
    """Linear path: diffusion g = (1 - t) / t, so velocity weighting is 1 / t^2, likelihood 1 / (t (1 - t))."""
    x0 = torch.zeros(3, 2, 1, 1, dtype=torch.float64)
    output, t = torch.ones_like(x0), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    weights = {"none": torch.ones_like(t), "velocity": 1 / t**2, "likelihood": 1 / (t * (1 - t))}
    for weighting, weight in weights.items():
        noise = FlowSpec(prediction="noise", loss_weighting=weighting)
        score = FlowSpec(prediction="score", loss_weighting=weighting)
        torch.testing.assert_close(flow.denoising_loss(noise, output, x0, t), weight)
        torch.testing.assert_close(flow.denoising_loss(score, output, x0, t), weight * (1 - t) ** 2)


def test_direction_loss_can_be_left_out():
    x1, labels = torch.randn(4, 3, 2, 2), torch.zeros(4, dtype=torch.long)

    def loss(direction: bool) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        spec = FlowSpec(direction_loss=direction)
        return flow_terms(spec, lambda x, t, y: x, x1, labels, 0, generator)

    with_direction, without = loss(True), loss(False)
    assert float(with_direction["mse"]) == float(without["mse"]) == float(without["loss"])
    assert float(with_direction["direction"]) > 0.1 and float(without["direction"]) == 0
    assert float(with_direction["loss"]) == pytest.approx(float(with_direction["mse"] + with_direction["direction"]))


def _data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _output_for(eps: torch.Tensor, variance_share: float) -> torch.Tensor:
    """A network's output with this noise and this place between the log-variances (0: the posterior's, 1: beta)."""
    return torch.cat([eps, torch.full_like(eps, 2 * variance_share - 1)], dim=1)


def test_schedule_is_linear_beta_in_any_number_of_steps():
    schedule = ddpm.make_schedule()
    betas = schedule.log_variance_high.exp()
    torch.testing.assert_close(betas, torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    torch.testing.assert_close(schedule.signal**2 + schedule.noise**2, torch.ones(1000, dtype=torch.float64))
    assert float(schedule.signal[-1] ** 2) == pytest.approx(4.04e-5, rel=0.01)
    full, short = ddpm.make_schedule(), ddpm.make_schedule(50)
    assert short.timesteps.tolist() == [round(999 * number / 49) for number in range(50)]
    assert ddpm.make_schedule(2).timesteps.tolist() == [0, 999]
    torch.testing.assert_close(short.signal, full.signal[short.timesteps])
    # the product of the new 1 - beta is the kept signal squared
    torch.testing.assert_close(torch.cumprod(1 - short.log_variance_high.exp(), 0), short.signal**2)


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
    for steps in (1, 1001):
        pytest.raises(UsageError, sample_ddpm, GaussianDenoiser(), noise, labels, num_steps=steps).match(str(steps))
    part = sample_ddpm(GaussianDenoiser(), noise[4:], labels[4:], num_steps=10, seed=3, indices=[4, 5])
    other_seed = sample_ddpm(GaussianDenoiser(), noise, labels, num_steps=10, seed=4)
    torch.testing.assert_close(whole[4:], part)
    assert not torch.allclose(whole, other_seed)
    with pytest.raises(UsageError, match="learned variance"):
        sample_ddpm(nn.Identity(), torch.randn(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))


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

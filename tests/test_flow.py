"""Paths, law of t, losses and conversions of the flow objective, against closed forms and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from training_plain import flow_terms

from vadit.config import FlowSpec
from vadit.objectives import flow

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


def test_score_from_velocity_is_finite_at_pure_noise():
    x, velocity = _pair(2, 1, 2, 2)
    score = flow.to_score("linear", "velocity", velocity, x, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(score, -x)


def test_velocity_loss_equals_a_naive_loop():
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


def test_velocity_loss_of_bf16_predictions_is_taken_in_fp32():
    prediction, target = (tensor.to(torch.bfloat16) for tensor in _pair(2, 8, 4, 4))
    errors = flow.velocity_loss(prediction, target)
    exact = flow.velocity_loss(prediction.double(), target.double())
    for found, expected in zip(errors, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_logit_normal_quantiles():
    t = flow.sample_time(FlowSpec(), 40_000, 0, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(0.0, 1.0)
    for level in (0.05, 0.25, 0.5, 0.75, 0.95):
        expected = torch.sigmoid(normal.icdf(torch.tensor(level))).item()
        # the share below a quantile has standard deviation sqrt(p (1 - p) / n) <= 0.0025; 4 of them
        assert abs(float((t < expected).float().mean()) - level) < 0.01


def test_time_becomes_uniform_at_the_image_count():
    spec = FlowSpec(uniform_after_images=1000)

    def share_in_the_middle(images_seen: int) -> float:
        t = flow.sample_time(spec, 40_000, images_seen, torch.Generator().manual_seed(2))
        return float(((t > 0.25) & (t < 0.75)).float().mean())

    logit_normal_share = 0.728  # P(|n| < ln 3) of a standard normal
    assert share_in_the_middle(999) == pytest.approx(logit_normal_share, abs=0.01)
    assert share_in_the_middle(1000) == pytest.approx(0.5, abs=0.01)
    assert flow.sample_time(FlowSpec(time_law="uniform"), 10_000, 0).mean().item() == pytest.approx(0.5, abs=0.02)


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


def test_sde_interval_leaves_the_last_step_and_the_singular_start():
    assert flow.sde_interval(FlowSpec(), "sigma", 0.04) == pytest.approx((0, 0.96))
    assert flow.sde_interval(FlowSpec(), "sigma", 0) == pytest.approx((0, 1))
    assert flow.sde_interval(FlowSpec(), "sbdm", 0.04) == pytest.approx((1e-3, 0.96))
    assert flow.sde_interval(FlowSpec(path="vp"), "sbdm", 0) == pytest.approx((0, 1 - 1e-3))


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

    def loss(direction: bool) -> flow.FlowLoss:
        generator = torch.Generator().manual_seed(3)
        spec = FlowSpec(direction_loss=direction)
        return flow_terms(spec, lambda x, t, y: x, x1, labels, 0, generator)

    with_direction, without = loss(True), loss(False)
    assert float(with_direction["mse"]) == float(without["mse"]) == float(without["loss"])
    assert float(with_direction["direction"]) > 0.1 and float(without["direction"]) == 0
    assert float(with_direction["loss"]) == pytest.approx(float(with_direction["mse"] + with_direction["direction"]))


def test_sde_diffusion_forms():
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

"""Solvers against closed forms, and guidance by what the network sees."""

import itertools
import math

import pytest
import torch
from model_help import SmallNet
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vadit import kernels
from vadit.config import DiTSpec, FlowSpec, SampleSpec
from vadit.models.dit import LightningDiT
from vadit.objectives import flow
from vadit.runtime import rng
from vadit.runtime.errors import RunError, UsageError
from vadit.sampling import solvers
from vadit.sampling.solvers import Guidance, sample_ddpm, sample_ode, sample_sde, time_grid

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


def _batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.randn(size, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    return noise, torch.arange(size) % 2


def _exact_transport(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The ODE of a Gaussian moves each point with its quantile: linear path, exactly mean + std * noise at t = 1."""
    return MEAN * (labels + 1).reshape(-1, 1, 1, 1) + STD * noise


def test_time_grid_and_shift():
    times = time_grid(250, shift=0.3)
    assert len(times) == 250 and times.dtype == torch.float32
    for number in (0, 1, 100, 249):
        t = number / 249
        assert float(times[number]) == pytest.approx(0.3 * t / (1 - 0.7 * t), rel=1e-6)
    torch.testing.assert_close(time_grid(5), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    assert time_grid(2, 0.1, 0.9).tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_at_its_order(method, order):
    noise, labels = (part.double() if part.is_floating_point() else part for part in _batch())
    exact = _exact_transport(noise, labels)

    def error(num_steps: int) -> float:
        model = GaussianVelocity()
        samples = sample_ode(model, noise, labels, method=method, num_steps=num_steps)
        assert len(model.calls) == order * (num_steps - 1)
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


def test_dopri5_meets_its_tolerances():
    noise, labels = _batch(64)
    errors, calls = [], []
    for settings in ({}, {"atol": 1e-2, "rtol": 1e-2}, {"atol": 1e-6, "rtol": 1e-6}):
        model = GaussianVelocity()
        samples = sample_ode(model, noise, labels, method="dopri5", **settings)
        errors.append(float((samples - _exact_transport(noise, labels)).abs().max()))
        calls.append(len(model.calls))
    assert errors[2] < 1e-4 < errors[0] < 0.1 < errors[1] and calls[1] < calls[0] < calls[2]


@pytest.mark.parametrize(
    ("slope", "settings", "words"),
    [
        (lambda x, t: x * x * 1e3, {}, "100 steps with atol 1e-06"),
        (lambda x, t: x * math.nan, {}, "no step at t = 0 meets"),
        (lambda x, t: torch.where(t > 0.5, math.nan, x), {}, "no step at t = 0.1.* meets"),
        (
            lambda x, t: torch.randn_like(x) * 100,
            {"rtol": 1e-7},
            "100 steps with atol 1e-06 and rtol 1e-07 only lead to",
        ),
    ],
)
def test_dopri5_ends_where_it_gets_nowhere(slope, settings, words, monkeypatch):
    """By its own checks, which come before torchdiffeq's asserts: python -O changes nothing."""
    monkeypatch.setattr(solvers, "MAX_ADAPTIVE_STEPS", 100)
    model = GaussianVelocity()
    model.forward = lambda x, t, labels: slope(x, t[:, None, None, None])
    pytest.raises(RunError, sample_ode, model, *_batch(), method="dopri5", **settings).match(f"dopri5 ends: {words}")


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
@pytest.mark.parametrize("form", ["sigma", "constant"])
def test_sde_is_euler_maruyama_by_hand(form, last_step):
    noise, labels = _batch(3)
    means = (MEAN * (labels + 1)).reshape(-1, 1, 1, 1)

    def exact(x, t):
        """Velocity, score and the data's expectation at t on the linear path."""
        variance = t**2 * STD**2 + (1 - t) ** 2
        score = -(x - t * means) / variance
        data = means - t * STD**2 * score
        return data + (1 - t) * score, score, data

    high = 1.0 if last_step == "none" else 0.96
    times = [high * 0.3 * u / (1 - 0.7 * u) for u in (0, 0.25, 0.5, 0.75, 1)]
    x = noise
    for step, (t, after) in enumerate(itertools.pairwise(times)):
        w = 1 - t if form == "sigma" else 1.0
        velocity, score, _ = exact(x, t)
        kick = rng.normal(rng.fold(5, "step", step), [7, 8, 9], (4, 2, 2))
        x = x + (after - t) * (velocity + w * score) + math.sqrt(2 * w * (after - t)) * kick
    velocity, score, data = exact(x, high)
    w = 1 - high if form == "sigma" else 1.0
    ends = {"mean": x + 0.04 * (velocity + w * score), "euler": x + 0.04 * velocity, "tweedie": data, "none": x}
    settings = {"num_steps": 5, "sde_diffusion": form, "sde_last_step": last_step, "timestep_shift": 0.3}
    found = sample_sde(GaussianVelocity(), noise, labels, seed=5, indices=[7, 8, 9], **settings)
    torch.testing.assert_close(found, ends[last_step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing"])
def test_sde_has_the_marginals_of_the_data(form):
    noise = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(60, dtype=torch.long)
    settings = {"num_steps": 100, "sde_diffusion": form, "sde_last_step": "euler"}
    samples = sample_sde(GaussianVelocity(), noise, labels, seed=1, **settings)
    # standard error of the mean 0.008
    assert float(samples.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(samples.std()) == pytest.approx(STD, abs=0.04)
    part = sample_sde(GaussianVelocity(), noise[3:6], labels[3:6], seed=1, indices=[3, 4, 5], **settings)
    torch.testing.assert_close(samples[3:6], part)


def test_unconditional_pass_runs_only_where_guidance_acts():
    noise, labels = _batch()
    for scale, interval, expected in (
        (1.0, (0.0, 1.0), [6] * 10),
        (4.0, (0.0, 1.0), [12] * 10),
        (4.0, (0.25, 1.0), [6] * 3 + [12] * 7),
        (2.0, (0.25, 0.55), [6] * 3 + [12] * 3 + [6] * 4),
        # the points are k / 10 in fp32, not equal to the doubles 0.3 and 0.7: the ends are inside
        (2.0, (0.3, 0.7), [6] * 3 + [12] * 5 + [6] * 2),
        (2.0, (0.5, 0.5), [6] * 5 + [12] + [6] * 4),
    ):
        model = SmallNet()
        sample_ode(model, noise, labels, num_steps=11, cfg_scale=scale, cfg_interval=interval)
        assert [rows for _, rows in model.calls] == expected
        for channels in (None, 4):  # all are not a part: the state is not doubled
            adaptive = SmallNet()
            settings = {"cfg_scale": scale, "cfg_interval": interval, "cfg_channels": channels}
            sample_ode(adaptive, noise, labels, method="dopri5", **settings)
            assert any(t > 1 for t, _ in adaptive.calls), "it steps beyond the end"
            for t, rows in adaptive.calls:
                acts = scale != 1 and interval[0] <= t and (t <= interval[1] or interval[1] == 1)
                assert rows == (12 if acts else 6), f"{rows} rows at t {t}"


def _scale_at(t: float, scale: float, power: float | None) -> float:
    return scale if power is None else 1 + (scale - 1) * (1 - math.cos(math.pi * t**power)) / 2


@pytest.mark.parametrize(
    ("channels", "power"), [(None, None), (1, None), (3, None), (4, None), (3, 4.0), (None, 1.0), (None, 0.5)]
)
def test_guidance_by_hand(channels, power):
    """Of the first channels alone, by a constant scale or MDT's power-cosine schedule (Gao et al. 2023)."""
    noise, labels = _batch()
    model, x = SmallNet().eval(), noise
    for t, t_next in itertools.pairwise(torch.linspace(0, 1, 11)):
        strong = model(x, t.expand(len(x)), labels)
        weak = model(x, t.expand(len(x)), torch.full_like(labels, 2))
        output = strong.clone()
        scale = _scale_at(float(t), 3.0, power)
        output[:, :channels] = weak[:, :channels] + scale * (strong[:, :channels] - weak[:, :channels])
        x = x + (t_next - t) * output
    settings = {"num_steps": 11, "cfg_scale": 3.0, "cfg_channels": channels, "cfg_power": power}
    torch.testing.assert_close(sample_ode(SmallNet(), noise, labels, **settings), x.detach())


def test_every_sampler_takes_a_rising_scale():
    noise, labels = _batch()

    def both(sample, **options):
        constant, rising = (sample(SmallNet(), noise, labels, cfg_scale=3.0, cfg_power=s, **options) for s in (None, 4))
        return (constant - rising).abs().max()

    assert both(sample_ode, method="heun", num_steps=4) > 1e-2
    assert both(sample_ode, method="dopri5", cfg_channels=3) > 1e-2
    assert both(sample_sde, num_steps=4) > 1e-2
    rising = Guidance(SampleSpec(cfg_scale=3.0, cfg_power=2.0))
    assert [rising.scale(torch.tensor(t)) for t in (-0.1, 0.0, 1.0, 1.5)] == [1.0, 1.0, 3.0, 3.0]


def test_dopri5_controls_its_steps_on_both_halves():
    """The doubled state changes which steps are taken, not what is integrated: tight tolerances agree with Heun."""
    noise, labels = _batch()
    settings = {"cfg_scale": 3.0, "cfg_channels": 3, "cfg_interval": (0.1, 0.6)}
    fine = sample_ode(SmallNet().double(), noise.double(), labels, method="heun", num_steps=801, **settings)
    model = SmallNet().double()
    samples = sample_ode(model, noise.double(), labels, method="dopri5", atol=1e-8, rtol=1e-8, **settings)
    torch.testing.assert_close(samples, fine, rtol=1e-2, atol=5e-3)  # the jumps at the ends cost Heun its order
    assert {rows for _, rows in model.calls} == {12} and samples.shape == noise.shape
    alone = SmallNet()
    sample_ode(alone, noise, labels, method="dopri5", guide=SmallNet(), **settings)
    sample_ode(alone, noise, labels, method="dopri5", **settings | {"cfg_scale": 1.0})
    assert {rows for _, rows in alone.calls} == {6}, "a weaker network and no guidance need no second half"


def test_autoguidance_asks_the_weaker_network_for_the_same_class():
    noise, labels = _batch()
    strong, weak = GaussianVelocity(), SmallNet()
    sample_ode(strong, noise, labels, num_steps=11, cfg_scale=2.0, cfg_interval=(0.45, 1), guide=weak)
    assert [rows for _, rows in strong.calls] == [6] * 10 and [rows for _, rows in weak.calls] == [6] * 5
    found = sample_ode(strong, noise, labels, num_steps=2, cfg_scale=2.0, guide=weak)
    start = torch.zeros(6)
    expected = noise + weak.eval()(noise, start, labels) * (1 - 2.0) + 2.0 * strong(noise, start, labels)
    torch.testing.assert_close(found, expected.detach())


def test_sampling_restores_the_mode_and_passes_faults_on():
    noise, labels = _batch()
    model = SmallNet()
    first = sample_ode(model, noise, labels, num_steps=5)
    assert model.training and model.dropout.training and not first.requires_grad
    torch.testing.assert_close(sample_ode(model, noise, labels, num_steps=5), first)

    def broken(x, t, labels):
        raise AssertionError("of the network")

    pytest.raises(AssertionError, sample_ode, broken, *_batch(), method="dopri5").match("of the network")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "rk4"}, "'rk4'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"cfg_channels": 5}, "cfg_channels is 5"),
        ({"cfg_channels": 0}, "cfg_channels is 0"),
        ({"cfg_interval": (0.5, 0.2)}, "cfg_interval"),
        ({"cfg_power": 0.0}, "cfg_power is 0"),
        ({"method": "dopri5", "atol": 1e-30, "rtol": 0.0}, "atol is 1e-30 and rtol 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    noise, labels = _batch()
    pytest.raises(UsageError, sample_ode, SmallNet(), noise, labels, **settings).match(message)
    pytest.raises(UsageError, sample_ode, SmallNet(), noise, labels[:2]).match("labels")


class _Copies(TorchDispatchMode):
    """Counts what goes from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        self.count += copies and output.device.type == "meta" and any(t.device.type == "cpu" for t in tensors)
        return output


@pytest.mark.parametrize("guided", ["null label", "network"])
@pytest.mark.parametrize("method", ["euler", "heun", "euler_maruyama", "ddpm"])
def test_no_step_waits_for_its_device(method, guided):
    """On the meta device, where a value that the host asks for does not exist, as it does not yet on a busy GPU."""
    spec = DiTSpec(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=2, learn_sigma=True)
    with torch.device("meta"):
        model = LightningDiT(spec).eval()
        noise, labels = torch.empty(2, 4, 4, 4), torch.empty(2, dtype=torch.int64)
    guide = model if guided == "network" else None
    sampler = SampleSpec(method=method, cfg_scale=2.0, cfg_interval=(0.3, 0.9), cfg_power=4.0)
    counts = []
    for steps in (4, 6):
        solve = {"ddpm": sample_ddpm, "euler_maruyama": sample_sde}.get(method, sample_ode)
        with _Copies() as copies:
            assert solve(model, noise, labels, sampler, guide=guide, num_steps=steps).shape == noise.shape
        counts.append(copies.count)
    assert counts[1] - counts[0] == (2 if method in ("euler_maruyama", "ddpm") else 0), "a step's noise, and no more"

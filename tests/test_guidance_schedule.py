"""The power-cosine guidance of MDT (Gao et al. 2023): a scale that rises while noise becomes data, by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from vadit.config import DiTSpec, SampleSpec
from vadit.objectives import ddpm
from vadit.runtime import rng
from vadit.runtime.errors import UsageError
from vadit.sampling.draw import draw, sampler_name
from vadit.sampling.solvers import Guidance, sample_ddpm, sample_ode, sample_sde


class Net(nn.Module):
    """A smooth network with two classes, for both kinds of sampling."""

    num_classes = 2
    spec = DiTSpec(input_size=2, in_channels=4, num_classes=2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.sin(x + (labels + t / 7).reshape(-1, 1, 1, 1))

    def forward_with_variance(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        output = self(x, t, labels)
        return torch.cat([output, output.cos()], dim=1)


NOISE = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0])


def scale_at(t: float, scale: float, power: float) -> float:
    return (scale - 1) * (1 - math.cos(math.pi * t**power)) / 2 + 1


def guided(t: float, strong: Tensor, weak: Tensor, channels: int) -> Tensor:
    part = weak[:, :channels] + scale_at(t, 3.8, 4) * (strong[:, :channels] - weak[:, :channels])
    return torch.cat([part, strong[:, channels:]], dim=1)


@pytest.mark.parametrize("channels", [None, 3])
def test_euler_with_a_rising_scale(channels: int | None) -> None:
    x, net, null = NOISE, Net(), torch.full_like(LABELS, 2)
    times = torch.linspace(0, 1, 6)
    for t, after in itertools.pairwise(times):
        at = t.expand(3)
        x = x + (after - t) * guided(float(t), net(x, at, LABELS), net(x, at, null), channels or 4)
    found = sample_ode(net, NOISE, LABELS, num_steps=6, cfg_scale=3.8, cfg_power=4.0, cfg_channels=channels)
    torch.testing.assert_close(found, x)
    constant = sample_ode(net, NOISE, LABELS, num_steps=6, cfg_scale=3.8, cfg_channels=channels)
    assert (found - constant).abs().max() > 1e-2


def test_ddpm_with_a_rising_scale() -> None:
    net, null, schedule = Net(), torch.full_like(LABELS, 2), ddpm.make_schedule(5)
    x = NOISE
    for step in reversed(range(5)):
        timestep = int(schedule.timesteps[step])
        at = torch.full((3,), float(timestep))
        strong, weak = (net.forward_with_variance(x, at, labels) for labels in (LABELS, null))
        kick = rng.normal(rng.fold(1, "step", step), range(3), (4, 2, 2)) if step else torch.zeros_like(x)
        x = ddpm.ancestral_step(schedule, guided(1 - timestep / 1000, strong, weak, 4), x, step, kick)
    found = sample_ddpm(net, NOISE, LABELS, num_steps=5, cfg_scale=3.8, cfg_power=4.0, seed=1)
    torch.testing.assert_close(found, x)


def test_every_sampler_takes_it_and_none_is_the_constant_scale() -> None:
    net = Net()
    for options in ({"method": "heun", "num_steps": 4}, {"method": "dopri5", "cfg_channels": 3}):
        constant = sample_ode(net, NOISE, LABELS, cfg_scale=3.0, **options)
        assert not torch.allclose(sample_ode(net, NOISE, LABELS, cfg_scale=3.0, cfg_power=4.0, **options), constant)
    constant = sample_sde(net, NOISE, LABELS, num_steps=4, cfg_scale=3.0)
    assert not torch.allclose(sample_sde(net, NOISE, LABELS, num_steps=4, cfg_scale=3.0, cfg_power=4.0), constant)
    guidance = Guidance(scale=3.0)
    assert guidance.at(0.3) is guidance
    rising = Guidance(scale=3.0, power=2.0)
    assert [rising.at(t).scale for t in (-0.1, 0.0, 1.0, 1.5)] == [1.0, 1.0, 3.0, 3.0]


def test_a_setting_of_sampling() -> None:
    spec = SampleSpec(num_steps=4, cfg_scale=3.8, cfg_power=4.0)
    assert sampler_name(spec) == "euler3_cfg3.8_power4_random"
    rising, constant = (
        next(draw(Net(), chosen, num_samples=2)).latents for chosen in (spec, SampleSpec(num_steps=4, cfg_scale=3.8))
    )
    assert not torch.allclose(rising, constant)
    with pytest.raises(UsageError, match="cfg_power"):
        sample_ode(Net(), NOISE, LABELS, cfg_scale=2.0, cfg_power=0.0)
